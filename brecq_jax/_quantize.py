"""The story: a model and a few hundred inputs go in, a quantized model comes out."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from brecq_jax import data, solvers
from brecq_jax._blocks import partition
from brecq_jax._graph import Graph, leaf_names
from brecq_jax._journal import check_same_everywhere, digest, library, opened
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax._plan import Plan, Rules, describe, make_plan
from brecq_jax._progress import bar
from brecq_jax._qarray import QArray, is_qarray
from brecq_jax._sharding import data_mesh
from brecq_jax.formats import Uniform, activation_grid
from brecq_jax.report import ActivationRecord, BlockRecord, Report, TensorRecord
from brecq_jax.solvers import Info, Solver


def quantize(
    params: Any,
    apply_fn: Callable[[Any, Any], Any],
    calib_ds: Any,
    *,
    weights: Rules = Uniform(4),
    activations: Rules = Uniform(8),
    preset: str | None = None,
    solver: Solver | None = None,
    blocks: str | Sequence[str] = "block",
    inputs: Any = None,
    loss: Callable | None = None,
    memory_budget_gb: float | None = None,
    bfloat16_caches: bool = False,
    resume: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Quantized:
    """Quantize a model after training.

        quantized = brecq_jax.quantize(variables, model.apply, images)
        logits = quantized(images)

    Args:
      params: the float parameters, any pytree (Linen variables, `from_nnx`'s state, a plain dict).
      apply_fn: `apply_fn(params, inputs)` in inference mode, any JAX function.
      calib_ds: a few hundred unlabelled inputs: an array, a list of batches, a function that returns an iterator of
        them, a generator, a tf.data.Dataset, a tfds data source, a grain loader.
      weights: a Format for all, None for float, or {name pattern: Format or None}, first match wins.
      activations: the same for what weighted ops and products of two values (attention's) read; None for weights alone.
      preset: "brecq" or "uniform", see `make_plan`; rules win over it.
      solver: None: `DEFAULT_SOLVER`; or `solvers.nearest()`, `.adaround()`, …
      blocks: "layer", "block", "stage", "net", or a list of name patterns.
      inputs: which part of a calibration element apply_fn takes: a key, an index or a function; arrays, (x, y) and
        {"image": x} need nothing. For several inputs `lambda e: e`, and an apply_fn that takes them as one.
      loss: `loss(outputs, key) -> scalar` for the Fisher weights; None: the model's own prediction.
      memory_budget_gb: a calibration set that holds more is refused (None: 8). With it, what the set and a step leave is for the values
        between blocks: in memory while it lasts, then computed again or in a file, by a plan that is printed (docs/pods.md; None: all in memory).
      bfloat16_caches: hold them in half the bytes.
      resume: a folder that keeps each finished block, so that the same call goes on after the last of them if it was interrupted;
        it may be removed once the model is saved. None: nothing is kept.
      mesh: devices along its axis `data` share examples, cached ones and each batch's: `jax.make_mesh((jax.device_count(),), ("data",))`.
        None: one device. In a run of many processes, each calls this with the same arguments (docs/pods.md).
      key: a jax.random key; None is jax.random.key(0).
      progress: print the plan before work starts, and show progress.

    Returns:
      A `Quantized`: call it, jit it, `save` it. Its `.report` says what was done and what stayed float.

    Raises:
      ValueError, TypeError: bad params, calibration set (fewer than 8 examples, too), rules or program, before any work;
        `resume` has blocks of another run; the processes of a run have other arguments.
      FileExistsError: another process works in `resume`.
      OSError: `resume` could not be written, as on a full disk; what was kept until then is there still.
    """
    start = time.perf_counter()
    key = jax.random.key(0) if key is None else key
    _check_params(params)
    _check_function(apply_fn)
    _check_solver(solver)
    _check_key(key)
    params = jax.tree.map(jnp.asarray, params)
    examples = data.materialize(calib_ds, inputs, 8.0 if memory_budget_gb is None else memory_budget_gb, MIN_EXAMPLES)
    problem = Problem(apply_fn, params, NO_PLAN, examples.arrays, examples.count, blocks, loss, memory_budget_gb, bfloat16_caches)
    solver, graph = solver or DEFAULT_SOLVER, _read(problem, isinstance(calib_ds, (list, tuple)))
    plan = make_plan(graph, weights, activations, preset)
    notes = [*partition(graph, blocks)[1], *_idle(solver, data_mesh(mesh)), *_constant(examples.arrays)]
    if progress:
        print(plan, *notes, sep="\n")
    sites = tuple((name, f) for name, f in plan.activations.items() if f is not None)
    guess = Quantized(params, {}, Program(apply_fn, sites, plan.whole_values))
    problem = dataclasses.replace(problem, plan=plan)
    if jax.process_count() > 1:
        check_same_everywhere(_made_of(problem, solver, key))
    with opened(resume, lambda: _made_of(problem, solver, key)) as journal, bar(progress) as show:
        if journal and progress:
            print(f"resume: {journal.kept} finished blocks are kept in {resume}")
        tell = print if progress else problem.tell
        problem = dataclasses.replace(problem, show=show, tell=tell, note=notes.append, journal=journal, mesh=data_mesh(mesh))
        guess, _ = solvers.nearest()(problem, guess, key)
        quantized, info = solver(problem, guess, key)
    return quantized.with_report(_report(quantized, plan, graph, info, notes, time.perf_counter() - start))


# docs/results.md has the tables that chose it. Published schedules have names: `solvers.adaround()`, `solvers.brecq()`.
DEFAULT_SOLVER = solvers.annealed()

MIN_EXAMPLES = 8  # one of them judges what is learned from the others
NO_PLAN = Plan({}, {}, False, None, (), 0, 0, ())


def _check_params(params: Any):
    if isinstance(params, Quantized) or any(map(is_qarray, jax.tree.leaves(params, is_leaf=is_qarray))):
        raise TypeError("params: they are quantized already. Pass float ones, or what quantized.dequantized() gives.")
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"params: {name} is a {type(leaf).__name__}, not an array. Pass arrays alone.")
        # NumPy, where it can read the leaf, has nothing to compile: XLA would have two programs for each shape
        own = np if jax.default_backend() == "cpu" and getattr(leaf, "is_fully_addressable", True) else jnp
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not own.isfinite(leaf).all():
            raise ValueError(f"params: {name} {tuple(leaf.shape)} has values that are not finite. Check the checkpoint.")


def _check_function(apply_fn: Callable):
    try:
        hash(apply_fn)
    except TypeError:
        kind = type(apply_fn).__name__
        raise TypeError(f"apply_fn is a {kind} that has no hash (a dataclass, perhaps). Write lambda params, inputs: net(params, inputs).") from None


def _check_solver(solver: Solver | None):
    if isinstance(solver, str):
        raise TypeError(f"solver={solver!r} is a name. Write solvers.by_name({solver!r}), or call one of `solvers`, as solvers.annealed().")
    if solver in [getattr(solvers, name) for name in solvers.__all__]:
        raise TypeError(f"solver={solver.__name__} is what makes a solver. Call it: solvers.{solver.__name__}().")


def _check_key(key: Any):
    """A typed key, or the two words of an old one."""
    if not hasattr(key, "dtype") or not (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32):
        raise TypeError(f"key={key!r} is a {type(key).__name__}. Write jax.random.key(0).")


def _idle(solver: Solver, mesh: Mesh | None) -> tuple[str, ...]:
    """A note where devices of the mesh have nothing to do: a chain of solvers may use them, and has none."""
    idle = mesh is not None and mesh.size > 1 and getattr(solver, "__module__", "") == solvers.distilled.__module__
    return ("mesh: solvers.distilled works on one device; the others are idle (docs/pods.md)",) if idle else ()


def _constant(inputs: Any) -> tuple[str, ...]:
    """A note where the calibration inputs tell nothing."""
    named = [(jax.tree_util.keystr(path), a) for path, a in jax.tree.flatten_with_path(inputs)[0] if a.size]
    real = [(name, a) for name, a in named if jnp.issubdtype(a.dtype, jnp.floating)] or named  # a mask may well be all True
    return tuple(
        f"calib_ds{name}: all values are {a.flat[0]}. Ranges and codes will be of no use on other inputs" for name, a in real if (a == a.flat[0]).all()
    )


def _read(problem: Problem, listed: bool) -> Graph:
    """The program at the calibration inputs' shapes; what apply_fn refuses is told with those shapes."""
    try:
        graph = problem.graph(min(problem.count, 32))
    except Exception as error:  # apply_fn is the user's, and may raise anything
        shapes = str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape[1:])}", problem.inputs)).replace("'", "")
        several = (
            "\nIt is called as apply_fn(params, inputs). Where a model takes several, write inputs=lambda e: e, for all of an element, and\n"
            "  apply_fn = lambda params, e: model.apply(params, e['image'], e['time'])"
        )
        hint = several if type(error) is TypeError else ""
        raise ValueError(f"apply_fn could not be read with calibration inputs of {shapes} each: {error}{hint}") from error
    outputs, larger = graph.heavy.intersection(graph.flat.outputs), graph.at_twice
    if listed and larger and all(graph.flat.types[i].shape == larger[i].shape for i in outputs):
        shapes = ", ".join(sorted({str(graph.flat.types[i].shape) for i in outputs}))
        raise ValueError(
            f"apply_fn's outputs have the shape {shapes} for every number of examples. If calib_ds is a list of single inputs, write np.stack(them): "
            "what it lists are batches. If apply_fn returns a mean over the batch, let it return what each example gives."
        )
    return graph


def _made_of(problem: Problem, solver: Solver, key: jax.Array) -> dict[str, str]:
    """Digests of all that the codes depend on. Devices are left out: a run may go on on others (docs/pods.md)."""
    inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct((min(problem.count, 32), *a.shape[1:]), a.dtype), problem.inputs)
    plan = problem.plan
    return {
        "params": digest(leaf_names(problem.params), problem.leaves),
        "apply_fn": digest(jax.jit(problem.apply_fn).lower(problem.params, inputs).as_text()),
        "calib_ds": digest(jax.tree.leaves(problem.inputs)),
        "formats": digest(plan.weights, plan.activations, plan.whole_values),
        "blocks": digest(problem.blocks),
        "solver": digest(solver),
        "loss": digest(problem.loss),
        "memory_budget_gb": digest(problem.memory_budget_gb if problem.bfloat16_caches else None),  # what is computed again is not rounded
        "bfloat16_caches": digest(problem.bfloat16_caches),
        "key": digest(key),
        "library": library(),
    }


def _report(quantized: Quantized, plan: Plan, graph: Graph, info: Info, notes, seconds: float) -> Report:
    tensors = []
    leaves = jax.tree.leaves(quantized.params, is_leaf=is_qarray)
    for (name, _), leaf, float_bits in zip(graph.leaves, leaves, graph.float_bits, strict=True):
        is_codes = isinstance(leaf, QArray)
        size = leaf.storage_bits if is_codes else leaf.size * leaf.dtype.itemsize * 8
        tensors.append(
            TensorRecord(
                name=name, shape=tuple(leaf.shape), format=describe(leaf.format) if is_codes else "float",
                bits=size / max(leaf.size, 1), size_bits=int(size), float_bits=float_bits,
            )  # fmt: skip
        )
    activations = []
    for name, grid in quantized.activations.items():
        scale, zero = (float(np.asarray(g).squeeze()) for g in grid)
        format = plan.activations[name]
        top = 2 ** activation_grid(format).bits - 1
        activations.append(ActivationRecord(name, describe(format), -zero * scale, (top - zero) * scale, zero > 0))
    records = tuple(
        BlockRecord(
            name=r["name"], ops=tuple(r["ops"]), error_before=r["error_before"], error_after=r["error_after"],
            kept=r["kept"], steps=r["steps"], wall_seconds=r["wall_seconds"], solver=r["phase"],
        )  # fmt: skip
        for r in info
    )
    return Report(
        blocks=records, tensors=tuple(tensors), activations=tuple(activations), skipped=plan.skipped, plan=str(plan),
        wall_seconds=seconds, compiled_programs=solvers.compiled_programs(), notes=tuple(dict.fromkeys(notes)),
    )  # fmt: skip
