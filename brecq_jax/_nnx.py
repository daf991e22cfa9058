"""Flax NNX modules as (params, apply_fn)."""

from collections.abc import Callable
from typing import Any


def from_nnx(module: Any) -> tuple[Any, Callable]:
    """`params, apply_fn = from_nnx(module)`: an NNX module, in inference mode, as a function of its state.

        params, apply_fn = brecq_jax.from_nnx(module)
        quantized = brecq_jax.quantize(params, apply_fn, calib_ds)

    The module itself is not changed. `params` is its state (batch statistics too, random keys not), an
    `nnx.State`. A module that draws random numbers draws the same ones in each call.

    Raises:
      TypeError: not an NNX module.
    """
    from flax import nnx  # noqa: PLC0415 - flax is at the edge: only who has an NNX module needs it

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"from_nnx: {type(module).__name__} is not an nnx.Module. For a Linen module pass `variables` and "
            "`module.apply` to quantize; for a function, its params and itself."
        )
    evaluating = nnx.clone(module)
    evaluating.eval()
    graphdef, random, params = nnx.split(evaluating, nnx.RngState, ...)

    def apply_fn(params: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, random, params, copy=True)(*inputs)  # a call counts its draws in variables of its own

    return params, apply_fn
