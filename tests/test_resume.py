"""Runs that are killed, starved of disk or given damaged files end as if nothing had happened."""

import errno
import functools
import importlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import __main__, _journal, solvers
from brecq_jax._journal import digest, locked
from brecq_jax.formats import Uniform

SOLVER = solvers.annealed(num_steps=4)
LAYERS = 3


def apply_fn(params, x):
    for w in params["layers"]:
        x = jax.nn.relu(x @ w)
    return x @ params["head"]


def made_up():
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    params = {"layers": [jax.random.normal(k, (6, 6)) for k in keys[:LAYERS]], "head": jax.random.normal(keys[-2], (6, 3))}
    return params, np.asarray(jax.random.normal(keys[-1], (16, 6)))


def quantize(folder=None, params=None, apply_fn=apply_fn, inputs=None, **settings):
    own_params, own_inputs = made_up()
    settings = {"weights": Uniform(3), "blocks": "layer", "solver": SOLVER, "resume": folder, "progress": False, **settings}
    return brecq_jax.quantize(own_params if params is None else params, apply_fn, own_inputs if inputs is None else inputs, **settings)


@functools.cache
def whole_run():
    return quantize()


def assert_same(quantized):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(quantized), jax.tree.leaves(whole_run()))
    errors = [[(b.name, b.ops, b.error_before, b.error_after) for b in q.report.blocks] for q in (quantized, whole_run())]
    assert errors[0] == errors[1]


def records(folder):
    return sorted(p for p in folder.iterdir() if p.name.isdigit())


@pytest.fixture
def learned(monkeypatch):
    """Names of the units that were learned since, in order."""
    reconstruct = importlib.import_module("brecq_jax.solvers.reconstruct")  # not the function of this name

    whole_run()
    names, learn = [], reconstruct._learn_unit
    monkeypatch.setattr(reconstruct, "_learn_unit", lambda *a: names.append(a[-2].block.name) or learn(*a))
    return names


def test_a_finished_run_is_read_and_not_repeated(tmp_path, learned):
    assert_same(quantize(tmp_path))
    assert len(learned) == len(records(tmp_path)) == LAYERS + 1
    assert_same(quantize(tmp_path))
    assert len(learned) == LAYERS + 1


@pytest.mark.parametrize("left", range(LAYERS + 1))
def test_a_run_goes_on_after_its_last_finished_block(tmp_path, learned, left):
    quantize(tmp_path)
    for file in records(tmp_path)[left:]:
        file.unlink()
    learned.clear()
    assert_same(quantize(tmp_path))
    assert len(learned) == LAYERS + 1 - left


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "longer": lambda data: data + b"x",
    "foreign": lambda data: b"what?" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_told_of_and_its_block_done_again(tmp_path, learned, damage):
    quantize(tmp_path)
    file = records(tmp_path)[1]
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    learned.clear()
    with pytest.warns(UserWarning, match="00001 is damaged"):
        assert_same(quantize(tmp_path))
    assert len(learned) == 1  # those after it follow the same codes


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_of_the_run_is_made_anew(tmp_path, learned, damage):
    quantize(tmp_path)
    (tmp_path / "run").write_bytes(DAMAGES[damage]((tmp_path / "run").read_bytes()))
    learned.clear()
    assert_same(quantize(tmp_path))
    assert not learned


def test_what_a_block_had_to_say_is_said_again(tmp_path):
    def looped(params, x):  # the second layer runs in a loop that JAX has no gradient of
        x = jax.nn.relu(x @ params["layers"][0])
        x = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ params["layers"][1])), (0, x))[1]
        return x @ params["head"]

    whole = quantize(tmp_path, apply_fn=looped)
    (note,) = (n for n in whole.report.notes if "is not learned" in n)
    assert note in quantize(tmp_path, apply_fn=looped).report.notes


def test_files_that_changed_places_are_not_taken(tmp_path):
    quantize(tmp_path)
    for one, two in (("run", "00001"), ("00000", "00002")):
        a, b = (tmp_path / one).read_bytes(), (tmp_path / two).read_bytes()
        (tmp_path / one).write_bytes(b)
        (tmp_path / two).write_bytes(a)
    assert_same(quantize(tmp_path))


def test_a_block_is_not_put_on_top_of_others_than_its_own(tmp_path, learned):
    quantize(tmp_path / "one")
    quantize(tmp_path / "two", key=jax.random.key(5))
    for name in ("00000", "00002"):
        shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    learned.clear()
    assert_same(quantize(tmp_path / "one"))
    assert len(learned) == 2


def other_params():
    params, _ = made_up()
    return params | {"head": params["head"].at[0, 0].add(1e-6)}


def with_a_loss(weight):
    return lambda outputs, key: weight * jnp.sum(outputs)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("params", lambda: {"params": other_params()}),
        ("apply_fn", lambda: {"apply_fn": lambda params, x: apply_fn(params, x) + 1}),
        ("calib_ds", lambda: {"inputs": made_up()[1] + 1e-6}),
        ("formats", lambda: {"weights": Uniform(3, symmetric=True)}),
        ("solver", lambda: {"solver": solvers.annealed(num_steps=5)}),
        ("solver", lambda: {"solver": solvers.chain(SOLVER, SOLVER)}),
        ("loss", lambda: {"loss": with_a_loss(2.0)}),
        ("key", lambda: {"key": jax.random.key(1)}),
        ("blocks", lambda: {"blocks": "net"}),
        ("bfloat16_caches", lambda: {"bfloat16_caches": True}),
    ],
)
def test_blocks_of_another_run_are_refused_and_what_differs_is_named(tmp_path, learned, part, change):
    settings = {"loss": with_a_loss(1.0)} if part == "loss" else {}
    quantize(tmp_path, **settings)
    learned.clear()
    with pytest.raises(ValueError, match=f"with other {part}. Give the command"):
        quantize(tmp_path, **change())
    assert not learned


def test_a_run_goes_on_with_less_memory(tmp_path, learned):
    quantize(tmp_path, memory_budget_gb=1.0)
    learned.clear()
    assert_same(quantize(tmp_path, memory_budget_gb=0.5))
    assert not learned
    with pytest.raises(ValueError, match="with other bfloat16_caches, memory_budget_gb. Give"):  # codes depend on where such caches are
        quantize(tmp_path, memory_budget_gb=0.5, bfloat16_caches=True)


def test_digests_follow_functions_to_what_they_close_over():
    def made(scale):
        def solve(x):
            return [y * scale for y in x]

        return jax.jit(solve)

    assert digest(made(1.0)) == digest(made(1.0)) != digest(made(2.0))
    assert digest(solvers.brecq()) != digest(solvers.adaround()) and digest(solvers.brecq()) == digest(solvers.brecq())
    assert digest(solvers.lapq(np.zeros(4, int))) != digest(solvers.lapq(np.ones(4, int)))
    assert digest([1, 2], 3) != digest([1], 2, 3)
    with pytest.raises(TypeError, match="a Generator cannot be compared"):
        digest(np.random.default_rng(0))


def test_a_digest_copies_no_array():
    large = np.zeros((100, 1000))
    tracemalloc.start()
    digest(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < large.nbytes / 10


def test_digests_are_the_same_in_another_process():
    script = "from brecq_jax import solvers, _journal; print(_journal.digest(solvers.refined(), solvers.lapq(), {'a', 'b'}))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert found.stdout.strip() == digest(solvers.refined(), solvers.lapq(), {"a", "b"})


def test_a_second_process_is_told_so(tmp_path, learned):
    holder = "import pathlib, sys; from brecq_jax._journal import locked\nwith locked(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match=f"another process works in it .process {process.pid} on"):
            quantize(tmp_path)
        assert not learned
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same(quantize(tmp_path))  # the lock died with its process


def test_a_lock_that_was_removed_meanwhile_holds_nothing(tmp_path):
    with locked(tmp_path):
        (tmp_path / "lock").rename(tmp_path / "old")
        with locked(tmp_path):
            pass
        (tmp_path / "old").rename(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


class FullDisk:
    """Whatever is written into a folder fails at the n-th write, by whichever of open, write, fsync and rename that is."""

    def __init__(self, monkeypatch, folder):
        self.left = None
        self.folder = str(folder)
        monkeypatch.setattr(pathlib.Path, "open", self.at(pathlib.Path.open, lambda path, mode="r", *a, **k: "w" in mode))
        monkeypatch.setattr(pathlib.Path, "rename", self.at(pathlib.Path.rename, lambda path, to: True))
        monkeypatch.setattr(os, "fsync", self.at(os.fsync, lambda file: True))

    def at(self, function, is_write):
        def counted(*arguments, **more):
            if is_write(*arguments, **more) and self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **more)

        return counted


def test_a_full_disk_at_every_write_loses_nothing(tmp_path, monkeypatch):
    disk, failed = FullDisk(monkeypatch, tmp_path), 0
    for n in range(100):
        folder = tmp_path / str(n)
        disk.left = n
        try:
            quantize(folder)
        except OSError as error:
            failed += error.errno == errno.ENOSPC
            disk.left = None
            assert_same(quantize(folder))
            shutil.rmtree(folder)
        else:
            break
    assert failed == n == 4 * (LAYERS + 2)  # open, fsync of the file, rename, fsync of the folder: for `run` and for each block


CONFIG = """
    import dataclasses
    import jax
    import numpy as np
    from brecq_jax import Experiment, solvers
    from brecq_jax.formats import Uniform

    def apply_fn(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    @dataclasses.dataclass
    class Config:
        num_steps: int = 30

        def build(self):
            *keys, key_inputs = jax.random.split(jax.random.key(0), 7)
            params = [jax.random.normal(k, (6, 6)) for k in keys]
            inputs = np.asarray(jax.random.normal(key_inputs, (32, 6)))
            return Experiment(
                params, apply_fn, inputs, lambda exact, quantized: {"sum": float(quantized(inputs).sum())},
                weights=Uniform(3), solver=solvers.annealed(num_steps=self.num_steps), blocks="layer",
            )
"""


def codes(folder):
    return jax.tree.leaves(brecq_jax.restore(folder / "model", None))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_goes_on_and_ends_the_same(tmp_path, kill):
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))

    def command(name):
        return [sys.executable, "-m", "brecq_jax", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / name}", "--quiet"]

    subprocess.run(command("whole"), check=True)
    for count in (0, 3):  # kept when the signal comes
        with subprocess.Popen(command("killed")) as process:
            while not (tmp_path / "killed/unfinished" / f"{count:05}").exists():
                assert process.poll() is None
            process.send_signal(kill)
    assert process.returncode == -kill and not (tmp_path / "killed/model").exists()
    subprocess.run(command("killed"), check=True)
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    jax.tree.map(np.testing.assert_array_equal, codes(tmp_path / "killed"), codes(tmp_path / "whole"))


def test_the_command_line_refuses_the_workdir_of_another_interrupted_run(tmp_path, capsys):
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
    (tmp_path / "runs/unfinished").mkdir(parents=True)
    (tmp_path / "runs/unfinished/run").write_bytes(_journal._sealed(b'{"params": "0"}'))
    with pytest.raises(SystemExit):
        __main__.main([f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'runs'}", "--quiet"])
    assert "unfinished has blocks of a run with other apply_fn" in capsys.readouterr().err
