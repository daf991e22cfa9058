r"""Bytes on disk of quantized networks against what their codes and grids need, as a Markdown table.

    python benchmarks/sizes.py [--resnet20=resnet20-12fca82f.th]

EfficientNet-Lite0 with ImageNet weights, ResNet-20 (random without `--resnet20`), and a BERT encoder of MiniLM's sizes,
whose weights are random normal. Weights are rounded to the nearest point, activations are 8 bits; neither changes a size.
*needed*: `report.size_bits`, that is `storage_bits` of every quantized parameter and the bits of every other one. *orbax*:
the same codes as a tree of orbax's narrowest integers that hold them (int8, int4, int2), scales and zero points beside them,
saved by `StandardCheckpointer` as it comes (it compresses). *safetensors int8*: the same with a byte for each code, since
these files know no narrower type; counted from header and tensors. Everything is in bytes.
"""

import argparse
import json
import logging
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import brecq_jax
from brecq_jax import models, solvers
from brecq_jax.deploy import save_safetensors
from brecq_jax.formats import MinMax, Uniform

BITS = (8, 4, 3, 2)
COLUMNS = ("network", "weights", "needed", "`save`", "", "`save_safetensors`", "", "orbax", "", "safetensors int8", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resnet20", type=pathlib.Path)
    parser.add_argument("--bits", type=int, nargs="*", default=BITS)
    known = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    print("|".join(["", *COLUMNS, ""]), "|".join(["", *("---" for _ in COLUMNS), ""]), sep="\n")
    for name, model, variables, inputs in networks(known.resnet20):
        print_row(name, "float32", 4 * sum(x.size for x in jax.tree.leaves(variables)), orbax=orbax_bytes(variables))
        for bits in known.bits:
            quantized = brecq_jax.quantize(
                variables, model.apply, inputs, weights=Uniform(bits, ranges=MinMax()), solver=solvers.nearest(), progress=False
            )
            codes = integers(quantized, bits)
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder)
                brecq_jax.save(path / "model", quantized)
                save_safetensors(path / "model.safetensors", quantized)
                ours, file = folder_bytes(path / "model"), (path / "model.safetensors").stat().st_size
            needed = math.ceil(quantized.report.size_bits / 8)
            print_row(name, f"W{bits}", needed, ours, file, orbax_bytes(codes), safetensors_bytes(codes))


def networks(resnet20: pathlib.Path | None):
    """(name, model, variables, calibration inputs)."""
    key_init, key_inputs, key_bert = jax.random.split(jax.random.key(0), 3)
    yield "EfficientNet-Lite0", *models.load_efficientnet_lite0(), np.asarray(jax.random.normal(key_inputs, (8, 64, 64, 3)))
    images = np.asarray(jax.random.normal(key_inputs, (8, 32, 32, 3)))
    if resnet20 is None:
        model = models.ResNetCifar()
        yield "ResNet-20", model, random_like(model.init(key_init, images), key_init), images
    else:
        yield "ResNet-20", *models.load_resnet_cifar(resnet20), images
    bert = models.Bert(vocabulary=30522, positions=512, features=384, depth=6, heads=12, mlp_features=1536)
    ids = np.zeros((8, 8), np.int32)
    yield "BERT of MiniLM's sizes", bert, random_like(bert.init(key_bert, ids), key_bert), ids


def random_like(variables, key):
    """Normal values for all parameters, also where a fresh network has zeros, which a compressor would shrink."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [jnp.abs(jax.random.normal(k, x.shape)) + 0.1 if x.ndim == 1 else jax.random.normal(k, x.shape)
                                     for k, x in zip(keys, leaves, strict=True)])  # fmt: skip


def integers(quantized, bits: int):
    """The parameters as {"qvalue", "scale", "zero_point"} in the narrowest signed integers that jax has."""
    dtype = next(d for d in (jnp.int2, jnp.int4, jnp.int8) if jnp.iinfo(d).bits >= bits)
    half = 2 ** (bits - 1)

    def entry(leaf):
        if not isinstance(leaf, brecq_jax.QArray):
            return leaf
        qvalue, zero = (jnp.asarray(np.asarray(x).astype(np.int16) - half).astype(dtype) for x in (leaf.codes, leaf.grid.zero_point))
        return {"qvalue": qvalue, "scale": leaf.grid.scale, "zero_point": zero}

    return jax.tree.map(entry, quantized.params, is_leaf=lambda x: isinstance(x, brecq_jax.QArray))


def orbax_bytes(tree) -> int:
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "tree", tree)
        checkpointer.wait_until_finished()
        return folder_bytes(pathlib.Path(folder) / "tree")


def safetensors_bytes(tree) -> int:
    """Length, header and tensors of a file with a byte for every code."""
    header, end = {}, 0
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        first, end = end, end + leaf.size * np.asarray(leaf).dtype.itemsize  # NumPy holds an int4 in a byte
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        header[name] = {"dtype": "F32" if leaf.dtype == jnp.float32 else "I8", "shape": leaf.shape, "data_offsets": [first, end]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end


def folder_bytes(path: pathlib.Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def print_row(name: str, weights: str, needed: int, ours=None, file=None, orbax=None, int8=None):
    cells = [name, weights, f"{needed:,}"]
    for size in (ours, file, orbax, int8):
        cells += ["", ""] if size is None else [f"{size:,}", f"{100 * (size / needed - 1):+.1f} %"]
    print("|".join(["", *cells, ""]), flush=True)


if __name__ == "__main__":
    main()
