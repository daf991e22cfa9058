"""What people look at: plain records, tables, a picture, a page. Reads records, calls nothing."""

from brecq_jax.report._records import ActivationRecord, BlockRecord, Report, TensorRecord
from brecq_jax.report.html import write_html
from brecq_jax.report.plots import block_errors

__all__ = ["ActivationRecord", "BlockRecord", "Report", "TensorRecord", "block_errors", "write_html"]
