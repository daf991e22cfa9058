"""PyTorch tensors into Flax variables: one table for all models."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# What a tensor is called there, by its Flax collection and name, and how its axes go.
LEAVES = {
    ("params", "kernel", 4): ("weight", (2, 3, 1, 0)),  # OIHW -> HWIO, grouped and depthwise too
    ("params", "kernel", 2): ("weight", (1, 0)),
    ("params", "bias", 1): ("bias", (0,)),
    ("params", "scale", 1): ("weight", (0,)),
    ("batch_stats", "mean", 1): ("running_mean", (0,)),
    ("batch_stats", "var", 1): ("running_var", (0,)),
}
IGNORED = "num_batches_tracked"


def from_torch(tensors: Mapping[str, np.ndarray], abstract: Any, rename: Callable[[str], str]) -> Any:
    """Flax variables out of PyTorch tensors.

    Args:
      abstract: the variables' shapes, as `jax.eval_shape(model.init, …)` gives.
      rename: Flax module path (`blocks_0/expand`) -> PyTorch module path (`_blocks.0._expand_conv`).

    Raises:
      ValueError: the tensors that are missing, unexpected or of another shape, all of them.
    """
    unused = {n for n in tensors if not n.endswith(IGNORED)}
    missing, misshapen = [], []

    def take(path, leaf):
        collection, *modules, name = (k.key for k in path)
        there, axes = LEAVES[collection, name, len(leaf.shape)]
        source = f"{rename('/'.join(modules))}.{there}"
        if source not in tensors:
            missing.append(source)
            return leaf
        unused.discard(source)
        value = np.asarray(tensors[source], np.float32).transpose(axes)
        if value.shape != leaf.shape:
            misshapen.append(f"{source} {tensors[source].shape}, expected {leaf.shape} after {axes}")
        return value

    variables = jax.tree.map_with_path(take, abstract)
    if missing or unused or misshapen:
        parts = (("missing", missing), ("unexpected", sorted(unused)), ("of another shape", misshapen))
        raise ValueError("the checkpoint is of another model. " + "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names))
    return variables
