"""PyTorch tensors into Flax variables: one table for all models, and one list of renamings for each source's names."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# What a tensor is called there, by its Flax collection and name, and how its axes go.
LEAVES = {
    ("params", "kernel", 4): ("weight", (2, 3, 1, 0)),  # OIHW -> HWIO, grouped and depthwise too
    ("params", "kernel", 2): ("weight", (1, 0)),
    ("params", "bias", 1): ("bias", (0,)),
    ("params", "scale", 1): ("weight", (0,)),
    ("params", "class_token", 3): ("class_token", (0, 1, 2)),
    ("params", "position", 3): ("position", (0, 1, 2)),
    ("params", "embedding", 2): ("weight", (0, 1)),
    ("batch_stats", "mean", 1): ("running_mean", (0,)),
    ("batch_stats", "var", 1): ("running_var", (0,)),
}
# BERT's pooler feeds a classifier that was trained with it; embeddings are made without.
IGNORED = ("num_batches_tracked", "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")

# (regular expression, replacement) pairs, applied in order to a path such as `layer1_0/conv1/weight`: the Flax modules,
# then what the tensor is called there. The slashes that are left become dots.
Naming = Sequence[tuple[str, str]]


def from_torch(tensors: Mapping[str, np.ndarray], abstract: Any, namings: Mapping[str, Naming], where: str, classes: int | None = None) -> Any:
    """Flax variables out of PyTorch tensors.

    Args:
      abstract: the variables' shapes, as `jax.eval_shape(model.init, …)` gives.
      namings: by source. The one with the most names in common with `tensors` is taken.
      where: what to call the tensors in errors.
      classes: how many logits the model has, if that is a field `classes` of it.

    Raises:
      ValueError: the tensors that are missing, unexpected or of another shape, all of them.
    """
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    found = {n for n in tensors if not n.endswith(IGNORED)}
    source = source_of(tensors, abstract, namings)
    names = _names(leaves, namings[source])
    values, misshapen = [], []
    for name, (path, leaf) in zip(names, leaves, strict=True):
        if name in tensors:
            axes = _place(path, leaf)[1]
            there = tuple(leaf.shape[axes.index(i)] for i in range(len(axes)))
            if tensors[name].shape == there:
                values.append(np.asarray(tensors[name], np.float32).transpose(axes))
            else:
                misshapen.append(f"{name} {tensors[name].shape}, expected {there}")
    missing = [n for n in names if n not in tensors]
    unexpected = sorted(found.difference(names))
    if missing or unexpected or misshapen:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        told = "; ".join(f"{what}: {', '.join(wrong)}" for what, wrong in parts if wrong)
        hint = _other_classes(names, leaves, tensors, classes) if misshapen and not (missing or unexpected) else ""
        raise ValueError(f"{where}: the checkpoint is of another model. By the names of {source}: {told}{hint}")
    return jax.tree.unflatten(treedef, values)


def source_of(tensors: Mapping[str, np.ndarray], abstract: Any, namings: Mapping[str, Naming]) -> str:
    """Whose names the tensors have: the source with the most in common; the first of several."""
    leaves = jax.tree.leaves_with_path(abstract)
    return max(namings, key=lambda source: len(tensors.keys() & set(_names(leaves, namings[source]))))


def _names(leaves, naming: Naming) -> list[str]:
    """What a source calls each of our leaves."""
    return [_name(path, leaf, naming) for path, leaf in leaves]


def _other_classes(names: Sequence[str], leaves, tensors: Mapping[str, np.ndarray], classes: int | None) -> str:
    """What to write if the checkpoint differs by its number of classes alone: no tensor but one layer's has other outputs, and no other inputs."""
    layers, counts = set(), set()
    for name, (path, leaf) in zip(names, leaves, strict=True):
        axes = _place(path, leaf)[1]
        (count, *there), (outputs, *here) = (tensors[name].shape or (0,)), (leaf.shape[axes.index(i)] for i in range(len(axes)))
        if there != here or count != outputs and outputs != classes:
            return ""
        if count != outputs:
            layers.add(name.rpartition(".")[0])
            counts.add(count)
    return f". It has other classes: write classes={counts.pop()}." if len(layers) == len(counts) == 1 else ""


def _place(path, leaf) -> tuple[str, tuple[int, ...]]:
    return LEAVES[path[0].key, path[-1].key, len(leaf.shape)]


def _name(path, leaf, naming: Naming) -> str:
    name = "/".join([*(k.key for k in path[1:-1]), _place(path, leaf)[0]])
    for pattern, replacement in naming:
        name = re.sub(pattern, replacement, name)
    return name.replace("/", ".")


def by_stage(prefix: str, first: int, repeats: Sequence[int]) -> list[list[str]]:
    """Names of blocks that are counted in one row, from `first`, by stage."""
    ends = itertools.accumulate(repeats, initial=first)
    return [[f"{prefix}_{n}" for n in range(start, stop)] for start, stop in itertools.pairwise(ends)]


def timm_names(stages: Sequence[Sequence[str]]) -> Naming:
    """timm's names of a net of inverted residuals. `stages`: the blocks' Flax names; those of the first do not expand."""
    ends = [("^stem/", "conv_stem."), ("^stem_bn/", "bn1."), ("^head/", "conv_head."), ("^head_bn/", "bn2.")]
    numbers = [(f"^{block}/", f"blocks.{s}.{i}.") for s, stage in enumerate(stages) for i, block in enumerate(stage)]
    plain = {"depthwise": "conv_dw", "depthwise_bn": "bn1", "project": "conv_pw", "project_bn": "bn2"}
    full = {
        "expand": "conv_pw", "expand_bn": "bn1", "depthwise": "conv_dw", "depthwise_bn": "bn2",
        "project": "conv_pwl", "project_bn": "bn3",
    }  # fmt: skip
    first = [(rf"^(blocks\.0\.\d+\.){here}/", rf"\1{there}.") for here, there in plain.items()]
    others = [(rf"^(blocks\.\d+\.\d+\.){here}/", rf"\1{there}.") for here, there in full.items()]
    return (*ends, *numbers, *first, *others)
