"""A picture of sensitivities."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from brecq_jax._plan import describe
from brecq_jax.mixed_precision.sensitivities import READS, Sensitivities

INCH_PER_DECISION = 0.32


def plot_sensitivities(sensitivities: Sensitivities, path: str | pathlib.Path) -> pathlib.Path:
    """Loss of each choice of each decision on a logarithmic axis, what is read hollow. Returns the path."""
    names = list(sensitivities.losses)
    figure = Figure(figsize=(max(6, INCH_PER_DECISION * len(names) + 2), 5), layout="constrained")
    axes = figure.subplots()
    for kind, choices in (("weights", sensitivities.weights), ("activations", sensitivities.activations)):
        rows = [n for n, name in enumerate(names) if name.startswith(READS) == (kind == "activations")]
        if not rows:  # the preset or rules may fix all of a kind
            continue
        values = np.array([sensitivities.losses[names[n]] for n in rows])
        for k, format in enumerate(choices):
            fill = "none" if kind == "activations" else f"C{k}"
            axes.plot(rows, values[:, k], "o", color=f"C{k}", mfc=fill, label=f"{kind}: {describe(format)}")
    axes.set_yscale("log")
    axes.set_ylabel("loss, all else float")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.legend(fontsize=8)
    path = pathlib.Path(path)
    figure.savefig(path, dpi=120, format="png")
    return path
