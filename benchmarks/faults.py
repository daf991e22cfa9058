r"""Kill runs at random moments, fill their disk, damage what they keep; give the same command again, and compare the codes.

    taskset -c 0 python benchmarks/faults.py --kills=200 --damages=200 --seed=0

The digits network, W4A8, 30 steps. *Kills*: SIGKILL or SIGTERM, by a coin, at a moment drawn evenly from the processor time of a whole run; the command is
given again until it ends, then the next run begins, until so many kills have found a living process. *Disk*: a run in a tmpfs (root
alone may mount one) of 16 kB, which grows by 16 kB each time that the run has ended for want of room. *Damages*: bytes of kept
blocks are flipped, lost, zeroed or added, or blocks are swapped or removed; then the run is given again.

Each run is a process, forked of one that has imported everything and touched no device, and reads its compiled programs from a
cache that the first, whole run fills: both for speed alone.
"""

import argparse
import collections
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import warnings

import jax
import matplotlib.pyplot  # noqa: F401 - imported here, once for all processes
import numpy as np

import brecq_jax
from brecq_jax import models, solvers
from brecq_jax._experiment import execute
from brecq_jax._journal import digest

PAGE = 16384  # a multiple of a tmpfs' own
NO_ROOM, OTHER = 3, 4  # exit codes
MOST_ATTEMPTS = 100  # of one run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    draw = np.random.default_rng(known.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compiling = undisturbed(folder, folder / "whole")
        whole, seconds = (folder / "whole/digest").read_text(), []
        for n in range(2):
            seconds.append(undisturbed(folder, folder / f"again{n}"))
            assert (folder / f"again{n}/digest").read_text() == whole
        print(f"a whole run: {', '.join(f'{s:.1f}' for s in seconds)} processor seconds; with all to compile {compiling:.1f}", flush=True)
        process = os.fork()
        if not process:
            damages(folder, folder / "damaged", draw, known.damages)
            os._exit(0)
        assert ended(process) == 0
        full_disk(folder, folder / "disk", whole)
        kills(folder, draw, known.kills, whole, float(np.median(seconds)))


def experiment(folder: pathlib.Path) -> brecq_jax.Experiment:
    """The network is trained by the first process that asks."""
    trained = folder / "trained.pickle"
    if not trained.exists():
        digits = models.train_digits()
        trained.write_bytes(pickle.dumps((jax.tree.map(np.asarray, digits.variables), digits.train_images[:128])))
    variables, images = pickle.loads(trained.read_bytes())
    solver = solvers.annealed(num_steps=30)
    return brecq_jax.Experiment(variables, models.DigitsNet().apply, images, lambda exact, quantized: {}, preset="brecq", solver=solver)


def start(folder: pathlib.Path, workdir: pathlib.Path) -> int:
    """A process that does the whole run, or what is left of it, and writes the digest of the saved model; its id."""
    process = os.fork()
    if process:
        return process
    try:
        made = experiment(folder)
        if not (workdir / "result.json").exists():
            execute(made, workdir, {}, progress=False)
        (workdir / "digest").write_text(digest(jax.tree.leaves(brecq_jax.restore(workdir / "model", made.apply_fn))))
    except BaseException as error:
        text = traceback.format_exc()
        no_room = "No space left" in text or "ENOSPC" in text
        if not no_room:
            print(text, flush=True)
        os._exit(NO_ROOM if no_room and isinstance(error, Exception) else OTHER)
    os._exit(0)


def undisturbed(folder: pathlib.Path, workdir: pathlib.Path) -> float:
    """Processor seconds of a whole run."""
    _, status, used = os.wait4(start(folder, workdir), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return used.ru_utime + used.ru_stime


def processor_seconds(process: int) -> float:
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # proc(5): from the third one on
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ended(process: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kills(folder: pathlib.Path, draw, count: int, whole: str, seconds: float):
    outcomes, killed, stages, runs, began = collections.Counter(), 0, collections.Counter(), 0, time.perf_counter()
    while killed < count:
        workdir = folder / f"run{runs}"
        runs += 1
        for _ in range(MOST_ATTEMPTS):
            process, when, done = start(folder, workdir), draw.uniform(0, seconds), 0
            while not done and processor_seconds(process) < when and killed < count:
                time.sleep(0.01)
                done, status = os.waitpid(process, os.WNOHANG)
            if not done and killed < count:
                os.kill(process, signal.SIGKILL if draw.random() < 0.5 else signal.SIGTERM)
            code = os.waitstatus_to_exitcode(status) if done else ended(process)
            if code >= 0:
                break
            killed += 1
            stages[stage(workdir)] += 1
        outcomes[f"killed {MOST_ATTEMPTS} times" if code < 0 else "ended in error" if code else "the same codes" if (workdir / "digest").read_text() == whole else "other codes"] += 1
        print(f"  {killed} kills, {runs} runs: {dict(outcomes)}", flush=True)
        shutil.rmtree(workdir)
    print(f"kills: {killed} in {runs} runs, {time.perf_counter() - began:.0f} s: {dict(outcomes)}; when they came: {dict(stages)}", flush=True)


def stage(workdir: pathlib.Path) -> str:
    if (workdir / "result.json").exists():
        return "finished"
    if (workdir / "model").exists():
        return "while the model was saved, or after it"
    if not (workdir / "unfinished/run").exists():
        return "before the first block"
    kept = sum(path.name.isdigit() for path in (workdir / "unfinished").iterdir())
    return f"{kept} blocks kept"


def full_disk(home: pathlib.Path, folder: pathlib.Path, whole: str):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PAGE}", "tmpfs", folder], check=False).returncode:
        return print("disk: no tmpfs could be mounted; left out")
    began, times, pages = time.perf_counter(), 0, 1
    try:
        while (code := ended(start(home, folder / "run"))) != 0:
            times += 1
            if code != NO_ROOM:
                return print(f"disk: at {pages * PAGE // 1024} kB the run ended with {code}")
            pages += 1
            subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", folder], check=True)
        same = "the same codes" if (folder / "run/digest").read_text() == whole else "other codes"
        print(f"disk: full {times} times, enough at {pages * PAGE // 1024} kB, {time.perf_counter() - began:.0f} s: {same}", flush=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def damages(home: pathlib.Path, folder: pathlib.Path, draw, count: int):
    warnings.simplefilter("ignore")  # each damaged block is told of
    made, outcomes, began = experiment(home), collections.Counter(), time.perf_counter()

    def run():
        found = brecq_jax.quantize(
            made.params, made.apply_fn, made.calib_ds, preset=made.preset, solver=made.solver, resume=folder, progress=False
        )  # fmt: skip
        return digest(jax.tree.leaves(found))

    whole = run()
    for _ in range(count):
        damage = DAMAGES[draw.integers(len(DAMAGES))]
        files = sorted(path for path in folder.iterdir() if path.name != "lock")
        damage(files[draw.integers(len(files))], files[draw.integers(len(files))], draw)
        outcomes[damage.__name__, "the same codes" if run() == whole else "other codes"] += 1
    print(f"damages: {count}, {time.perf_counter() - began:.0f} s: {dict(outcomes)}", flush=True)


def flipped(file, other, draw):
    data = bytearray(file.read_bytes())
    data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    file.write_bytes(data)


def truncated(file, other, draw):
    data = file.read_bytes()
    file.write_bytes(data[: draw.integers(len(data))])


def zeroed(file, other, draw):
    data = bytearray(file.read_bytes())
    first = int(draw.integers(len(data)))
    data[first : first + 64] = bytes(len(data[first : first + 64]))
    file.write_bytes(data)


def longer(file, other, draw):
    file.write_bytes(file.read_bytes() + draw.bytes(int(draw.integers(1, 100))))


def swapped(file, other, draw):
    a, b = file.read_bytes(), other.read_bytes()
    file.write_bytes(b)
    other.write_bytes(a)


def removed(file, other, draw):
    file.unlink()


DAMAGES = (flipped, truncated, zeroed, longer, swapped, removed)

if __name__ == "__main__":
    main()
