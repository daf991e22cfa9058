"""What leaves the house: checkpoints, packed tables."""

from brecq_jax.deploy.checkpoint import restore, save
from brecq_jax.deploy.tables import PackedTable, embedding_bag, lookup, pack_table, packed

__all__ = ["PackedTable", "embedding_bag", "lookup", "pack_table", "packed", "restore", "save"]
