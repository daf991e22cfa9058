"""Where a graph is cut: into layers, blocks, stages, the whole net, or the user's own blocks.

A cut is a place in the program where few values are live that weighted ops made. Where exactly one is, the rest of
the net needs nothing else from what came before: the end of a residual block, of an attention half. The *latest* such
place before the next weighted op is taken, so that an activation function stays with the op it follows.
Values that depend on the inputs but on no weighted op (a mask), and those that no weighted op depends on (an auxiliary
output), do not count: they are carried along. What crosses a cut has its examples on axis 0 (`Graph.by_example`): while
frames or patches lie in the batch's axis, or time comes first, nothing is cut.
"""

import collections
import itertools
import math
import re
from collections.abc import Sequence

import jax.numpy as jnp

from brecq_jax._graph import Graph
from brecq_jax._interpret import Block, make_block, needed_steps

GRANULARITIES = ("layer", "block", "stage", "net")
MOST_OPS = 12  # ops in a block that is never down to one live value, before it is cut at more: a guess
CHAIN = 3  # ops in a row, with no residual around them and no module in common, that make a block: as MQBench
MODULE_CHAIN = 4  # the same, of one module
LOOP = 64  # uses of one weight, from which on the reader is told what an unrolled loop costs: a guess
UNCUT = "at no place between them are the examples of all values on axis 0 alone"


def partition(graph: Graph, blocks: str | Sequence[str] = "block") -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """Cut a graph. Returns the blocks in program order, which cover every op once, and notes for the reader.

    Args:
      blocks: "layer", "block", "stage", "net", or regular expressions for whole op names: ops in a row that match
        the same expression (with the same groups, if it has any) form a block; the rest is cut as by "block".

    Raises:
      ValueError: an unknown granularity, a pattern that matches no op, or one whose ops do not follow each other.
    """
    cutter = _Cutter(graph)
    if not isinstance(blocks, str):
        groups = cutter.by_patterns(tuple(blocks))
    elif blocks == "net":
        groups = [tuple(range(len(graph.ops)))]
    elif blocks == "layer":
        groups = [(i,) for i in range(len(graph.ops))]
    elif blocks == "block":
        groups = cutter.by_liveness()
    elif blocks == "stage":
        groups = cutter.by_stage()
    else:
        raise ValueError(f"blocks={blocks!r}: write one of {', '.join(GRANULARITIES)}, or a list of name patterns.")
    return cutter.make(groups), tuple(cutter.notes)


class _Cutter:
    def __init__(self, graph: Graph):
        self.graph, self.notes = graph, _mixing(graph)
        steps = graph.flat.steps
        self.outputs = tuple(i for i in graph.flat.outputs if i in graph.by_example)
        self.needed = needed_steps(graph, self.outputs)
        read_last = {i: t for t in sorted(self.needed) for i in steps[t].inputs}
        last_use = read_last | {i: len(steps) for i in self.outputs}
        reach = {i for t in needed_steps(graph, ()) for i in steps[t].inputs}  # the others, auxiliary outputs, do not count as live
        change = [0] * (len(steps) + 1)
        for t, step in enumerate(steps):
            for out in step.outputs:
                if out in graph.heavy and out in reach and last_use.get(out, -1) > t:
                    change[t] += 1
                    change[last_use[out]] -= 1
        self.live = list(itertools.accumulate(change))
        elsewhere, barred = graph.data - graph.by_example, [0] * (len(steps) + 1)
        for t, step in enumerate(steps):
            for out in elsewhere.intersection(step.outputs):
                barred[t] += 1
                barred[read_last.get(out, t)] -= 1
        self.barred = list(itertools.accumulate(barred))
        self.places = [self.place(i) for i in range(len(graph.ops) - 1)]

    def place(self, i: int) -> int | None:
        """The step after which to cut between ops i and i + 1: the latest with the fewest live values. None: nowhere."""
        free = [t for t in range(self.graph.ops[i].step, self.graph.ops[i + 1].step) if not self.barred[t]]
        return min(free, key=lambda t: (self.live[t], -t), default=None)

    def width(self, i: int) -> float:
        """Live values at the cut between ops i and i + 1."""
        place = self.places[i]
        return math.inf if place is None else self.live[place]

    def by_liveness(self) -> list[tuple[int, ...]]:
        groups, current = [], [0]
        for i in range(1, len(self.graph.ops)):
            if self.width(i - 1) == 1:
                groups.append(tuple(current))
                current = []
            current.append(i)
        groups.append(tuple(current))
        return self.join_chains([part for group in groups for part in self.split(group)])

    def split(self, group: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Cut a group that is too large where the fewest values are live, nearest its middle."""
        if len(group) <= MOST_OPS:
            return [group]
        middle = len(group) / 2
        at = min(range(1, len(group)), key=lambda j: (self.width(group[j] - 1), abs(j - middle)))
        if math.isinf(self.width(group[at] - 1)):
            self.notes.append(f"{self.name(group[0])} to {self.name(group[-1])} are one block: {UNCUT}")
            return [group]
        self.notes.append(
            f"no single live value between {self.name(group[0])} and {self.name(group[-1])}: cut before "
            f"{self.name(group[at])}, where {self.width(group[at] - 1)} are live"
        )
        return self.split(group[:at]) + self.split(group[at:])

    def join_chains(self, groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Ops in a row that stand alone form blocks: by their module, or where names say nothing, by threes."""
        nameless = all(not self.parent(i) for i in range(len(self.graph.ops)))
        chain = {group[0] for group in groups if len(group) == 1 and self.live[self.graph.ops[group[0]].step] <= 1}
        joined: list[list[int]] = []
        for group in groups:
            same = bool(
                joined
                and chain.issuperset((joined[-1][-1], group[0]))
                and self.parent(joined[-1][-1]) == self.parent(group[0])
                and (nameless or self.parent(group[0]))
            )
            if same:
                joined[-1].extend(group)
            else:
                joined.append(list(group))
        limit = CHAIN if nameless else MODULE_CHAIN
        result = []
        for group in joined:
            size = CHAIN if len(group) > limit and group[0] in chain else len(group)
            result.extend(tuple(group[j : j + size]) for j in range(0, len(group), size))
        return result

    def by_stage(self) -> list[tuple[int, ...]]:
        """Blocks in a row whose last ops have outputs of one shape. First and last op keep to themselves."""
        groups = self.by_liveness()
        merged = groups[:1]
        for n, group in enumerate(groups[1:], 1):
            first_or_last = len(merged) == 1 or n == len(groups) - 1
            if not first_or_last and self.out_shape(merged[-1]) == self.out_shape(group):
                merged[-1] = merged[-1] + group
            else:
                merged.append(group)
        return merged

    def out_shape(self, group) -> tuple[int, ...]:
        step = self.graph.flat.steps[self.graph.ops[group[-1]].step]
        return self.graph.flat.types[step.outputs[0]].shape

    def by_patterns(self, patterns: tuple[str, ...]) -> list[tuple[int, ...]]:
        keys = []
        for op in self.graph.ops:
            matches = ((p, re.fullmatch(p, op.name)) for p in patterns)
            keys.append(next(((p, m.groups()) for p, m in matches if m), None))
        for pattern in patterns:
            if not any(k and k[0] == pattern for k in keys):
                raise ValueError(_unmatched("blocks", pattern, [op.name for op in self.graph.ops]))
        default = {group[0] for group in self.by_liveness()}
        groups: list[list[int]] = []
        for i, key in enumerate(keys):
            new = i == 0 or key != keys[i - 1] or (key is None and i in default)
            if new:
                groups.append([])
            groups[-1].append(i)
        starts = [keys[g[0]] for g in groups if keys[g[0]]]
        for key in starts:
            if starts.count(key) > 1:
                names = [op.name for op, k in zip(self.graph.ops, keys, strict=True) if k == key]
                raise ValueError(
                    f"blocks: the ops of {key[0]!r} do not follow each other in the program: {', '.join(names)}. "
                    "A block is a run of ops; split the pattern."
                )
        return [tuple(g) for g in groups]

    def joined(self, groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Groups that nothing can be cut between are one."""
        found: list[tuple[int, ...]] = []
        for group in groups:
            if found and self.places[group[0] - 1] is None:
                self.notes.append(f"{self.name(group[0] - 1)} and {self.name(group[0])} are in one block: {UNCUT}")
                found[-1] += group
            else:
                found.append(group)
        return found

    def make(self, groups) -> tuple[Block, ...]:
        graph, blocks, start, names = self.graph, [], 0, {}
        for i in dict.fromkeys(i for i in graph.flat.outputs if i in graph.heavy - graph.by_example):
            self.notes.append(f"nothing is learned from an output of shape {graph.flat.types[i].shape}: its examples are not on axis 0 alone")
        for i in dict.fromkeys(i for i in graph.flat.outputs if i in graph.heavy):
            dtype = graph.flat.types[i].dtype
            if not jnp.issubdtype(dtype, jnp.floating):
                self.notes.append(f"nothing is learned from an output of {dtype}: let apply_fn return the real numbers that it is made of")
        weight, uses = collections.Counter(op.weight for op in graph.ops).most_common(1)[0]
        if uses >= LOOP:
            self.notes.append(
                f"{weight} is read {uses} times: a loop over time is unrolled into {len(graph.ops)} ops, and compiled so. Calibrate on shorter "
                "sequences; with activations=None what is learned holds for any length"
            )
        for group in self.joined(groups):
            last = group[-1] == len(graph.ops) - 1
            stop = len(graph.flat.steps) if last else self.places[group[-1]] + 1
            name = self.block_name(group)
            names[name] = names.get(name, 0) + 1
            unique = name if names[name] == 1 else f"{name}#{names[name]}"
            blocks.append(make_block(graph, unique, start, stop, self.outputs, self.needed))
            start = stop
        return tuple(blocks)

    def name(self, i: int) -> str:
        return self.graph.ops[i].name

    def parent(self, i: int) -> str:
        """`features/3/conv/kernel` -> `features/3`: the module around the layer."""
        return "/".join(self.graph.ops[i].weight.split("/")[:-2])

    def block_name(self, group) -> str:
        paths = [self.graph.ops[i].weight.split("/")[:-1] for i in group]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        if common:
            return "/".join(common)
        ends = ["/".join(p) or self.graph.ops[i].weight for p, i in ((paths[0], group[0]), (paths[-1], group[-1]))]
        return ends[0] if len(group) == 1 else f"{ends[0]}..{ends[1]}"


def _mixing(graph: Graph) -> list[str]:
    """A note where what one example gives depends on the others of its batch, if it is seen.

    What a step makes of something that grows with the batch, and has one shape for all batches, meets an example again.
    """
    types, larger, common = graph.flat.types, graph.at_twice, set()
    grows = {i for i in graph.data if larger and types[i].shape != larger[i].shape}
    for t, step in enumerate(graph.flat.steps):
        own = graph.data.intersection(step.inputs) - common
        meets = common.intersection(step.inputs)
        if meets and graph.by_example.intersection(own) and graph.by_example.intersection(step.outputs):
            before = [op.name for op in graph.ops if op.step < t]
            return [
                f"examples of a batch are not independent: a {step.primitive} {f'after {before[-1]}' if before else 'of the inputs'} joins each with "
                "what all of them made, as BatchNorm does in train mode. Write apply_fn in inference mode, or what is measured depends on the batch"
            ]
        # of what stays whole it is not known what an output depends on
        collapses = grows.intersection(step.inputs) and step.primitive not in ("while", "cond", "scan")
        if larger and (collapses or meets and not own):
            fixed = (i for i in step.outputs if i not in grows or not own)
            common.update(i for i in fixed if types[i].size and jnp.issubdtype(types[i].dtype, jnp.floating))
    return []


def _unmatched(what: str, pattern: str, names: list[str]) -> str:
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return (
        f"{what}: the rule {pattern!r} matched no op. The weighted ops are\n  {shown}.\n"
        "Rules are regular expressions for the whole name: try 'block.*'."
    )
