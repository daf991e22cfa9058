"""How pixels become what a network takes."""

import dataclasses

import jax
import jax.numpy as jnp

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """A central square of the image, resized to `size`, then (pixel − mean) / std.

    `crop` is the fraction of the short side that the square takes. `mean` and `std`: by colour, in units of 0 to 255.
    """

    size: int
    crop: float
    interpolation: str  # "bilinear" or "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def normalize(self, pixels: jax.Array) -> jax.Array:
        """uint8 pixels (n, h, w, 3) to float32.

        Raises:
          TypeError: pixels of another type, which may have been scaled already.
        """
        if pixels.dtype != jnp.uint8:
            raise TypeError(f"normalize: the pixels are {pixels.dtype}: give uint8 ones, 0 to 255, as read from the image.")
        return (jnp.asarray(pixels, jnp.float32) - jnp.array(self.mean, jnp.float32)) / jnp.array(self.std, jnp.float32)
