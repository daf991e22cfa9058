"""Sensitivities are what each configuration gives by itself."""

import dataclasses
import itertools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import mixed_precision, solvers
from brecq_jax.__main__ import load_config
from brecq_jax._calibrate import Hooks, forward, learned_outputs
from brecq_jax._interpret import param_values
from brecq_jax._model import Problem
from brecq_jax._plan import make_plan
from brecq_jax._qarray import quantize_array
from brecq_jax.formats import Multipoint, Uniform
from brecq_jax.mixed_precision.sensitivities import READS, divergence
from brecq_jax.solvers.nearest import fit_activations

CHOICES = (Uniform(2, granularity="per_channel"), Uniform(3, granularity="per_channel"))
COUNT = 40  # no multiple of the batch


@pytest.fixture(scope="module")
def found(digits):
    return mixed_precision.measure(
        digits.variables, digits.model.apply, digits.train_images[:COUNT], weights=CHOICES, activations=(Uniform(4), Uniform(6)),
        preset="brecq", error=solvers.squared_error, progress=False,
    )  # fmt: skip


def naive(digits, changed, site=None, format=None):
    """The error of the blocks that hold these weights, each at its format, and of the value quantized; all else float."""
    images = jnp.asarray(digits.train_images[:COUNT])
    plan = make_plan(brecq_jax.trace(digits.model.apply, digits.variables, images), None, format, "brecq")
    problem = Problem(digits.model.apply, digits.variables, plan, images, COUNT)
    graph, total = problem.graph(COUNT), 0.0
    floats = solvers.nearest()(problem, brecq_jax.Quantized(digits.variables, {}, _program(digits)), None)[0] if site else None
    hooks = Hooks({site: format}, {site: fit_activations(problem, floats, problem.leaves).activations[site]}, True) if site else None
    values = dict(zip(graph.flat.inputs[graph.num_leaves :], [images], strict=True))
    for block in problem.units(COUNT):
        inputs, params = [values[i] for i in block.ins], param_values(graph, block, problem.leaves)
        targets = forward(block, inputs, params)
        rounded = list(params)
        for op, local in zip(block.ops, block.program.ops, strict=True):
            if op.weight in changed:
                axes = graph.weights[op.weight].channel_axes
                rounded[local.weight] = quantize_array(params[local.weight], changed[op.weight], axes).decode()
        outputs = forward(block, inputs, rounded, hooks)
        total += sum(float(jnp.mean(solvers.squared_error(outputs[p], targets[p], None))) for p in learned_outputs(graph, block))
        values.update(zip(block.outs, targets, strict=True))
    return total


def _program(digits):
    return brecq_jax._model.Program(digits.model.apply, (), True)


def test_each_choice_alone_is_its_block_with_nothing_else_quantized(digits, found):
    for name in ("blocks_0/conv1/kernel", "blocks_1/shortcut/kernel"):
        for format, loss in zip(CHOICES, found.losses[name], strict=True):
            assert loss == pytest.approx(naive(digits, {name: format}), rel=1e-4)


def test_activations_alone_too(digits, found):
    for site in ("blocks_1/conv1/kernel", "blocks_2/conv2/kernel"):
        for bits, loss in zip((4, 6), found.losses[READS + site], strict=True):
            assert loss == pytest.approx(naive(digits, {}, site, Uniform(bits)), rel=1e-3)


def test_a_set_of_weights_is_the_sum_of_all_sets_within_it(digits, found):
    members = ("blocks_1/conv1/kernel", "blocks_1/conv2/kernel", "blocks_1/shortcut/kernel")
    for size in (2, 3):
        for some in itertools.combinations(members, size):
            parts = [s for n in range(2, size + 1) for s in itertools.combinations(some, n)]
            predicted = sum(found.losses[n][0] for n in some) + sum(found.interactions[s] for s in parts)
            assert predicted == pytest.approx(naive(digits, dict.fromkeys(some, CHOICES[0])), rel=1e-4)


def test_what_the_preset_fixes_is_not_measured(found):
    assert "stem/kernel" not in found.losses and "head/kernel" not in found.losses and READS + "head/kernel" not in found.losses
    assert len(found.losses) == 7 + 5 and all(np.diff(own) < 0 for own in found.losses.values())


def test_side_by_side_is_one_by_one(digits, found, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "an accelerator")
    jax.clear_caches()
    other = mixed_precision.measure(
        digits.variables, digits.model.apply, digits.train_images[:COUNT], weights=CHOICES, activations=(Uniform(4), Uniform(6)),
        preset="brecq", error=solvers.squared_error, progress=False,
    )  # fmt: skip
    monkeypatch.undo()
    jax.clear_caches()
    for name, own in found.losses.items():
        np.testing.assert_allclose(other.losses[name], own, rtol=1e-3)
    for members, value in found.interactions.items():
        assert other.interactions[members] == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_a_file_holds_them(found, tmp_path):
    path = tmp_path / "sensitivities.json"
    found.save(path)
    assert mixed_precision.Sensitivities.load(path) == found
    assert found.measured_with == {"error": "squared_error", "solver": "nearest", "examples": COUNT}
    assert list(tmp_path.iterdir()) == [path]  # nothing is left of writing it


def test_a_file_that_was_not_written_whole_leaves_the_old_one(found, tmp_path, monkeypatch):
    path = tmp_path / "sensitivities.json"
    found.save(path)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(found, losses={}).save(path)
    assert mixed_precision.Sensitivities.load(path) == found


def test_a_file_from_before_what_it_was_measured_with_was_noted_is_read(found, tmp_path):
    path = tmp_path / "sensitivities.json"
    found.save(path)
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "measured_with"}))
    assert mixed_precision.Sensitivities.load(path) == dataclasses.replace(found, measured_with={})


@pytest.mark.parametrize(("text", "words"), [('{"weights": []}', "holds no sensitivities"), ("[]", "holds no sensitivities"), ("layer,us\n", "is no JSON")])
def test_a_file_of_something_else_is_refused(text, words, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        mixed_precision.Sensitivities.load(tmp_path / "other.json")


CONFIG = str(pathlib.Path(__file__).parents[2] / "configs/mixed_precision.py")


def test_the_config_refuses_a_file_that_was_measured_with_something_else(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(brecq_jax.models, "train_digits", lambda seed: digits)
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # no bar
    overrides = ["--config.choices=2,4", "--config.examples=16", f"--config.sensitivities={tmp_path / 'sensitivities.json'}"]
    plan = load_config(CONFIG, overrides).build().weights
    noted = mixed_precision.Sensitivities.load(tmp_path / "sensitivities.json").measured_with
    assert noted == {"error": "relative_error", "solver": "nearest", "examples": 16, "learned_steps": 0, "seed": 0}
    monkeypatch.setattr(mixed_precision, "measure", None)  # from here on there is only the file
    assert load_config(CONFIG, [*overrides, "--config.base=digits_w4a8 --config.seed=1"]).build().weights == plan
    for other, words in (
        ("choices=2,3", r"choices is \[2, 4\] there and \[2, 3\] here"),
        ("act_choices=8", r"act_choices is \[\] there and \[8\] here"),
        ("error=divergence", "error is relative_error there and divergence here"),
        ("examples=8", "examples is 16 there and 8 here"),
        ("learned_steps=5", "learned_steps is 0 there and 5 here"),
        ("base=digits_lapq", "preset is brecq there and uniform here"),
    ):
        with pytest.raises(ValueError, match=words + "(?s:.*)Give another file"):
            load_config(CONFIG, [*overrides, f"--config.{other}"]).build()


def test_a_picture_shows_them(found, tmp_path):
    assert mixed_precision.plot_sensitivities(found, tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for wanted in (True, False):
        losses = {name: own for name, own in found.losses.items() if name.startswith(READS) == wanted}
        assert mixed_precision.plot_sensitivities(dataclasses.replace(found, losses=losses), tmp_path / "part.png").exists()


def test_the_divergence_is_near_what_the_prediction_loses(digits):
    images = digits.train_images[:256]
    found = mixed_precision.measure(digits.variables, digits.model.apply, images, weights=(Uniform(4),), error=divergence, progress=False)
    log_p = jax.nn.log_softmax(digits.model.apply(digits.variables, images))
    rules = {"blocks_0/conv1/kernel": Uniform(4)}
    q = brecq_jax.quantize(digits.variables, digits.model.apply, images, weights=rules, activations=None, solver=solvers.nearest(), progress=False)
    measured = float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(q(images))), -1)))
    assert 0.3 < found.losses["blocks_0/conv1/kernel"][0] / measured < 3


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(4, name="head")(body(name="layers")(x, None)[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(jax.nn.relu(nn.Dense(16, name="up")(x))), None


def test_slices_of_one_parameter_are_one_decision():
    x = jax.random.normal(jax.random.key(1), (16, 8))
    model = Stacked()
    variables = model.init(jax.random.key(0), x)
    found = mixed_precision.measure(variables, model.apply, x, weights=CHOICES, progress=False)
    assert set(found.losses) == {"layers/up/kernel", "layers/down/kernel", "head/kernel"}
    graph = brecq_jax.trace(model.apply, variables, x)
    plan = brecq_jax.search(graph, found, mixed_precision.Budget(size_bits=make_plan(graph, CHOICES[0], None).size_bits + 500))
    slices = [format for name, format in plan.weights.items() if name.startswith("layers/up[")]
    assert len(slices) == 3 and len(set(slices)) == 1


def test_a_solver_learns_each_choice_beside_what_the_preset_fixes(digits):
    plans = []

    def spy(problem, guess, key):
        plans.append(problem.plan)
        return guess, ()

    model = digits.variables, digits.model.apply, digits.train_images[:8]
    mixed_precision.measure(*model, weights=CHOICES, preset="brecq", solver=spy, progress=False)
    for plan, format in zip(plans, CHOICES, strict=True):
        bits = {name: own.bits for name, own in plan.weights.items()}
        assert bits.pop("stem/kernel") == bits.pop("head/kernel") == 8 and set(bits.values()) == {format.bits}


def test_choices_may_have_a_solver_each(digits):
    choices, images = (Uniform(2), Multipoint(2, points=2, tolerance=0.0)), digits.train_images[:16]
    model, given = (digits.variables, digits.model.apply, images), [None, solvers.multipoint()]
    found = mixed_precision.measure(*model, weights=choices, solver=given, progress=False)
    assert found.measured_with["solver"] == "nearest, multipoint"
    coarse, fine = map(sum, zip(*found.losses.values(), strict=True))
    assert fine < coarse
    with pytest.raises(ValueError, match="there are 2 for 3 choices"):
        mixed_precision.measure(*model, weights=(Uniform(2), *choices), solver=given)


@pytest.mark.parametrize(
    ("choices", "words"), [((Uniform(2), None), "None is no format"), ((2, 4), "2 is no format"), (Uniform(4), "is a Uniform. Write a sequence")]
)
def test_what_is_no_choice_is_refused(digits, choices, words):
    with pytest.raises(TypeError, match=words):
        mixed_precision.measure(digits.variables, digits.model.apply, digits.train_images[:8], weights=choices)


@pytest.mark.parametrize("choices", [(), (Uniform(4), Uniform(2)), (Multipoint(3), Uniform(4))])
def test_choices_come_in_order(digits, choices):
    with pytest.raises(ValueError, match="Write them fewest bits first"):
        mixed_precision.measure(digits.variables, digits.model.apply, digits.train_images[:8], weights=choices)
