"""Pictures of a report."""

import pathlib
import sys

from matplotlib.figure import Figure

from brecq_jax.report._records import Report

LONGEST_NAME = 36  # characters under the axis; longer names lose their middle
INCH_PER_BLOCK = 0.32
PHASES_SPAN = 0.4  # of the width between two blocks


def block_errors(report: Report, path: str | pathlib.Path) -> pathlib.Path:
    """A picture of each block's held-out error before and after, on a logarithmic axis. Returns the path.

        block_errors(quantized.report, "errors.png")

    An error of zero, which that axis cannot show, lies on the bottom edge and is named so in the legend.
    """
    names = list(dict.fromkeys(b.name for b in report.blocks))
    figure = Figure(figsize=(max(6, INCH_PER_BLOCK * len(names) + 2), 5), layout="constrained")  # no pyplot: no display, no global state
    axes = figure.subplots()
    errors = [e for b in report.blocks for e in (b.error_before, b.error_after) if e > 0]
    floor = max(min(errors, default=1) / 10, sys.float_info.min)
    phases = list(dict.fromkeys(b.solver for b in report.blocks))
    for n, phase in enumerate(phases):
        blocks = [b for b in report.blocks if b.solver == phase]
        x = [names.index(b.name) + PHASES_SPAN * ((n + 0.5) / len(phases) - 0.5) for b in blocks]
        before, after = [max(b.error_before, floor) for b in blocks], [max(b.error_after, floor) for b in blocks]
        axes.vlines(x, after, before, color=f"C{n}", lw=1)
        axes.plot(x, before, "o", color=f"C{n}", mfc="white", label=f"{phase}: before")
        axes.plot(x, after, "o", color=f"C{n}", label=f"{phase}: after")
    axes.set_yscale("log")
    if any(0 in (b.error_before, b.error_after) for b in report.blocks):
        axes.set_ylim(bottom=floor)
        axes.plot([], [], " ", label="on the bottom edge: zero")
    axes.set_ylabel("held-out error of the block")
    axes.set_xticks(range(len(names)), list(map(_short, names)), rotation=90, fontsize=8, parse_math=False)
    axes.grid(axis="y", alpha=0.3)
    if report.blocks:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    else:
        axes.text(0.5, 0.5, "no block was reconstructed", ha="center", transform=axes.transAxes)
    path = pathlib.Path(path)
    figure.savefig(path, dpi=120, format="png")
    return path


def _short(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
