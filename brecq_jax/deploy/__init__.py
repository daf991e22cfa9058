"""What leaves the house: packed codes, checkpoints, safetensors files, programs on integers, exported programs."""

from brecq_jax.deploy.checkpoint import restore, save
from brecq_jax.deploy.export import export
from brecq_jax.deploy.integer import Integer, to_integer
from brecq_jax.deploy.packing import pack, unpack
from brecq_jax.deploy.safetensors import restore_safetensors, save_safetensors

__all__ = ["Integer", "export", "pack", "restore", "restore_safetensors", "save", "save_safetensors", "to_integer", "unpack"]
