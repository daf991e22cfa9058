"""Pictures of a report."""

import pathlib

from matplotlib.figure import Figure

from brecq_jax.report._records import Report


def block_errors(report: Report, path: str | pathlib.Path) -> pathlib.Path:
    """A picture of each block's held-out error before and after, on a logarithmic axis."""
    figure = Figure(figsize=(max(6, 0.32 * len(report.blocks) + 2), 4), layout="constrained")
    axes = figure.subplots()
    phases = list(dict.fromkeys(b.solver for b in report.blocks))
    names = list(dict.fromkeys(b.name for b in report.blocks))
    for phase, colour in zip(phases, ("C0", "C1", "C2", "C3"), strict=False):
        blocks = [b for b in report.blocks if b.solver == phase]
        x = [names.index(b.name) for b in blocks]
        axes.plot(x, [b.error_before for b in blocks], "o", color=colour, mfc="none", label=f"{phase}: before")
        axes.plot(x, [b.error_after for b in blocks], "o", color=colour, label=f"{phase}: after")
        axes.vlines(x, [b.error_after for b in blocks], [b.error_before for b in blocks], color=colour, lw=1)
    axes.set_yscale("log")
    axes.set_ylabel("held-out error of the block")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.grid(axis="y", alpha=0.3)
    if report.blocks:
        axes.legend(fontsize=8)
    path = pathlib.Path(path)
    figure.savefig(path, dpi=120)
    return path
