"""What a config builds: a model, its data, and how to quantize it; and how the command line runs it."""

import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from brecq_jax import report
from brecq_jax._journal import digest, library, locked, remembered, write_whole
from brecq_jax._plan import Rules
from brecq_jax._quantize import quantize
from brecq_jax.deploy import save
from brecq_jax.formats import Uniform
from brecq_jax.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run. `evaluate(float_apply, quantized_apply)` gives figures by name; both take inputs and return outputs."""

    params: Any
    apply_fn: Callable
    calib_ds: Any
    evaluate: Callable[[Callable, Callable], dict[str, float]]
    weights: Rules = Uniform(4)
    activations: Rules = Uniform(8)
    preset: str | None = None
    solver: Solver | None = None
    blocks: str | Sequence[str] = "block"
    memory_budget_gb: float | None = None
    bfloat16_caches: bool = False
    seed: int = 0


def execute(
    experiment: Experiment, workdir: str | pathlib.Path, settings: dict[str, Any], progress: bool = True, mesh: Mesh | None = None,
    float_outputs: str | pathlib.Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Quantize, evaluate and save. Writes model/, result.json, report.html and block_errors.png into a folder, by the first process alone.

    Given the folder of a run that was interrupted, it goes on where that stopped; unfinished/ keeps the blocks until result.json is there.
    What the float model gives while it is scored is kept in `float_outputs`, and read from there by other runs of the same model and inputs.

    Raises:
      FileExistsError: the folder holds a result already, or a model that is not an interrupted run's; another process works in it.
      ValueError: the folder holds an interrupted run of something else.
    """
    workdir = pathlib.Path(workdir)
    with locked(workdir):
        unfinished, model, result_file = workdir / "unfinished", workdir / "model", workdir / "result.json"
        if result_file.exists() or model.exists() and not unfinished.exists():
            raise FileExistsError(f"workdir: {result_file if result_file.exists() else model} exists. Give a new --workdir.")
        start = time.perf_counter()
        quantized = quantize(
            experiment.params, experiment.apply_fn, experiment.calib_ds,
            weights=experiment.weights, activations=experiment.activations, preset=experiment.preset,
            solver=experiment.solver, blocks=experiment.blocks, memory_budget_gb=experiment.memory_budget_gb,
            bfloat16_caches=experiment.bfloat16_caches, resume=unfinished, mesh=mesh, key=jax.random.key(experiment.seed), progress=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        figures = experiment.evaluate(_float_apply(experiment, float_outputs), quantized)
        result = {
            "settings": settings,
            "figures": figures,
            "quantize_seconds": round(seconds, 2),
            "compiled_programs": quantized.report.compiled_programs,
            "size_mb": quantized.report.size_bits / 8e6,
            "float_mb": quantized.report.float_bits / 8e6,
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "library": library(),
        }
        if jax.process_index() == 0:
            shutil.rmtree(model, ignore_errors=True)  # half of one, if the run was interrupted here
            save(model, quantized)
            report.write_html(quantized.report, workdir / "report.html")
            report.block_errors(quantized.report, workdir / "block_errors.png")
            # Whole or not there: a sweep takes a run with a result.json for finished.
            write_whole(result_file, json.dumps(result, indent=1).encode())
            shutil.rmtree(unfinished)
    return result


def _float_apply(experiment: Experiment, folder: str | pathlib.Path | None) -> Callable:
    """The float model, compiled; with a folder, it is not run on inputs whose outputs are there."""
    apply = jax.jit(lambda x: experiment.apply_fn(experiment.params, x))
    if folder is None:
        return apply
    model = digest(jax.__version__, jax.devices()[0].device_kind, jax.tree.leaves(experiment.params))

    @functools.cache
    def program(structure, types):
        """(outputs' types, digest of the program) for inputs of these types."""
        lowered = jax.jit(experiment.apply_fn).lower(experiment.params, jax.tree.unflatten(structure, types))
        return lowered.out_info, digest(lowered.as_text())

    def call(inputs):
        leaves, structure = jax.tree.flatten(inputs)
        if any(isinstance(a, jax.core.Tracer) for a in leaves):
            return apply(inputs)
        types, text = program(structure, tuple(jax.eval_shape(lambda *x: x, *leaves)))
        return remembered(pathlib.Path(folder) / digest(model, text, leaves), types, lambda: apply(inputs))

    return call
