"""Blocks of a model as problems of their own, and as plain convolutions with batch norm folded in."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax import Experiment, data
from brecq_jax._fast_ops import NHWC, fast_op
from brecq_jax._interpret import Block, LocalOp, Program, param_values, run
from brecq_jax._model import Problem
from brecq_jax._quantize import NO_PLAN
from brecq_jax._stream import Stream

BATCH = 32  # the official code's, whose cache drops what does not fill one
HELD_OUT = 8  # one example in so many
PER_CHANNEL = ("add", "sub", "mul", "div")  # with an operand that does not depend on the data: one factor, one shift
OIHW = (3, 2, 0, 1)  # axes of an HWIO kernel, in torch's order


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One block of a model. `apply(params, inputs)` runs it at any batch size; `params` are by name."""

    problem: Problem
    number: int
    params: dict[str, jax.Array]
    train: np.ndarray
    held_out: np.ndarray

    @property
    def name(self) -> str:
        return self.block(BATCH).name

    @functools.cache  # noqa: B019: as many as there are blocks and batch sizes, kept to the end
    def block(self, batch_size: int) -> Block:
        return self.problem.units(batch_size)[self.number]

    def values(self, params: dict[str, jax.Array], batch_size: int) -> list[jax.Array]:
        """Parameters in the block's order."""
        return [params[name] for name in _names(self.problem, self.block(batch_size), batch_size)]

    def apply(self, params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        return self._run(params, inputs)

    def _run(self, params, inputs, on_op=None):
        block = self.block(inputs.shape[0])
        return run(block.program, [inputs], self.values(params, inputs.shape[0]), block.constants, on_op=on_op)[0]

    def outputs(self, params) -> np.ndarray:
        """What the block makes of the held-out inputs, in full float32."""
        with jax.default_matmul_precision("highest"):
            forward = jax.jit(functools.partial(self._run, on_op=fast_op))
            return np.concatenate([forward(params, self.held_out[i : i + BATCH]) for i in range(0, len(self.held_out), BATCH)])

    @functools.cached_property
    def target(self) -> np.ndarray:
        return self.outputs(self.params)

    def error(self, params) -> float:
        """Squared difference to the float block, summed over channels, averaged over held-out images and positions."""
        return float(np.mean(np.sum(np.square(self.outputs(params) - self.target, dtype=np.float64), -1)))

    def folded(self) -> dict[str, Any]:
        """The problem as `reference_blocks.py` reads it."""
        images = {"train": self.train, "held_out": self.held_out, "held_out_output": self.target}
        return {**fold(self.block(1), self.values(self.params, 1), self.train[:1]), **images}


def _names(problem: Problem, block: Block, batch_size: int) -> list[str]:
    graph = problem.graph(batch_size)
    return [graph.leaf_name(*graph.origins[i]) for i in block.params]


def parts(experiment: Experiment, names: Sequence[str]) -> Iterator[Part]:
    """The named blocks in program order, with what the float blocks before each make of the calibration set.

    Every HELD_OUT-th example is held out. The others are cut to full batches.

    Raises:
      ValueError: a name that no block has, a block that is not one array to one array, too few examples.
    """
    examples = data.materialize(experiment.calib_ds)
    problem = Problem(experiment.apply_fn, experiment.params, NO_PLAN, examples.arrays, examples.count, experiment.blocks)
    graph, blocks = problem.graph(BATCH), problem.units(BATCH)
    unknown = sorted(set(names) - {b.name for b in blocks})
    if unknown:
        raise ValueError(f"There is no block {', '.join(unknown)}. There are {', '.join(b.name for b in blocks)}.")
    held_out = np.arange(examples.count) % HELD_OUT == HELD_OUT - 1
    train = np.flatnonzero(~held_out)
    train = train[: len(train) // BATCH * BATCH]
    if not len(train):
        raise ValueError(f"{examples.count} calibration examples leave no batch of {BATCH} to learn from. Give 40 or more.")
    stream = Stream(graph, blocks, examples.arrays, BATCH)
    for n, block in enumerate(blocks[: 1 + max(n for n, b in enumerate(blocks) if b.name in names)]):
        values = param_values(graph, block, problem.leaves)
        if block.name in names:
            if len(block.ins) != 1 or len(block.outs) != 1:
                raise ValueError(f"{block.name} takes {len(block.ins)} arrays and gives {len(block.outs)}. Choose blocks of one and one.")
            inputs = stream.inputs_of(block)[0]
            params = dict(zip(_names(problem, block, BATCH), map(jnp.asarray, values), strict=True))
            yield Part(problem, n, params, inputs[train], inputs[held_out])
        stream.advance(block, values)


def fold(block: Block, params: list[jax.Array], example: np.ndarray) -> dict[str, Any]:
    """The arrays of a problem for `reference_blocks.py`, but for its images. `block` is of batch size 1, as `example`.

    `kind` goes by the number of convolutions and their groups; whether the rest of the block is what `kind` says, the
    comparison of float outputs there tells.

    Raises:
      ValueError: a block of other ops than the convolutions of a "basic" or an "inverted" block.
    """
    program, arrays = block.program, {}
    steps = [program.steps[op.step][0] for op in program.ops]
    for op, step in zip(program.ops, steps, strict=True):
        dims = step.params.get("dimension_numbers")
        plain = op.kind == "conv" and op.direct and set(step.params["rhs_dilation"]) == {1}
        if not plain or (dims.lhs_spec, dims.rhs_spec, dims.out_spec) != NHWC:
            raise ValueError(f"{block.name}: {step.primitive} is not a convolution of NHWC images by a kernel as it is stored.")
    groups = [step.params["feature_group_count"] for step in steps]
    kind = _kind(block.name, groups)
    for i, (op, step) in enumerate(zip(program.ops, steps, strict=True)):
        scale, bias = affine_after(block, op, params, example)
        arrays[f"weight{i}"] = np.ascontiguousarray(np.asarray(params[op.weight] * scale).transpose(OIHW))
        arrays[f"bias{i}"], arrays[f"groups{i}"] = np.asarray(bias), groups[i]
        arrays[f"stride{i}"], arrays[f"padding{i}"] = np.array(step.params["window_strides"]), np.array(step.params["padding"])
    (out,) = jax.eval_shape(lambda: run(program, [example], params, block.constants))
    if kind == "basic" and out.shape != example.shape:
        raise ValueError(f"{block.name}: its shortcut changes the shape. Choose a block whose input is added as it is.")
    return {"kind": kind, "layout": "NHWC", "shortcut": out.shape == example.shape, **arrays}


def _kind(name: str, groups: list[int]) -> str:
    if groups == [1, 1]:
        return "basic"
    if len(groups) in (2, 3) and groups[-2] > 1 and set(groups[:-2]) <= {1} and groups[-1] == 1:
        return "inverted"
    raise ValueError(f"{name}: convolutions of {groups} groups are neither a basic nor an inverted residual block.")


def affine_after(block: Block, op: LocalOp, params: list[jax.Array], example: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(scale, bias) of each channel: what follows the op, up to the first step that is not one factor or one shift.

    The op's output is replaced by a probe. At zero the value is the bias; its derivative is the scale.
    """
    shortened = dataclasses.replace(block.program, outputs=(_end_of_affine(block.program, op),))
    made = dataclasses.replace(block.program, outputs=block.program.steps[op.step][2])
    (shape,) = jax.eval_shape(lambda: run(made, [example], params, block.constants))

    def value(probe):
        replace = lambda number, step, operands: [probe] if block.program.ops[number] == op else None  # noqa: E731
        return run(shortened, [example], params, block.constants, on_op=replace)[0]

    bias, scale = jax.jvp(value, (jnp.zeros(shape.shape, shape.dtype),), (jnp.ones(shape.shape, shape.dtype),))
    return scale[0, 0, 0], bias[0, 0, 0]


def _end_of_affine(program: Program, op: LocalOp) -> int:
    """The id of the last value that is the op's output times a parameter, plus a parameter."""
    data_ids, ident = set(program.inputs), program.steps[op.step][2][0]
    for step, ids, outs in program.steps:
        if data_ids.intersection(ids):
            data_ids.update(outs)
        alone = data_ids.intersection(ids) == {ident}
        if ident in ids and not (alone and step.primitive in PER_CHANNEL):
            break
        if ident in ids:
            ident = outs[0]
    return ident
