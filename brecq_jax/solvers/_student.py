"""What is trained when a model is quantized while it learns: latent float weights, and step sizes of activations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._graph import Weight
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax._qarray import QArray, from_rows, is_qarray, quantize_array, to_rows
from brecq_jax.formats import Binary, Format, Grid, Ternary
from brecq_jax.formats.binary import sum_of_halves
from brecq_jax.formats.splitting import SplitError, split_rows


class Written(NamedTuple):
    """A weight, and the format in which the student sees it."""

    weight: Weight
    format: Format

    @property
    def is_pair(self) -> bool:
        """Two latent weights, each binarized by its own mean and added up: their leaf is (2, …)."""
        return isinstance(self.format, Binary) and self.format.points == 2


class Student(NamedTuple):
    """Latent parameters, and the logarithms of activations' step sizes by value name: what the optimizer sees."""

    latents: Any
    steps: dict[str, jax.Array]


def written(problem: Problem, formats: Mapping[str, Format | None]) -> tuple[Written, ...]:
    """The planned weights, in the plan's order."""
    graph = problem.graph(1)
    return tuple(Written(graph.weights[name], f) for name, f in formats.items() if f is not None)


def begin(plan: tuple[Written, ...], params: Any, activations: Mapping[str, Grid]) -> Student:
    """The float parameters as latent ones. Of two binary points, the second one begins as what the first leaves over."""
    leaves, tree = jax.tree.flatten(params)
    starts = list(leaves)
    for n in {w.weight.leaf for w in plan if w.is_pair}:
        starts[n] = jnp.stack([leaves[n], leaves[n]])
    for own in plan:
        if own.is_pair:
            w = own.weight
            first = leaves[w.leaf][w.index]
            rest = first - quantize_array(first, Binary(granularity=own.format.granularity), w.channel_axes).decode()
            starts[w.leaf] = starts[w.leaf].at[(1, *w.index)].set(rest)
    return Student(jax.tree.unflatten(tree, starts), {name: jnp.log(grid.scale) for name, grid in activations.items()})


def split(plan: tuple[Written, ...], student: Student) -> Student:
    """The student with two binary latent weights for each ternary one, exactly the same model.

    Raises:
      SplitError: see `formats.splitting`.
    """
    leaves, tree = jax.tree.flatten(student.latents)
    halves = {w.weight.leaf: np.stack([np.asarray(leaves[w.weight.leaf])] * 2) for w in plan if isinstance(w.format, Ternary)}
    for weight, format in plan:
        if isinstance(format, Ternary):
            latent = leaves[weight.leaf][weight.index]
            q = quantize_array(latent, format, weight.channel_axes)
            rows, codes = (np.asarray(to_rows(a, weight.channel_axes)) for a in (latent, q.codes))
            try:
                pair = split_rows(format, rows, codes)
            except SplitError as error:
                raise SplitError(f"{weight.name} {weight.shape}: {error}") from None
            for n, half in enumerate(pair):
                halves[weight.leaf][(n, *weight.index)] = from_rows(jnp.asarray(half, rows.dtype), weight.shape, weight.channel_axes)
    leaves = [jnp.asarray(halves.get(n, leaf)) for n, leaf in enumerate(leaves)]
    return student._replace(latents=jax.tree.unflatten(tree, leaves))


def seen(plan: tuple[Written, ...], latents: Any) -> Any:
    """The parameters that the model is run with: every planned weight on its grid, gradients passing the rounding unchanged.

    Source: Bengio et al. 2013, https://arxiv.org/abs/1308.3432
    """
    leaves, tree = jax.tree.flatten(latents)
    shown = list(leaves)
    for own in plan:
        w, latent = own.weight, leaves[own.weight.leaf]
        if own.is_pair:
            value = sum(_rounded(Binary(granularity=own.format.granularity), half[w.index], w.channel_axes) for half in latent)
            shown[w.leaf] = shown[w.leaf].sum(0) if shown[w.leaf].ndim == latent.ndim else shown[w.leaf]
        else:
            value = _rounded(own.format, latent[w.index], w.channel_axes)
        shown[w.leaf] = shown[w.leaf].at[w.index].set(value) if w.index else value
    return jax.tree.unflatten(tree, shown)


def finish(plan: tuple[Written, ...], student: Student, problem: Problem, guess: Quantized) -> Quantized:
    """Codes of the latent weights, learned step sizes, and the float parameters that were learned beside them."""
    latents = jax.tree.leaves(student.latents)
    leaves, tree = jax.tree.flatten(guess.params, is_leaf=is_qarray)
    leaves = [old if isinstance(old, QArray) else new for old, new in zip(leaves, latents, strict=True)]
    found = {}
    for own in plan:
        w, latent = own.weight, latents[own.weight.leaf]
        if own.is_pair:
            codes, grid = sum_of_halves(own.format, *(to_rows(half[w.index], w.channel_axes) for half in latent))
            found[w.name] = QArray(from_rows(codes, w.shape, w.channel_axes), grid, own.format, w.channel_axes, jnp.dtype(latent.dtype).name)
        else:
            found[w.name] = quantize_array(latent[w.index], own.format, w.channel_axes)
    model = dataclasses.replace(guess, params=jax.tree.unflatten(tree, leaves)).with_weights(found, problem.graph(1))
    return model.with_activations(grids(guess.activations, student.steps))


def grids(activations: Mapping[str, Grid], steps: Mapping[str, jax.Array]) -> dict[str, Grid]:
    """Activation grids with learned step sizes."""
    return {name: grid._replace(scale=jnp.exp(steps[name])) for name, grid in activations.items()}


def view(features: Callable, program: Program, plan, student: Student, activations: Mapping[str, Grid], inputs) -> Any:
    """`features` of the student: weights on their grids, and what ops read quantized as the model's is."""
    model = Quantized({}, grids(activations, student.steps), dataclasses.replace(program, apply_fn=features, report=None))
    return model.apply_fn(seen(plan, student.latents), inputs)


def _rounded(format: Format, latent: jax.Array, channel_axes: tuple[int, ...]) -> jax.Array:
    hard = quantize_array(jax.lax.stop_gradient(latent), format, channel_axes).decode()
    return latent + jax.lax.stop_gradient(hard - latent)
