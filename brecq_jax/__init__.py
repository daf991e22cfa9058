"""Post-training quantization for JAX: any model, a few hundred inputs, 8 to 2 bits.

    quantized = brecq_jax.quantize(params, apply_fn, calib_ds)
    logits = quantized(images)
"""

from brecq_jax import formats, mixed_precision, models, passes, report, solvers
from brecq_jax._experiment import Experiment
from brecq_jax._graph import Graph
from brecq_jax._model import Quantized
from brecq_jax._nnx import from_nnx
from brecq_jax._plan import Plan, make_plan
from brecq_jax._qarray import QArray
from brecq_jax._quantize import quantize
from brecq_jax._trace import trace
from brecq_jax.deploy import export, restore, save
from brecq_jax.mixed_precision import search

__all__ = [
    "Experiment", "Graph", "Plan", "QArray", "Quantized",
    "export", "formats", "from_nnx", "make_plan", "mixed_precision", "models", "passes", "quantize", "report", "restore", "save", "search", "solvers",
    "trace",
]  # fmt: skip
