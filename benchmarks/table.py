r"""Run one config at many settings, a process each, and print the results as a Markdown table.

    python benchmarks/table.py --workdir=runs/r20 --jobs=2 --config=configs/resnet20_cifar10.py \
        --config.weights=… --config.data=… --vary=weight_bits+act_bits=8+8,4+0,2+0 --vary=method=nearest,brecq

Every combination of the `--vary` values is run; `a+b=1+2,3+4` varies two keys together. A setting whose result.json
exists is not run again, so that an interrupted table goes on where it stopped. Each process keeps to its share of the
cores, so that seconds with `--jobs` above 1 are those of fewer cores.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--vary", action="append", default=[], metavar="KEY[+KEY]=VALUE[+VALUE],…")
    parser.add_argument("--jobs", type=int, default=1)
    known, fixed = parser.parse_known_args()
    axes = []
    for text in known.vary:
        keys, _, values = text.partition("=")
        axes.append([dict(zip(keys.split("+"), v.split("+"), strict=True)) for v in values.split(",")])
    settings = [dict(itertools.chain(*(part.items() for part in parts))) for parts in itertools.product(*axes)]
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i :: known.jobs] for i in range(known.jobs)]
    with concurrent.futures.ThreadPoolExecutor(known.jobs) as pool:
        list(pool.map(lambda s: run(known, fixed, s, shares), settings))
    print_table(settings, [json.loads((folder(known, s) / "result.json").read_text()) for s in settings])


def folder(known, setting: dict[str, str]) -> pathlib.Path:
    return known.workdir / "_".join(f"{k}={v}" for k, v in setting.items())


def run(known, fixed, setting: dict[str, str], shares: list[list[int]]):
    """One setting in a process of its own, on a share of the cores that nobody uses."""
    path = folder(known, setting)
    if (path / "result.json").exists():
        return
    shutil.rmtree(path, ignore_errors=True)  # what an interrupted run left
    share = shares.pop()
    overrides = [*fixed, *(f"--config.{k}={v}" for k, v in setting.items())]
    command = [sys.executable, "-m", "brecq_jax", f"--config={known.config}", f"--workdir={path}", "--quiet", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, share))
    shares.append(share)
    print(path.name, json.loads((path / "result.json").read_text())["figures"], file=sys.stderr, flush=True)


def print_table(settings: list[dict[str, str]], results: list[dict]):
    header = [*settings[0], *results[0]["figures"], "seconds"]
    print("|".join(["", *header, ""]), "|".join(["", *("---" for _ in header), ""]), sep="\n")
    for setting, result in zip(settings, results, strict=True):
        cells = [*setting.values(), *(f"{v:.2f}" for v in result["figures"].values()), f"{result['quantize_seconds']:.0f}"]
        print("|".join(["", *cells, ""]))


if __name__ == "__main__":
    main()
