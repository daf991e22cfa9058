"""What leaves the house: packed codes, checkpoints, safetensors files."""

from brecq_jax.deploy.checkpoint import restore, save
from brecq_jax.deploy.packing import pack, unpack
from brecq_jax.deploy.safetensors import restore_safetensors, save_safetensors

__all__ = ["pack", "restore", "restore_safetensors", "save", "save_safetensors", "unpack"]
