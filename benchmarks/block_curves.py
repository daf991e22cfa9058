r"""The picture of `blocks.py`'s rows: held-out error of a block against wall seconds, a panel for each block and number of bits.

    python benchmarks/block_curves.py runs/blocks/rows.jsonl --out=docs/block_curves.png --solvers=refined,second_order,squared

A line joins the numbers of steps of one method; points are means over seeds. Ours lies where a second call would; the
faint line to the right of each point ends where the first call does, which traces and compiles. The official code lies at
the time of its reconstruction alone. "Tuned" takes the λ with the least held-out error at each number of steps, which
nobody can know beforehand, and counts the time of that one run.
"""

import argparse
import collections
import itertools
import json
import math
import pathlib
import statistics
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

PUBLISHED = 0.01  # λ of main_imagenet.py
PANEL = (2.5, 2.1)  # inches
LABELS = 1.6  # inches at the right
LINE_GAP = 0.09  # of a panel's height, between two labels
TICKS = (1, 2, 5)
# Okabe and Ito's colours, which the colour-blind tell apart; markers tell them apart in grey.
COLOURS = {"official tuned": "#D55E00", "official published": "#E69F00", "nearest": "#777777"}
OURS = (("#0072B2", "o"), ("#56B4E9", "D"), ("#009E73", "^"), ("#CC79A7", "v"))
OFFICIAL = {"official tuned": "s", "official published": "P"}
MARKERS = {"official published": 9}  # points; the others 5: where both lie on one place, both are seen


class Point(NamedTuple):
    seconds: float
    error: float
    first_call: float


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--solvers", help="which of ours, separated by commas, the one in the darkest blue first; all of them if left out")
    parser.add_argument("--names", default="", help="how to write them in the picture: refined=ours,squared=its method in JAX")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    names = dict(part.split("=") for part in args.names.split(",") if part)
    draw(rows, args.solvers.split(",") if args.solvers else None, names, args.out)


def draw(rows: list[dict], wanted: list[str] | None, names: dict[str, str], path: pathlib.Path):
    blocks, bits = (list(dict.fromkeys(r[key] for r in rows)) for key in ("block", "bits"))
    bits.sort(reverse=True)
    families = [f for f in dict.fromkeys(r["solver"].partition(":")[0] for r in rows) if f not in ("nearest", "official")]
    families = [f for f in wanted or families if f in families]
    size = PANEL[0] * len(bits) + LABELS, PANEL[1] * len(blocks) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(blocks), len(bits), squeeze=False, sharex=True)
    for block, line in zip(blocks, panels, strict=True):
        for count, axes in zip(bits, line, strict=True):
            found = curves([r for r in rows if (r["block"], r["bits"]) == (block, count)], families)
            panel(axes, found, families, names, labelled=axes is line[-1])
            axes.set_title(f"{block}, {count} bits", fontsize=9, loc="left")
        line[0].set_ylabel("held-out error", fontsize=9)
    figure.supxlabel("wall seconds; faint: ours at its first call, which compiles", fontsize=9)
    figure.align_ylabels()
    figure.savefig(path, dpi=150)


def curves(rows: list[dict], families: list[str]) -> dict[str, list[Point]]:
    """The points of each method, by seconds."""
    seeds = collections.defaultdict(list)
    for row in rows:
        seeds[row["solver"]].append(row)
    mean = {s: _mean(found) for s, found in seeds.items()}
    found = {f: [p for s, p in mean.items() if s.partition(":")[0] == f] for f in families}
    official = collections.defaultdict(dict)
    for solver, point in mean.items():
        if solver.startswith("official:"):
            _, steps, weight = solver.split(":")
            official[steps][float(weight)] = point
    found["official published"] = [by_weight[PUBLISHED] for by_weight in official.values() if PUBLISHED in by_weight]
    if any(len(by_weight) > 1 for by_weight in official.values()):
        found["official tuned"] = [min(by_weight.values(), key=lambda p: p.error) for by_weight in official.values()]
    found["nearest"] = [mean["nearest"]] if "nearest" in mean else []
    return {name: sorted(points) for name, points in found.items() if points}


def _mean(rows: list[dict]) -> Point:
    seconds, error = (statistics.mean(r[key] for r in rows) for key in ("seconds", "error"))
    first = [r["cold_seconds"] for r in rows if "cold_seconds" in r]
    return Point(seconds, error, statistics.mean(first) if first else seconds)


def panel(axes: Axes, found: dict[str, list[Point]], families: list[str], names: dict[str, str], labelled: bool):
    axes.set(xscale="log", yscale="log")
    labels = []
    for name, points in found.items():
        colour, marker = (COLOURS[name], OFFICIAL.get(name)) if name in COLOURS else OURS[families.index(name) % len(OURS)]
        seconds, errors, first_calls = zip(*points, strict=True)
        if name == "nearest":
            axes.axhline(errors[0], color=colour, lw=1, ls="--")
        else:
            axes.hlines(errors, seconds, first_calls, color=colour, lw=1, alpha=0.4)
            axes.plot(first_calls, errors, color=colour, marker="|", ms=6, ls="", alpha=0.4)
            axes.plot(seconds, errors, color=colour, marker=marker, ms=MARKERS.get(name, 5), lw=1.8)
        labels.append((errors[-1], names.get(name, name), colour))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=TICKS, numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if labelled:
        write_labels(axes, labels)


def write_labels(axes: Axes, labels: list[tuple[float, str, str]]):
    """Names at the right, each as high as its line ends, and no two on top of each other."""
    low, high = map(math.log, axes.get_ylim())
    heights = [(math.log(error) - low) / (high - low) for error, _, _ in labels]
    order = sorted(range(len(labels)), key=heights.__getitem__)
    for below, above in itertools.pairwise(order):
        heights[above] = max(heights[above], heights[below] + LINE_GAP)
    ceiling = 1.0
    for n in reversed(order):  # what was pushed out at the top comes down again
        heights[n] = min(heights[n], ceiling)
        ceiling = heights[n] - LINE_GAP
    for height, (_, name, colour) in zip(heights, labels, strict=True):
        axes.text(1.03, height, name, color=colour, fontsize=9, va="center", transform=axes.transAxes)


if __name__ == "__main__":
    main()
