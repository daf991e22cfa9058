"""Sweeps: resumed, shared out, stopped half-way, with a trial that fails; and the table."""

import errno
import fcntl
import itertools
import json
import os
import re
import textwrap
import threading

import jax
import numpy as np
import pytest

from brecq_jax import sweep as module
from brecq_jax._journal import remembered
from brecq_jax.sweep import firsts_first, main, make_trials, run_all, shard, table

CONFIG = """
    import dataclasses
    import pathlib

    import jax.numpy as jnp
    import numpy as np

    from brecq_jax import Experiment, solvers


    @dataclasses.dataclass
    class Config:
        a: int = 0
        b: str = "x"
        seed: int = 0
        log: str = ""

        def build(self):
            if self.a == 13:
                raise ValueError("thirteen is not built")
            with pathlib.Path(self.log).open("a") as log:
                log.write(f"{self.a}{self.b}{self.seed} ")

            def evaluate(float_apply, quantized_apply):
                scored = {"float": float(float_apply(inputs + self.a).sum())} if self.b == "scored" else {}
                return {"score": 10.0 * self.a + self.seed} | scored

            inputs = np.ones((8, 4), np.float32)
            return Experiment({"w": jnp.eye(4)}, lambda params, x: x @ params["w"], inputs, evaluate, solver=solvers.nearest())
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep over a config that is done in a moment; `sweep.built()` tells which trials were built since."""
    config, log = tmp_path / "config.py", tmp_path / "log"
    config.write_text(textwrap.dedent(CONFIG))

    def run(*arguments, workdir="runs"):
        log.write_text("")
        return main([f"--config={config}", f"--workdir={tmp_path / workdir}", f"--config.log={log}", *arguments])

    run.built = lambda: sorted(log.read_text().split())
    run.config, run.log, run.folder = config, log, tmp_path / "runs"
    return run


def made_up(trial, more=(), **figures):
    """A result as a finished run leaves it; without its version, as runs once left it."""
    trial.path.mkdir(parents=True, exist_ok=True)
    (trial.path / "result.json").write_text(json.dumps({"settings": trial.settings, "figures": figures, "quantize_seconds": 3.2, **dict(more)}))


def trials_of(sweep, *vary):
    return make_trials(str(sweep.config), sweep.folder, [f"--config.log={sweep.log}"], vary)


def printed(capsys) -> list[str]:
    """The table, with n for the seconds."""
    return [re.sub(r"\|\d+\|$", "|n|", line) for line in capsys.readouterr().out.splitlines()]


def test_a_sweep_runs_every_combination_once_and_goes_on_where_it_stopped(sweep, capsys):
    sweep("--vary=a=1,2")
    assert sweep.built() == ["1x0", "2x0"]
    assert printed(capsys) == ["|a|runs|score|seconds|", "|---|---|---|---|", "|1|1 of 1|10.00|n|", "|2|1 of 1|20.00|n|"]
    sweep("--vary=a=1,2,3", "--jobs=2")
    assert sweep.built() == ["3x0"]


def test_a_trial_stopped_half_way_goes_on(sweep):
    (trial,) = trials_of(sweep, "a=1")
    (trial.path / "unfinished").mkdir(parents=True)
    (trial.path / "model").mkdir(parents=True)
    (trial.path / "model" / "half").write_text("of a model")
    (trial.path / "result.json.part").write_text('{"settings"')
    sweep("--vary=a=1")
    assert sweep.built() == ["1x0"]
    assert trial.result()["figures"] == {"score": 10.0} and len(trial.result()["library"]) == 64
    assert not (trial.path / "model" / "half").exists() and not (trial.path / "unfinished").exists()


def test_a_trial_that_fails_is_told_of_and_the_others_finish(sweep, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep("--vary=a=13,2")
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "|13|0 of 1|–|–|\n|2|1 of 1|20.00|" in said.out
    assert "a=13/log.txt: ValueError: thirteen is not built" in said.err
    assert sweep.built() == ["2x0"]


def test_a_trial_that_another_sweep_runs_is_left_alone(sweep, capsys):
    (trial,) = trials_of(sweep, "a=1")
    (trial.path / "model").mkdir(parents=True)
    with (trial.path / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            sweep("--vary=a=1")
    assert "another sweep runs it" in capsys.readouterr().err
    assert (trial.path / "model").exists() and not sweep.built()


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_share_no_trial_and_leave_none(shards, sweep):
    trials = trials_of(sweep, "a=1,2,3", "b=x,y")
    parts = [shard(trials, f"{i}/{shards}") for i in range(1, shards + 1)]
    assert sorted(t.path for t in itertools.chain(*parts)) == sorted(t.path for t in trials)


def test_the_table_of_a_shard_shows_what_is_missing(sweep, capsys):
    sweep("--vary=a=1,2", "--shard=2/2")
    assert sweep.built() == ["2x0"]
    assert printed(capsys)[2:] == ["|1|0 of 1|–|–|", "|2|1 of 1|20.00|n|"]
    sweep("--vary=a=1,2", "--jobs=0")
    assert not sweep.built()
    assert printed(capsys)[2:] == ["|1|0 of 1|–|–|", "|2|1 of 1|20.00|n|"]


def test_seeds_share_a_row_with_mean_and_sample_deviation(sweep):
    trials = trials_of(sweep, "a+b=1+x,2+y", "seed=0,1,2")
    for trial, score in zip(trials[:4], (1.0, 2.0, 4.5, 7.0), strict=True):
        made_up(trial, score=score)
    assert table(trials).splitlines()[2:] == ["|1|x|3 of 3|2.50 ± 1.80|3 ± 0|", "|2|y|1 of 3|7.00|3|"]


def test_trials_of_several_versions_of_the_library_are_told_of(sweep):
    trials = trials_of(sweep, "a=1", "seed=0,1,2,3")
    for trial, version in zip(trials[:3], ({}, {"library": "b" * 64}, {"library": "b" * 64}), strict=True):
        made_up(trial, version, score=1.0)
    assert table(trials).splitlines()[3:] == ["", "trials of 2 versions of the library: unknown (1 trial), bbbbbbbb (2 trials)"]
    made_up(trials[0], {"library": "b" * 64}, score=1.0)
    assert len(table(trials).splitlines()) == 3


def test_of_trials_that_share_compiled_programs_one_goes_first(sweep, monkeypatch):
    trials = firsts_first(trials_of(sweep, "a=1,2", "seed=0,1"))
    assert [t.setting for t in trials] == [{"a": a, "seed": seed} for seed in "01" for a in "12"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    sweep("--vary=a=1", "--vary=seed=0")
    first = set((sweep.folder / "compiled").glob("*-cache"))
    sweep("--vary=a=1", "--vary=seed=1")
    assert first == set((sweep.folder / "compiled").glob("*-cache"))


def test_the_float_model_is_scored_once_for_the_same_inputs(sweep):
    trials = sweep("--config.b=scored", "--vary=seed=0,1", "--vary=a=1,2")
    kept = sorted((sweep.folder / "float_outputs").iterdir())
    assert len(kept) == 2  # one for each a, whose inputs differ
    assert [t.result()["figures"]["float"] for t in trials] == [64.0, 96.0, 64.0, 96.0]
    kept[0].write_bytes(b"damaged" + kept[0].read_bytes())
    trials = sweep("--config.b=scored", "--vary=seed=2", "--vary=a=1,2")
    assert [t.result()["figures"]["float"] for t in trials] == [64.0, 96.0]
    assert sorted((sweep.folder / "float_outputs").iterdir()) == kept


def test_float_outputs_that_cannot_be_written_stop_no_trial(tmp_path):
    """Their folder is a file here, as a disk that is full of others' files: OSError."""
    (tmp_path / "file").write_text("")
    types = jax.ShapeDtypeStruct((2,), np.float32)
    with pytest.warns(UserWarning, match="file/outputs could not be written"):
        found = remembered(tmp_path / "file" / "outputs", types, lambda: np.ones(2, np.float32))
    np.testing.assert_array_equal(found, [1, 1])


def test_half_written_float_outputs_are_removed(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        remembered(tmp_path / "outputs", jax.ShapeDtypeStruct((2,), np.float32), lambda: np.ones(2, np.float32))
    assert not list(tmp_path.iterdir())


def test_results_of_other_settings_are_not_taken_for_these(sweep, capsys):
    (trial,) = trials_of(sweep, "a=1")
    made_up(trial, score=1.0)
    with pytest.raises(SystemExit) as stop:
        sweep("--config.b=y", "--vary=a=1")
    assert stop.value.code == 2
    assert "was made with b=x and not y. Give another --workdir" in capsys.readouterr().err


def test_a_setting_may_be_a_tuple(sweep):
    sweep.config.write_text(sweep.config.read_text().replace('b: str = "x"', "b: tuple = (1, 2)"))
    (trial,) = trials_of(sweep, "a=1")
    made_up(trial, score=1.0)
    assert trial.settings["b"] == (1, 2) and trial.result()["figures"] == {"score": 1.0}


def test_a_value_with_commas_is_quoted_and_a_plus_splits_only_where_keys_have_one(sweep):
    sweep.config.write_text(sweep.config.read_text().replace('b: str = "x"', 'b: str = "x"\n    c: tuple[int, ...] = ()'))
    trials = trials_of(sweep, 'c="2,4,8","2,3,4,8",5', "b=lapq+adaround,")
    assert [(t.settings["c"], t.settings["b"]) for t in trials] == list(itertools.product([(2, 4, 8), (2, 3, 4, 8), (5,)], ["lapq+adaround", ""]))
    assert len({t.path for t in trials}) == 6 and [t.settings["b"] for t in trials_of(sweep, "b=")] == [""]
    assert [(t.settings["a"], t.settings["c"]) for t in trials_of(sweep, 'a+c="1+2,3",4+5')] == [(1, (2, 3)), (4, (5,))]


@pytest.mark.parametrize("text", ['{"settings"', "[1]", "{}", '{"settings": {}, "figures": {}, "quantize_seconds": null}'])
def test_a_result_that_cannot_be_read_is_named(text, sweep, capsys):
    (trial,) = trials_of(sweep, "a=1")
    trial.path.mkdir(parents=True)
    (trial.path / "result.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        sweep("--vary=a=1")
    assert stop.value.code == 2
    assert re.search(r"a=1/result.json cannot be read as a result: .*Remove .*a=1, and its trial", capsys.readouterr().err)


def test_a_setting_may_be_none(sweep):
    sweep.config.write_text(sweep.config.read_text().replace('b: str = "x"', "b: int | None = 3"))
    assert [trial.settings["b"] for trial in trials_of(sweep, "b=None,5")] == [None, 5]
    with pytest.raises(ValueError, match=r"config\.b=x: write a value of type int or None"):
        trials_of(sweep, "b=x")


def test_a_trial_that_cannot_be_started_gives_its_cores_back(sweep, monkeypatch):
    last = threading.Event()

    def start(trial, cores, environment):
        number = int(trial.setting["a"])
        if number == 2:
            raise OSError("no process")
        if number == 3:
            last.set()
        return "ended" if last.wait(10) else "the last was not started"

    monkeypatch.setattr(module, "_run", start)
    with pytest.raises(OSError, match="no process"):
        run_all(trials_of(sweep, "a=1,2,3"), 2, sweep.folder / "compiled")
    assert last.is_set()


def test_arguments_may_come_from_a_file(sweep, tmp_path):
    (tmp_path / "some.sweep").write_text("# What it shows.\n--vary=a=1,2  --vary=b='p q'\n")
    trials = sweep(f"@{tmp_path / 'some.sweep'}", "--jobs=0")
    assert [t.setting for t in trials] == [{"a": "1", "b": "p q"}, {"a": "2", "b": "p q"}]
    assert len({t.path for t in trials}) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing varies. Give --vary=KEY=VALUE"),
        (["--vary=a"], "--vary=a: not understood"),
        (["--vary=a+b=1"], r"Write KEY=VALUE,VALUE, or KEY\+KEY"),
        (['--vary=b="1,2'], "not understood.*double quotes around each value"),
        (["--vary=a=1,1"], "a=1 comes twice"),
        (["--vary=c=1"], "has no such key. It has a, b, seed"),
        (["--vary=a=one"], "of type int"),
        (["--vary=a=1", "--shard=0/2"], "--shard=0/2: write 1/N to N/N"),
        (["--vary=a=1", "--shard=3/2"], "--shard=3/2: write 1/N to N/N"),
        (["--vary=a=1", "--jobs=-1"], "--jobs=-1: write at least 1"),
        (["--vary=a=1", "--wrong=1"], "Overrides are --config.KEY=VALUE"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_work(arguments, words, sweep, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep(*arguments)
    assert stop.value.code == 2
    assert not sweep.built()
    assert re.search(words, capsys.readouterr().err)
