"""A quantized model as one StableHLO file, that a process with jax but without this library can call."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax import export as jax_export

from brecq_jax._model import Quantized
from brecq_jax.deploy.integer import Integer, packed_params, unpacked

PLATFORMS = ("cpu", "cuda", "tpu")


def export(quantized: Quantized | Integer, path: str | pathlib.Path, inputs: Any, *, platforms: Sequence[str] = PLATFORMS) -> None:
    """Write a self-contained program: packed weights inside, the batch size free.

        brecq_jax.export(quantized, "model.stablehlo", images)

    and where it runs, with jax alone:

        import jax.export
        logits = jax.export.deserialize(open("model.stablehlo", "rb").read()).call(images)

    Args:
      quantized: a `Quantized` computes in floats, as when it is called; what `deploy.to_integer` makes of it with integers.
      path: the file to write.
      inputs: an example of what the model takes, or its `jax.ShapeDtypeStruct`s. Axis 0 of every array is the batch.
      platforms: what it is lowered for: of "cpu", "cuda", "rocm", "tpu".

    Raises:
      FileExistsError: the path exists.
      TypeError: not a Quantized or an Integer.
      ValueError: an unknown platform, or an apply_fn that cannot be read without knowing the batch size.
    """
    path = pathlib.Path(path)
    if not isinstance(quantized, Quantized | Integer):
        raise TypeError(f"export: {type(quantized).__name__} is no quantized model. Pass what quantize() or deploy.to_integer() returned.")
    if path.exists():
        raise FileExistsError(f"export: {path} exists. Give a new path, or remove it.")
    if unknown := set(platforms) - {"cpu", "cuda", "rocm", "tpu"}:
        raise ValueError(f"export: platforms has {', '.join(sorted(unknown))}; write some of \"cpu\", \"cuda\", \"rocm\", \"tpu\".")
    (batch,) = jax_export.symbolic_shape("batch")
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), inputs)
    params = packed_params(quantized) if isinstance(quantized, Quantized) else quantized.params

    def program(inputs):
        held = unpacked(params) if isinstance(quantized, Quantized) else params
        return dataclasses.replace(quantized, params=held)(inputs)

    try:
        exported = jax_export.export(jax.jit(program), platforms=tuple(platforms))(types)
    except Exception as error:  # apply_fn is the user's, and may raise anything
        raise ValueError(f"export: apply_fn could not be read with a batch size that is not yet known: {error}") from error
    path.write_bytes(exported.serialize())
