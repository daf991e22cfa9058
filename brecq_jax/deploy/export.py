"""A quantized model as one StableHLO file, that a process with jax but without this library can call.

The file is what `jax.export` serializes, and after it 32 bytes, the SHA-256 of it. `jax.export.deserialize` takes the whole file
as it is, since it reads no further than its own end, and checks nothing: flipped bits give wrong numbers or end the process.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax import export as jax_export

from brecq_jax._model import Quantized
from brecq_jax.deploy.integer import Integer, packed_params, unpacked

PLATFORMS = ("cpu", "cuda", "tpu")
SEAL = hashlib.sha256().digest_size


def export(quantized: Quantized | Integer, path: str | pathlib.Path, inputs: Any, *, platforms: Sequence[str] = PLATFORMS) -> None:
    """Write a self-contained program: packed weights inside, the batch size free.

        brecq_jax.export(quantized, "model.stablehlo", images)

    and where it runs, with jax alone (`load_program` does the same):

        import hashlib, jax.export
        file = open("model.stablehlo", "rb").read()
        assert hashlib.sha256(file[:-32]).digest() == file[-32:]
        logits = jax.export.deserialize(file).call(images)

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
    whole = bytes(exported.serialize())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole + hashlib.sha256(whole).digest())


def load_program(path: str | pathlib.Path) -> jax_export.Exported:
    """Read what `export` wrote, if it is what `export` wrote.

        logits = brecq_jax.deploy.load_program("model.stablehlo").call(images)

    A checksum guards against accidents, not against people: a program runs, so read those alone of people whom you trust.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged or truncated file, one that `export` did not write, or a program that this jax is too old or too new for.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_program: {path}: no such file.")
    whole = path.read_bytes()
    if hashlib.sha256(whole[:-SEAL]).digest() != whole[-SEAL:]:
        raise ValueError(f"load_program: {path} is damaged, or no file of `export`: its checksum differs. Export the model again.")
    exported = jax_export.deserialize(bytearray(whole[:-SEAL]))
    oldest, newest = jax_export.minimum_supported_calling_convention_version, jax_export.maximum_supported_calling_convention_version
    if not oldest <= exported.calling_convention_version <= newest:
        raise ValueError(
            f"load_program: {path} has calling convention {exported.calling_convention_version}, and jax {jax.__version__} reads "
            f"{oldest} to {newest}. Export the model again, or take the jax that wrote it."
        )
    return exported
