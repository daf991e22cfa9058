r"""Run one config at many settings, a process each, and print the results as a Markdown table.

    python -m brecq_jax.sweep --config=configs/resnet20_cifar10.py --workdir=runs/r20 --jobs=2 \
        --config.weights=… --config.data=… --vary=weight_bits+act_bits=8+8,4+0,2+0 --vary=method=nearest,brecq --vary=seed=0,1,2

Every combination of the `--vary` values is a trial; `a+b=1+2,3+4` varies two keys together. A value that has a comma is written in
double quotes, the shell's single ones around it: --vary='choices="2,4,8","2,3,4,8"'. Only where a key has a + are values split at
theirs: --vary=method=lapq+adaround is one value. Trials that differ in their seed alone are one row: mean ± sample standard
deviation. `@FILE` stands for the arguments in a file (configs/*.sweep).

A trial with a result is not run again, so that an interrupted sweep goes on where it stopped; one that was stopped half-way goes on
after its last finished block. A trial that fails leaves its words in log.txt, and the others go on. Each process keeps to its share of the cores, so
that seconds with `--jobs` above 1 are those of fewer cores.

Compiled programs are kept in WORKDIR/compiled (or where JAX_COMPILATION_CACHE_DIR says), so that trials that differ in their seed alone compile theirs
once: the first of each such group starts before the rest, and the seconds of those that start after its end have hardly any compilation in them.
What the float model gives is kept in WORKDIR/float_outputs, so that it is scored once.

Where trials are of several versions of jax and this library, a line below the table says so. Their means are of all of them: give a new --workdir to
have one version alone.
"""

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any

from brecq_jax.__main__ import load_config

REPEAT = "seed"  # trials that differ in this key alone share a row


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run. `setting`: what varies; `settings`: every field of the config, as result.json will hold them."""

    path: pathlib.Path
    setting: dict[str, str]
    settings: dict[str, Any]
    command: list[str]

    def result(self) -> dict[str, Any] | None:
        """What the run gave, or None if it has not finished.

        Raises:
          ValueError: the folder holds the result of other settings, or one that cannot be read.
        """
        file = self.path / "result.json"
        if not file.exists():
            return None
        mine = json.loads(json.dumps(self.settings))  # a tuple is a list there
        try:
            result = json.loads(file.read_bytes())
            there, _, _ = (dict(result["settings"]), dict(result["figures"]), float(result["quantize_seconds"]))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"sweep: {file} cannot be read as a result: {error}. Remove {self.path}, and its trial is run again.") from error
        other = [f"{k}={v} and not {mine[k]}" for k, v in there.items() if v != mine.get(k, v)]
        if other:
            raise ValueError(f"sweep: {file} was made with {', '.join(other)}. Give another --workdir.")
        return result


def main(arguments: Sequence[str] | None = None) -> list[Trial]:
    """Run what has no result yet, and print the table. Returns all trials.

    Raises:
      SystemExit: bad arguments, before any work (2); trials did not finish, after the table (1).
    """
    parser = argparse.ArgumentParser(
        "python -m brecq_jax.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    parser.add_argument("--config", required=True, help="see python -m brecq_jax --help; --config.KEY=VALUE holds for all trials")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a folder for the trials' folders")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY[+KEY]=VALUE[+VALUE],…")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time, 1 on GPUs and TPUs (docs/pods.md); 0: print the table as it is")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th trial, from the I-th on: for N machines")
    known, fixed = parser.parse_known_args(arguments)
    try:
        if known.jobs < 0:
            raise ValueError(f"--jobs={known.jobs}: write at least 1, or 0 for the table alone.")
        trials = make_trials(known.config, known.workdir, fixed, known.vary)
        finished = {t.path for t in trials if t.result()}
        unfinished = run_all(firsts_first([t for t in shard(trials, known.shard) if t.path not in finished]), known.jobs, known.workdir / "compiled")
        print(table(trials))
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"{type(error).__name__}: {error}\n")
    if unfinished:
        parser.exit(1, "".join(f"not finished: {path / 'log.txt'}: {words}\n" for path, words in unfinished.items()))
    return trials


def make_trials(config: str, workdir: pathlib.Path, fixed: Sequence[str], vary: Sequence[str]) -> list[Trial]:
    """The trials of all combinations, in order, their settings checked.

    Raises:
      ValueError, FileNotFoundError: what cannot be varied so, or a config that refuses it.
    """
    if not vary:
        raise ValueError("sweep: nothing varies. Give --vary=KEY=VALUE,VALUE, or run python -m brecq_jax.")
    trials = {}
    for parts in itertools.product(*map(_axis, vary)):
        setting = {key: value for part in parts for key, value in part.items()}
        overrides = [*fixed, *(f"--config.{k}={v}" for k, v in setting.items())]
        settings = {"config": config, **dataclasses.asdict(load_config(config, overrides))}
        name = "_".join(f"{k}={urllib.parse.quote(v, safe='')}" for k, v in setting.items())
        if name in trials:
            raise ValueError(f"sweep: {name} comes twice. Write each value once, and each key in one --vary.")
        command = [sys.executable, "-m", "brecq_jax", f"--config={config}", f"--workdir={workdir / name}", "--quiet"]
        command += [f"--float-outputs={workdir / 'float_outputs'}", *overrides]
        trials[name] = Trial(workdir / name, setting, settings, command)
    return list(trials.values())


def _axis(text: str) -> list[dict[str, str]]:
    names, sign, values = text.partition("=")
    keys = names.split("+")
    try:
        written = next(csv.reader([values], strict=True)) or [""]
    except csv.Error:
        written = []
    choices = [value.split("+") if len(keys) > 1 else [value] for value in written]
    if not (sign and choices) or any(len(choice) != len(keys) for choice in choices):
        raise ValueError(
            f"--vary={text}: not understood. Write KEY=VALUE,VALUE, or KEY+KEY=VALUE+VALUE,VALUE+VALUE; "
            'double quotes around each value that has a comma: KEY="1,2","3,4".'
        )
    return [dict(zip(keys, choice, strict=True)) for choice in choices]


def shard(trials: list[Trial], text: str) -> list[Trial]:
    """Every n-th trial from the i-th on, for "i/n". No two shards share one."""
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise ValueError(f"--shard={text}: write 1/N to N/N.")
    return trials[int(first) - 1 :: int(of)]


def group(trial: Trial) -> tuple[tuple[str, str], ...]:
    """What trials have in common that share their compiled programs, and a row of the table."""
    return tuple((k, v) for k, v in trial.setting.items() if k != REPEAT)


def firsts_first(trials: list[Trial]) -> list[Trial]:
    """The first trial of each group, then the second of each, …: two that compile the same programs at once would both compile them."""
    seen: dict[tuple, int] = {}
    place = {}
    for trial in trials:
        place[trial.path] = seen[group(trial)] = seen.get(group(trial), 0) + 1
    return sorted(trials, key=lambda t: place[t.path])


def run_all(trials: list[Trial], jobs: int, compiled: pathlib.Path) -> dict[pathlib.Path, str]:
    """Run the trials, `jobs` at a time, each on its share of the cores; the last words of those that did not finish, by folder."""
    if not jobs:
        return {}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux has it
    shares = [set(cores[i % len(cores) :: jobs]) if cores else set() for i in range(jobs)]
    unfinished = {}
    # All programs are kept, since a trial is made of many small ones; what the user set stands.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(compiled.absolute()), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ}

    def run(trial: Trial):
        share = shares.pop()
        try:
            words = _run(trial, share, environment)
        finally:
            shares.append(share)
        if words:
            unfinished[trial.path] = words
        print(trial.path.name, words or trial.result()["figures"], file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, trials))
    return unfinished


def _run(trial: Trial, cores: set[int], environment: dict[str, str]) -> str | None:
    """Run one trial in a process of its own; its last words if it did not finish."""
    trial.path.mkdir(parents=True, exist_ok=True)
    with (trial.path / "log.txt").open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process ends
        except BlockingIOError:
            return "another sweep runs it"
        if trial.result() is None:
            log.truncate(0)
            with subprocess.Popen(trial.command, stdout=log, stderr=log, env=environment) as process:
                if cores:
                    os.sched_setaffinity(process.pid, cores)
            if process.returncode or trial.result() is None:
                lines = (trial.path / "log.txt").read_text().splitlines()
                return lines[-1] if lines else f"ended with {process.returncode}"
    return None


def table(trials: list[Trial]) -> str:
    """A Markdown table of all trials; figures of what has finished, and how many of each row have."""
    rows: dict[tuple, list] = {}
    for trial in trials:
        rows.setdefault(group(trial), []).append(trial.result())
    results = [result for row in rows.values() for result in row if result]
    figures = list(dict.fromkeys(name for result in results for name in result["figures"]))
    keys = [k for k in trials[0].setting if k != REPEAT]
    lines = [[*keys, "runs", *figures, "seconds"], ["---"] * (len(keys) + len(figures) + 2)]
    for key, row in rows.items():
        done = [result for result in row if result]
        cells = [_cell([r["figures"][name] for r in done if name in r["figures"]], 2) for name in figures]
        lines.append([*(v for _, v in key), f"{len(done)} of {len(row)}", *cells, _cell([r["quantize_seconds"] for r in done], 0)])
    return "\n".join(["|".join(["", *line, ""]) for line in lines] + _versions(results))


def _versions(results: list[dict]) -> list[str]:
    """A line for below the table where results are of several versions of the library; those of old runs do not say theirs."""
    counts = collections.Counter(result.get("library", "unknown")[:8] for result in results)
    told = ", ".join(f"{version} ({count} {'trial' if count == 1 else 'trials'})" for version, count in counts.items())
    return [f"\ntrials of {len(counts)} versions of the library: {told}"] if len(counts) > 1 else []


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
