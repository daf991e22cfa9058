"""What leaves the house: checkpoints."""

from brecq_jax.deploy.checkpoint import restore, save

__all__ = ["restore", "save"]
