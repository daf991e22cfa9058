r"""Single blocks of a model, solved by ours and by BRECQ's official PyTorch code: seconds, and error on inputs held out.

    python benchmarks/blocks.py --config=configs/resnet20_cifar10.py --config.weights=… --config.data=… --workdir=runs/blocks \
        --blocks=layer1_1,layer3_1 --bits=4,3,2 --solvers=nearest,second_order,squared:500,squared:2000,refined:150,refined:600 \
        --reference=BRECQ --reference-python=python --reference-steps=500,2000 --reference-regularizers=0.01,0.1

A block's inputs are what the float blocks before it make of the calibration set. Every eighth example is held out; the
others, cut to full batches of 32, are all that either side gets. (Ours judges by an eighth of its own, and does not learn
from it.) The error is that of the rounded block in full float32: squared difference to the float block, summed over
channels, averaged over images and positions. A solver is `NAME` or `NAME:STEPS`; the last one divides the others.

Ours is timed around the whole of `quantize`: `cold_seconds` with tracing and compiling, in emptied caches, then `seconds`
of the same call again. The official code is timed around `block_reconstruction`, in a process of its own that takes turns
with ours and never runs beside it; its search for step sizes is `scale_seconds`. Rows go to rows.jsonl in the workdir,
and a row that is there is not run again. `benchmarks/block_curves.py` draws them.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from single_block import Part, parts

import brecq_jax
from brecq_jax import solvers
from brecq_jax.__main__ import load_config
from brecq_jax.formats import Uniform

REFERENCE = pathlib.Path(__file__).with_name("reference_blocks.py")
OFFICIAL = "official"
DETERMINISTIC = ("nearest", "second_order")  # one seed tells all
KEY = ("block", "bits", "solver", "seed")  # of a row


def main():
    args, overrides = arguments()
    args.workdir.mkdir(parents=True, exist_ok=True)
    known = {tuple(row[k] for k in KEY): row for row in read_rows(args.workdir)}
    experiment = load_config(args.config, overrides).build()
    for part, bits in itertools.product(parts(experiment, args.blocks), args.bits):
        for pairs in turns(args):
            todo = [(name, seed) for name, seed in pairs if (part.name, bits, name, seed) not in known]
            work = run_official if pairs[0][0].startswith(OFFICIAL) else run_ours
            for result in work(args, part, bits, todo) if todo else ():
                row = {"block": part.name, "bits": bits, **result}
                known[tuple(row[k] for k in KEY)] = row
                with (args.workdir / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print_tables(known.values(), args.solvers[-1])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--blocks", required=True, type=several(str))
    parser.add_argument("--bits", type=several(int), default=[4])
    parser.add_argument("--solvers", type=several(str), default=["nearest", "second_order", "refined"])
    parser.add_argument("--seeds", type=several(int), default=[0])
    parser.add_argument("--reference", help="a checkout of the official code; without it only ours is run")
    parser.add_argument("--reference-python", default="python", help="an interpreter that has torch")
    parser.add_argument("--reference-steps", type=several(int), default=[500, 2000])
    parser.add_argument("--reference-regularizers", type=several(float), default=[0.01], help="λ of the rounding penalty; 0.01 is published")
    parser.add_argument("--reference-device", default="cpu")
    args, overrides = parser.parse_known_args()
    for text in args.solvers:
        solver(text)  # a wrong name is refused before any work
    return args, overrides


def several(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def solver(text: str) -> solvers.Solver:
    """`refined:150` -> refined of 150 steps."""
    name, _, steps = text.partition(":")
    if name == "brecq":
        raise ValueError("--solvers: brecq weighs errors by the model's prediction, and a block alone predicts nothing. Write squared.")
    return solvers.by_name(name, **({"num_steps": int(steps)} if steps else {}))


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def turns(args) -> Iterator[list[tuple[str, int]]]:
    """(solver, seed): one of ours, then the official code's of one number of steps, and so on."""
    ours = [[(s, seed)] for s in args.solvers for seed in (args.seeds[:1] if s in DETERMINISTIC else args.seeds)]
    theirs = [
        [(f"{OFFICIAL}:{steps}:{weight}", seed) for weight in args.reference_regularizers for seed in args.seeds]
        for steps in (args.reference_steps if args.reference else ())
    ]
    return filter(None, itertools.chain.from_iterable(itertools.zip_longest(ours, theirs)))


def run_ours(args, part: Part, bits: int, todo: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """A row for each (solver, seed): the same call twice, in emptied caches and again."""
    for name, seed in todo:
        jax.clear_caches()
        apply = functools.partial(part.apply)  # a new function, which no cache of traces knows
        seconds = []
        for _ in ("cold", "warm"):
            start = time.perf_counter()
            quantized = brecq_jax.quantize(
                part.params, apply, part.train, weights=Uniform(bits), activations=None, preset=None, blocks="net",
                solver=solver(name), key=jax.random.key(seed), progress=False,
            )  # fmt: skip
            jax.block_until_ready(quantized.params)
            seconds.append(time.perf_counter() - start)
        yield {
            "solver": name, "seed": seed, "seconds": seconds[1], "cold_seconds": seconds[0], "error": part.error(quantized.dequantized()),
            "device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__,
        }  # fmt: skip


def run_official(args, part: Part, bits: int, todo: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Rows of one number of steps, by one process, which refuses a block whose float output is not ours."""
    path = args.workdir / f"{part.name.replace('/', '.')}.npz"
    if not path.exists():
        np.savez(path, **part.folded())
    steps, weights, seeds = (",".join(dict.fromkeys(column)) for column in zip(*((*n.split(":")[1:], str(s)) for n, s in todo), strict=True))
    command = [
        args.reference_python, str(REFERENCE), f"--reference={args.reference}", f"--problem={path}", f"--bits={bits}", f"--steps={steps}",
        f"--regularizer={weights}", f"--seeds={seeds}", f"--device={args.reference_device}", f"--threads={len(os.sched_getaffinity(0))}",
    ]  # fmt: skip
    # torch's threads must not spin while they wait, or they take the cores from what comes after
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    for row in map(json.loads, found.stdout.splitlines()):
        yield {"solver": f"{OFFICIAL}:{row['steps']}:{row['regularizer']}", **row}


def print_tables(rows: Iterable[dict[str, Any]], base: str):
    """A Markdown table for each block and number of bits; numbers are means over seeds."""
    groups: dict[tuple, dict[str, list]] = {}
    for row in rows:
        groups.setdefault((row["block"], row["bits"]), {}).setdefault(row["solver"], []).append(row)
    for (block, bits), by_solver in sorted(groups.items()):
        mean = {name: _means(found) for name, found in by_solver.items()}
        header = ("solver", "seconds", "with set-up", "held-out error", "± over seeds", "÷ its nearest", "undecided", f"seconds ÷ {base}", f"error ÷ {base}")
        print(f"\n{block}, {bits} bits\n", "|".join(["", *header, ""]), "|".join(["", *("---" for _ in header), ""]), sep="\n")
        nearest = mean.get("nearest", {}).get("error")
        official = next((m for n, m in mean.items() if n.startswith(OFFICIAL)), None)
        if official:
            mean[f"{OFFICIAL}: nearest"] = {"seconds": official["scale_seconds"], "error": official["nearest_error"]}
        for name, m in mean.items():
            own, one = m.get("nearest_error", nearest), mean.get(base, {})
            first = m.get("cold_seconds", m["seconds"] + m.get("scale_seconds", 0))
            spread = statistics.stdev(r["error"] for r in by_solver[name]) if len(by_solver.get(name, ())) > 1 else None
            cells = [m["seconds"], first, m["error"], spread, own and m["error"] / own, m.get("undecided")]
            cells += [one and m[k] / one[k] for k in ("seconds", "error")]
            print("|".join(["", name, *("" if not c and c != 0 else f"{c:.3g}" for c in cells), ""]))


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {k: statistics.mean(r[k] for r in rows) for k, v in rows[0].items() if isinstance(v, float)}


if __name__ == "__main__":
    main()
