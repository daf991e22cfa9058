"""A report as one page that needs nothing else."""

import base64
import html
import pathlib
import tempfile

from brecq_jax.report._records import Report, kept_note
from brecq_jax.report.plots import block_errors

STYLE = (
    "body{font:14px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:2px 10px;text-align:left}pre,img{max-width:100%;overflow:auto}"
)


def write_html(report: Report, path: str | pathlib.Path) -> pathlib.Path:
    """Write the page: sizes, notes, a picture of block errors, tables, the plan. Returns the path.

        write_html(quantized.report, "report.html")
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = base64.b64encode(block_errors(report, pathlib.Path(folder) / "errors.png").read_bytes()).decode()
    blocks = _table(
        ("block", "phase", "before", "after", "steps", "seconds", "ops", ""),
        [
            (b.name, b.solver, f"{b.error_before:.5g}", f"{b.error_after:.5g}", b.steps, f"{b.wall_seconds:.1f}", ", ".join(b.ops), kept_note(b))
            for b in report.blocks
        ],
    )
    tensors = _table(
        ("parameter", "shape", "format", "bits", ""),
        [(t.name, "×".join(map(str, t.shape)), t.format, f"{t.bits:.2f}", t.note) for t in report.tensors],
    )
    activations = _table(
        ("read first by", "format", "low", "high", "below zero"),
        [(a.name, a.format, f"{a.low:.4g}", f"{a.high:.4g}", "yes" if a.signed else "no") for a in report.activations],
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    path = pathlib.Path(path)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Quantization report</title><style>{STYLE}</style>'
        f"<h1>Quantization report</h1><p>{html.escape(report.sizes())}; {report.wall_seconds:.0f} s, "
        f"{report.compiled_programs} compiled programs.</p>{f'<ul>{notes}</ul>' if notes else ''}"
        f'<img alt="error of each block before and after" src="data:image/png;base64,{picture}">'
        f"<h2>Blocks</h2>{blocks}<h2>Parameters</h2>{tensors}<h2>Activations</h2>{activations}"
        f"<h2>Kept float</h2>{_table(('what', 'why'), report.skipped)}"
        f"<h2>Plan</h2><pre>{html.escape(report.plan)}</pre></html>",
        encoding="utf-8",
    )
    return path


def _table(titles, rows) -> str:
    def cells(tag, row):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) + "</tr>"

    return f"<table>{cells('th', titles)}{''.join(cells('td', r) for r in rows)}</table>" if rows else "<p>None.</p>"
