"""What leaves the house: packed codes and tables, checkpoints, safetensors files, programs on integers, exported programs."""

from brecq_jax.deploy.checkpoint import restore, save
from brecq_jax.deploy.export import export, load_program
from brecq_jax.deploy.integer import Integer, to_integer
from brecq_jax.deploy.packing import pack, unpack
from brecq_jax.deploy.safetensors import restore_safetensors, save_safetensors
from brecq_jax.deploy.tables import PackedTable, embedding_bag, lookup, pack_table, packed
from brecq_jax.deploy.training import TrainingFolder

__all__ = [
    "Integer", "PackedTable", "TrainingFolder", "embedding_bag", "export", "load_program", "lookup", "pack", "pack_table", "packed", "restore", "restore_safetensors", "save",
    "save_safetensors", "to_integer", "unpack",
]  # fmt: skip
