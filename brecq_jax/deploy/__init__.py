"""What leaves the house: checkpoints, programs on integers, exported programs."""

from brecq_jax.deploy.checkpoint import restore, save
from brecq_jax.deploy.export import export
from brecq_jax.deploy.integer import Integer, to_integer

__all__ = ["Integer", "export", "restore", "save", "to_integer"]
