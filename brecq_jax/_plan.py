"""The decision that joins program and numbers: which format each weight and each activation gets."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from brecq_jax._graph import Graph, Op, Weight
from brecq_jax._interpret import contraction_axis, token_axes
from brecq_jax._products import Factor
from brecq_jax.formats import Binary, ClusterCodebook, Format, Multipoint, PerToken, RowCodebook, RowUniform, Sparq, TailRange, Ternary, Uniform

PRESETS = ("brecq", "uniform")
EDGE_BITS = 8  # of the first and last layer, under a preset

Activation = Uniform | Sparq | PerToken
Rules = Format | Sparq | PerToken | None | Mapping[str, Format | Sparq | PerToken | None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is quantized, and how: total over the graph's weights and over the values that its ops read.

    `weights`: name -> format, None stays float. `activations`: value -> format; a value is named by the first op that
    reads it, or else by the first product of two values and the side it has there. `whole_values`: the quantized value replaces
    the original for everything that reads it (so that a residual sum adds quantized values); otherwise ops and products alone see it.
    """

    weights: Mapping[str, Format | None]
    activations: Mapping[str, Activation | None]
    whole_values: bool
    preset: str | None
    rows: tuple[tuple[str, ...], ...]  # the table: op, shape, weight format, true bits, activation format, remarks
    float_bits: int
    size_bits: int
    skipped: tuple[tuple[str, str], ...]

    @property
    def rules(self) -> dict[str, Any]:
        """The plan as arguments: `quantize(params, apply_fn, calib_ds, **plan.rules)`. One rule for each name: edit them as you like."""
        weights, activations = ({re.escape(n): f for n, f in formats.items()} for formats in (self.weights, self.activations))
        return {"weights": weights, "activations": activations, "preset": self.preset}

    def __str__(self) -> str:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for title, justify in (("op", "left"), ("shape", "left"), ("weight", "left"), ("bits", "right"), ("reads", "left"), ("", "left")):
            table.add_column(title, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        ratio = self.float_bits / max(self.size_bits, 1)
        last = f"weights: {self.size_bits / 8e6:.3f} MB, in float {self.float_bits / 8e6:.3f} MB ({ratio:.2f} times smaller)"
        if any(self.activations.values()):
            whom = "everything that reads a value" if self.whole_values else "what multiplies alone (residual sums stay float)"
            last += f"\nactivations are quantized for {whom}; preset: {self.preset}"
        kept = "".join(f"\nkept float: {name}: {why}" for name, why in self.skipped)
        return render(table) + last + kept


def make_plan(graph: Graph, weights: Rules = Uniform(4), activations: Rules = Uniform(8), preset: str | None = None) -> Plan:
    """Decide on a format for every weight and every activation.

    Args:
      weights: one format for all, None for float, or `{pattern: format}`: the first rule whose regular expression
        matches the whole name wins; names that no rule matches stay float.
      activations: the same, for the values that ops read (named by the first op that reads them), and for those that products of two
        values read: attention's q·kᵀ reads `…/attn/product/left` and `/right`, p·v `…/attn/product#2/left` and `/right`, and the plan says of
        which weights each is made. A token that they read is one head's, and its range in `PerToken` has no groups.
      preset: "brecq": first and last layer's weights, the first layer's output and the last layer's input at 8 bits,
        the network's input float, whole values quantized (residual sums add quantized values). "uniform": first and
        last layer's weights and the network's input at 8 bits, every other activation at the stated bits, residual
        sums float. None: what is stated, everywhere. Rules that match a name win over the preset.

    Raises:
      ValueError: an unknown preset, a rule that is never used, a format that does not fit a weight's shape, Sparq for the network's input.
      TypeError: something that is not a format.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: write one of {', '.join(map(repr, PRESETS))} or None.")
    sites: dict[str, Op | Factor] = {}
    for read in _reads(graph):
        sites.setdefault(read.site, read)
    by_rule_w = _match("weights", weights, list(graph.weights))
    by_rule_a = _match("activations", activations, list(sites))
    last, (edges, inside) = graph.ops[-1], _edges(graph)
    chosen_w: dict[str, Format | None] = {}
    for name, weight in graph.weights.items():
        format, ruled = by_rule_w[name]
        if preset and not ruled and name in edges and format is not None:
            format = _at_edge(format)
        chosen_w[name] = _for_weight(format, weight)
    after_first = _fed_by_first(graph)
    chosen_a: dict[str, Activation | None] = {}
    for name, read in sites.items():
        format, ruled = by_rule_a[name]
        if preset and not ruled and format is not None:
            reads_input = read.site_value not in graph.heavy
            edge = reads_input or (preset == "brecq" and (read.site_value in after_first or name == last.site))
            format = None if reads_input and preset == "brecq" else _at_edge(format) if edge else format
        if isinstance(format, PerToken) and isinstance(read, Factor):
            format = PerToken(format.bits)
        if isinstance(format, Sparq) and read.site_value not in graph.heavy:
            raise ValueError(
                f"activations: {name}: Sparq re-codes unsigned 8-bit codes, values after a ReLU, and this is the network's own input.\n"
                "  Write Uniform(8) for this name, or None."
            )
        chosen_a[name] = _for_activation(format, name, graph)
    _check_slices(graph, chosen_w)
    rows, sizes = [], {}
    for op in graph.ops:
        format, ruled = by_rule_w[op.weight]
        no_edge = bool(preset and not ruled and format is not None and op.weight in inside)
        rows.append(_row(graph, op, chosen_w[op.weight], chosen_a.get(op.site), sizes, no_edge))
    rows.extend(_factor_row(f, chosen_a[f.site]) for f in graph.factors if chosen_a[f.site] is not None)
    size = sum(sizes.values()) + graph.other_bits
    skipped = graph.skipped + _float_products(graph, chosen_a)
    return Plan(chosen_w, chosen_a, preset == "brecq", preset, tuple(rows), sum(graph.float_bits), size, skipped)


def render(renderable: Any, width: int = 120) -> str:
    """A rich table as plain text."""
    console = rich.console.Console(width=width, no_color=True, highlight=False, file=_Null(), force_jupyter=False, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


class _Null:
    def write(self, text):
        return len(text)

    def flush(self):
        pass


def _reads(graph: Graph) -> list[Op | Factor]:
    """What reads a value that may be quantized."""
    return [*(op for op in graph.ops if op.kind != "embed"), *graph.factors]


def _float_products(graph: Graph, chosen: Mapping[str, Activation | None]) -> tuple[tuple[str, str], ...]:
    """(what, why) of the products that read a float value."""
    names = [product.name for product in graph.products if any(chosen[f.site] is None for f in product.factors)]
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    why = f"neither operand is a weight (queries and keys, say), and the plan leaves what they read float: {shown}"
    return ((f"{len(names)} matrix products of two values", why),) if names else ()


def _match(what: str, rules: Rules, names: list[str]) -> dict[str, tuple[Format | None, bool]]:
    """name -> (format, whether a rule named it)."""
    if rules is None or isinstance(rules, (Format, Sparq, PerToken)):
        return {name: (rules, False) for name in names}
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"{what}: {rules!r} is a {type(rules).__name__}. Write a format, as Uniform(4), None for float, or a "
            "dict {pattern: format}."
        )
    for pattern in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{what}: the rule {pattern!r} is no regular expression: {error}. Write \\ before (, ) and [ of a name.") from None
    found, used = {}, set()
    for name in names:
        pattern = next((p for p in rules if re.fullmatch(p, name)), None)
        used.add(pattern)
        found[name] = (rules.get(pattern), pattern is not None)
    for pattern, format in rules.items():
        if format is not None and not isinstance(format, (Format, Sparq, PerToken)):
            raise TypeError(f"{what}: the rule {pattern!r} gives {format!r}. Write a format, as Uniform(4), or None.")
        if pattern not in used:
            shadowed = any(re.fullmatch(pattern, name) for name in names)
            reason = "is never used: earlier rules match all its names" if shadowed else "matched no op"
            shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
            raise ValueError(
                f"{what}: the rule {pattern!r} {reason}. The weighted ops are\n  {shown}.\n"
                "Rules are regular expressions for the whole name: try 'block.*'."
            )
    return found


def _at_edge(format: Format | Activation) -> Format | PerToken:
    if isinstance(format, (Ternary, Binary)):  # bits are not a setting of theirs
        return Uniform(EDGE_BITS, granularity=format.granularity)
    if isinstance(format, (RowCodebook, ClusterCodebook)):  # they have no 8 bits
        return RowUniform(EDGE_BITS)
    return Uniform(EDGE_BITS, ranges=format.ranges) if isinstance(format, Sparq) else dataclasses.replace(format, bits=EDGE_BITS)


def _for_weight(format: Format | Sparq | PerToken | None, weight) -> Format | None:
    if isinstance(format, (Sparq, PerToken)):
        raise ValueError(f"weights: {weight.name} is given {format}, which is for what ops read: write activations={format}.")
    if isinstance(format, Uniform) and format.granularity is None:
        format = dataclasses.replace(format, granularity="per_channel")
    if format is not None:
        channels = math.prod(weight.shape[a] for a in weight.channel_axes)
        try:
            format.check((channels, math.prod(weight.shape) // max(channels, 1)))
        except ValueError as error:
            raise ValueError(f"weights: {weight.name} {weight.shape}: {error}") from None
    return format


def _for_activation(format: Format | Sparq | PerToken | None, name: str, graph: Graph) -> Activation | None:
    if format is None:
        return None
    if isinstance(format, PerToken):
        _check_tokens(graph, name, format)
        return format
    if isinstance(format, Sparq):
        if format.pairs:
            _check_pairs(graph, name)
        return format
    if not isinstance(format, Uniform) or format.granularity not in (None, "per_tensor"):
        raise ValueError(
            f"activations: {name} is given {format}. Activations are quantized per tensor: write Uniform({format.bits}), PerToken({format.bits}) or Sparq(4)."
        )
    return dataclasses.replace(format, granularity="per_tensor", ranges=format.ranges or TailRange())


def _check_tokens(graph: Graph, name: str, format: PerToken):
    """Raise ValueError if one that reads this value is a convolution, or has tokens that groups do not divide."""
    for read in _reads(graph):
        if read.site != name:
            continue
        if read.kind == "conv":
            raise ValueError(
                f"activations: {name} is given {format}, and the convolution {read.name} reads no tokens. Write Uniform({format.bits})."
            )
        shape = graph.flat.types[read.data].shape
        elements = shape[token_axes(read, graph.flat.steps[read.step])[-1]]
        try:
            format.check((math.prod(shape) // elements, elements))
        except ValueError as error:
            raise ValueError(f"activations: {name} is given {format}: {error}") from None


def _check_pairs(graph: Graph, name: str):
    """Raise ValueError if one that reads this value has no pairs to share bits."""
    for read in _reads(graph):
        if read.site != name:
            continue
        axis, groups = contraction_axis(read, graph.flat.steps[read.step])
        channels = graph.flat.types[read.data].shape[axis] // groups
        if channels == 1 or groups > 1 and channels % 2:
            raise ValueError(
                f"activations: {name} is given Sparq in pairs, two channels that one sum adds up; {read.name} adds up {channels} in each of its\n"
                f"  {groups} groups. Write Uniform(8) for this name, or Sparq(…, pairs=False)."
            )


def _fed_by_first(graph: Graph) -> set[int]:
    """Values that the first op alone has made."""
    weighted = {op.step: i for i, op in enumerate(graph.ops)}
    makers: dict[int, frozenset[int]] = {}
    for t, step in enumerate(graph.flat.steps):
        above = frozenset().union(*(makers.get(i, ()) for i in step.inputs))
        for out in step.outputs:
            makers[out] = frozenset((weighted[t],)) if t in weighted else above
    return {ident for ident, ops in makers.items() if ops == {0}}


def _edges(graph: Graph) -> tuple[set[str], set[str]]:
    """(the first and the last op's weights; those of them that are a slice of a stack with slices that are neither, which has one format)."""
    edges = {graph.ops[0].weight, graph.ops[-1].weight}
    others = {weight.leaf for name, weight in graph.weights.items() if name not in edges}
    inside = {name for name in edges if graph.weights[name].leaf in others}
    return edges - inside, inside


def _check_slices(graph: Graph, chosen):
    by_leaf: dict[int, set] = {}
    for name, weight in graph.weights.items():
        by_leaf.setdefault(weight.leaf, set()).add(chosen[name])
        if len(by_leaf[weight.leaf]) > 1:
            raise ValueError(
                f"weights: the slices of the stacked parameter {graph.leaves[weight.leaf][0]!r} get different formats. "
                "One leaf holds them all: write one rule for all its slices."
            )


def _row(graph: Graph, op: Op, format: Format | None, activation: Activation | None, sizes: dict[str, int], no_edge: bool) -> tuple[str, ...]:
    weight = graph.weights[op.weight]
    remark = []
    if no_edge:
        remark.append(f"not the preset's {EDGE_BITS} bits: {graph.leaves[weight.leaf][0]} holds other layers, too, in one format")
    if op.weight in sizes:
        remark.append("shares its weight")
    else:
        sizes[op.weight] = size_bits(weight, format)
    if op.computed:
        remark.append(f"the parameter is quantized, then {', '.join(dict.fromkeys(op.computed))}")
    if activation is not None and op.site != op.name:
        remark.append(f"reads what {op.site} reads")
    per = sizes[op.weight] / max(math.prod(weight.shape), 1)
    return (
        op.name, "×".join(map(str, weight.shape)), describe(format), f"{per:.2f}",
        "indices" if op.kind == "embed" else describe(activation), "; ".join(remark),
    )  # fmt: skip


def _factor_row(factor: Factor, activation: Activation) -> tuple[str, ...]:
    made_of = ", ".join(factor.made_of[:2]) + (", …" if len(factor.made_of) > 2 else "")
    remark = f"made of {made_of}" if factor.site == factor.name else f"reads what {factor.site} reads"
    return factor.name, "", "", "", describe(activation), remark


def describe(format: Format | Sparq | PerToken | None) -> str:
    """`4 bit per_channel`, as a table shows a format."""
    if format is None:
        return "float"
    if isinstance(format, Multipoint):
        return f"{format.bits} bit, up to {format.points} points"
    if isinstance(format, PerToken):
        return f"{format.bits} bit per token" + (f", groups of {format.group_size}" if format.group_size else "")
    if isinstance(format, (Ternary, Binary)):
        kind = "ternary" if isinstance(format, Ternary) else "binary" if format.points == 1 else "two binary points"
        return f"{kind} {format.granularity}"
    if isinstance(format, Sparq):
        return f"8 bit, read by {format.window}" + (" in pairs" if format.pairs else "")
    if not isinstance(format, Uniform):
        return str(format)
    granularity = format.granularity if isinstance(format.granularity, str) else f"groups of {format.granularity}"
    return f"{format.bits} bit {granularity}" + (" symmetric" if format.symmetric else "")


def size_bits(weight: Weight, format: Format | None) -> int:
    """True bits of a weight in a format, grid included; None leaves it as it came."""
    if format is None:
        return weight.float_bits
    size = math.prod(weight.shape)
    channels = math.prod(weight.shape[a] for a in weight.channel_axes)
    return _stored_bits(format, channels, size // max(channels, 1))


@functools.cache  # a network has few shapes, and each is traced
def _stored_bits(format: Format, channels: int, elements: int) -> int:
    rows = jax.ShapeDtypeStruct((channels, elements), jnp.float32)
    return format.storage_bits(rows, jax.eval_shape(format.fit, rows))
