"""The front door, end to end on a trained network."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax.formats import Uniform

FAST = solvers.brecq(num_steps=120, act_steps=30)


def quantize(digits, **settings):
    settings = {"solver": FAST, "progress": False, **settings}
    return brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], **settings)


def accuracy(outputs, digits):
    return float(np.mean(np.asarray(outputs).argmax(-1) == digits.test_labels))


@pytest.fixture(scope="module")
def w3a8(digits):
    return quantize(digits, weights=Uniform(3))


def test_a_four_bit_model_still_works(digits):
    quantized = quantize(digits)
    float_accuracy = accuracy(digits.model.apply(digits.variables, digits.test_images), digits)
    assert accuracy(quantized(digits.test_images), digits) > float_accuracy - 0.02


def test_learned_rounding_beats_nearest_at_two_bits(digits):
    outputs = digits.model.apply(digits.variables, digits.test_images)
    errors = [
        float(jnp.mean(jnp.square(quantize(digits, weights=Uniform(2), activations=None, preset="brecq", solver=s)(digits.test_images) - outputs)))
        for s in (solvers.nearest(), solvers.brecq(num_steps=400))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_the_result_is_a_pytree_to_jit_and_differentiate(w3a8, digits):
    x = jnp.asarray(digits.test_images[:8])
    want = w3a8(x)
    np.testing.assert_allclose(jax.jit(lambda q, x: q(x))(w3a8, x), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(w3a8.apply_fn(w3a8.params, x), want, rtol=1e-4, atol=1e-4)
    assert np.isfinite(jax.grad(lambda x: w3a8(x).sum())(x)).all()
    assert jax.tree.structure(jax.tree.map(lambda a: a, w3a8)) == jax.tree.structure(w3a8)
    assert w3a8(x[:3]).shape == (3, 10)


def test_the_result_is_jitted_as_it_is(w3a8, digits):
    np.testing.assert_allclose(jax.jit(w3a8)(digits.test_images[:2]), w3a8(digits.test_images[:2]), rtol=1e-5)


def test_a_weight_that_several_blocks_read_is_named():
    w, x = jax.random.normal(jax.random.key(0), (6, 6)), np.asarray(jax.random.normal(jax.random.key(1), (16, 6)))

    def apply_fn(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    notes = brecq_jax.quantize(w, apply_fn, x, solver=solvers.annealed(num_steps=2), blocks="layer", progress=False).report.notes
    assert any("is read in 2 blocks, and rounded for the errors of" in note for note in notes)


def test_two_models_of_one_program_are_called_in_turn():
    """The graph is traced while the first call is, and serves both: `pad` holds a number that must not belong to that trace."""

    def padded(w, x):
        return jax.nn.relu(jnp.pad(x, ((0, 0), (0, 3)))) @ w

    w, x = jax.random.normal(jax.random.key(0), (8, 4)), jax.random.normal(jax.random.key(1), (16, 5))
    for bits in (8, 4):
        quantized = brecq_jax.quantize(
            w, padded, x, weights=Uniform(bits), activations=Uniform(8), preset=None, solver=solvers.nearest(), progress=False
        )
        np.testing.assert_array_equal(quantized(x[:3]), quantized(x[:3]))


def test_the_result_can_be_sharded(w3a8, digits):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.device_put(w3a8, jax.NamedSharding(mesh, jax.P()))
    np.testing.assert_array_equal(replicated(digits.test_images[:4]), w3a8(digits.test_images[:4]))


def test_dequantized_params_serve_the_users_own_apply(digits):
    quantized = quantize(digits, activations=None, solver=solvers.nearest())
    assert jax.tree.structure(quantized.dequantized()) == jax.tree.structure(digits.variables)
    x = digits.test_images[:8]
    np.testing.assert_allclose(quantized(x), digits.model.apply(quantized.dequantized(), x), rtol=1e-5, atol=1e-5)
    kernel = quantized.params["params"]["stem"]["kernel"]
    assert isinstance(kernel, brecq_jax.QArray)
    assert len(np.unique(np.asarray(kernel.codes))) <= 16


def test_same_key_same_bits(digits, w3a8):
    again = quantize(digits, weights=Uniform(3))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(w3a8))


@pytest.mark.parametrize("solver", [FAST, solvers.adaround(num_steps=60, act_steps=20)], ids=["brecq", "adaround"])
@pytest.mark.parametrize("preset", [None, "brecq", "uniform"])
def test_no_block_is_worse_than_its_guess(digits, solver, preset):
    report = quantize(digits, weights=Uniform(3), activations=Uniform(4), preset=preset, solver=solver).report
    assert report.blocks
    assert all(b.error_after <= b.error_before for b in report.blocks)
    assert {b.solver for b in report.blocks} == {"rounding", "steps"}


def test_zero_steps_is_nearest(digits):
    one = quantize(digits, solver=solvers.brecq(num_steps=0, act_steps=0))
    two = quantize(digits, solver=solvers.nearest())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(two))


def test_caches_beyond_the_budget_live_on_disk_and_change_nothing_but_the_draw(digits):
    quantized = quantize(digits, memory_budget_gb=0.0005, activations=None, solver=solvers.brecq(num_steps=20))
    assert all(b.error_after <= b.error_before for b in quantized.report.blocks)


def test_save_and_restore_give_identical_bits_in_a_fresh_process(w3a8, digits, tmp_path):
    brecq_jax.save(tmp_path / "model", w3a8)
    np.save(tmp_path / "x.npy", digits.test_images[:16])
    np.save(tmp_path / "y.npy", w3a8(digits.test_images[:16]))
    script = (
        "import sys, numpy as np, brecq_jax\n"
        "q = brecq_jax.restore(sys.argv[1] + '/model', brecq_jax.models.DigitsNet().apply)\n"
        "y = np.asarray(q(np.load(sys.argv[1] + '/x.npy')))\n"
        "assert (y == np.load(sys.argv[1] + '/y.npy')).all()\n"
        "assert 'stem' in str(q.report)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    restored = brecq_jax.restore(tmp_path / "model", digits.model.apply)
    assert restored.report == w3a8.report
    assert jax.tree.structure(restored.params) == jax.tree.structure(w3a8.params)


def test_no_float_copy_of_a_weight_is_saved(w3a8, tmp_path):
    brecq_jax.save(tmp_path / "model", w3a8)
    size = sum(f.stat().st_size for f in (tmp_path / "model").rglob("*") if f.is_file())
    assert size < w3a8.report.float_bits / 8


@pytest.mark.parametrize("damage", ["truncate arrays", "no meta", "bad json", "version", "flip", "other model"])
def test_damaged_checkpoints_are_refused(w3a8, digits, tmp_path, damage):
    path = tmp_path / "model"
    brecq_jax.save(path, w3a8)
    meta, params = path / "brecq_jax.json", None
    if damage == "truncate arrays":
        for file in (path / "arrays").rglob("*"):
            if file.is_file() and file.stat().st_size > 500:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "no meta":
        meta.unlink()
    elif damage == "bad json":
        meta.write_text(meta.read_text()[:100])
    elif damage == "version":
        meta.write_text(meta.read_text().replace('"version": 3', '"version": 99'))
    elif damage == "flip":
        text = meta.read_text()
        at = text.index('"sha256": "') + 11
        meta.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    else:
        params = {"w": jnp.zeros(3)}
    with pytest.raises((ValueError, FileNotFoundError), match="restore"):
        brecq_jax.restore(path, digits.model.apply, params)


def test_paths_that_exist_are_refused(w3a8, tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        brecq_jax.save(tmp_path, w3a8)


def test_nnx_modules_go_through_the_front_door(tmp_path):
    from flax import nnx

    module = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    params, apply_fn = brecq_jax.from_nnx(module)
    x = jax.random.normal(jax.random.key(0), (64, 6))
    quantized = brecq_jax.quantize(params, apply_fn, x, weights=Uniform(8), solver=solvers.nearest(), progress=False)
    np.testing.assert_allclose(quantized(x), module(x), atol=0.05)
    brecq_jax.save(tmp_path / "m", quantized)
    with pytest.raises(ValueError, match="params="):
        brecq_jax.restore(tmp_path / "m", apply_fn)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "m", apply_fn, params)(x), quantized(x))


def test_scanned_stacks_keep_their_shape():
    def apply_fn(params, x):
        return jax.lax.scan(lambda c, w: (c + jax.nn.relu(c @ w), None), x, params["layers"])[0] @ params["head"]

    params = {"layers": jax.random.normal(jax.random.key(0), (3, 8, 8)) / 3, "head": jax.random.normal(jax.random.key(1), (8, 4))}
    x = jax.random.normal(jax.random.key(2), (64, 8))
    quantized = brecq_jax.quantize(params, apply_fn, x, activations=Uniform(8), solver=FAST, progress=False)
    assert quantized.params["layers"].shape == (3, 8, 8)
    assert quantized.params["layers"].grid.scale.shape == (24, 1, 1)
    error = jnp.mean(jnp.square(quantized(x) - apply_fn(params, x))) / jnp.mean(jnp.square(apply_fn(params, x)))
    assert error < 0.02
    with pytest.raises(ValueError, match="One leaf holds them all"):
        brecq_jax.quantize(params, apply_fn, x, weights={r"layers\[0\]": Uniform(4), ".*": Uniform(8)}, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weights": {"blocks?/nothing": Uniform(4)}}, ValueError, "matched no op"),
        ({"weights": {".*": Uniform(4), "stem/kernel": Uniform(8)}}, ValueError, "never used"),
        ({"weights": 4}, TypeError, "Write a format"),
        ({"weights": {".*": 4}}, TypeError, "Write a format"),
        ({"activations": {"nothing": Uniform(8)}}, ValueError, "activations: the rule"),
        ({"activations": Uniform(8, granularity=16)}, ValueError, "per tensor"),
        ({"weights": Uniform(4, granularity=7)}, ValueError, "group size 7"),
        ({"weights": {"stem(": Uniform(4)}}, ValueError, r"the rule 'stem\(' is no regular expression"),
        ({"solver": "adaround"}, TypeError, r"Write solvers.by_name\('adaround'\)"),
        ({"solver": solvers.nearest}, TypeError, r"Call it: solvers.nearest\(\)"),
        ({"key": 0}, TypeError, r"Write jax.random.key\(0\)"),
        ({"mesh": 1}, TypeError, r"mesh=1 is a int. Write jax.make_mesh"),
        ({"preset": "BRECQ"}, ValueError, "preset='BRECQ'"),
        ({"blocks": "blok"}, ValueError, "blocks='blok'"),
        ({"blocks": ["nothing.*"]}, ValueError, "matched no op"),
        ({"blocks": [".*conv1.*"]}, ValueError, "do not follow each other"),
    ],
)
def test_bad_requests_are_refused_before_any_work(digits, change, error, words):
    with pytest.raises(error, match=words):
        quantize(digits, **change)


def test_bad_inputs_are_refused_before_any_work(digits):
    def call(params=digits.variables, images=digits.train_images[:16]):
        return brecq_jax.quantize(params, digits.model.apply, images, progress=False)

    with pytest.raises(TypeError, match="quantized already.*dequantized"):
        call(params=quantize(digits, solver=solvers.nearest()).params)
    broken = jax.tree.map(lambda a: a.at[0].set(jnp.nan) if a.ndim == 4 else a, digits.variables)
    with pytest.raises(ValueError, match="conv1/kernel .* not finite"):
        call(params=broken)
    with pytest.raises(ValueError, match="not finite"):
        call(images=np.full((16, 8, 8, 1), np.inf, np.float32))
    with pytest.raises(ValueError, match="could not be read with calibration inputs of float32"):
        call(images=np.zeros((16, 8, 8, 2), np.float32))
    with pytest.raises(ValueError, match="empty"):
        call(images=[])
    with pytest.raises(ValueError, match="7 .*8"):
        call(images=digits.train_images[:7])


@dataclasses.dataclass
class Unhashable:
    scale: float

    def __call__(self, params, x):
        return self.scale * x @ params


def test_functions_that_cannot_be_called_are_refused_with_what_to_write():
    params, x = jnp.ones((4, 4)), np.ones((8, 4), np.float32)
    with pytest.raises(TypeError, match="Unhashable that has no hash.*Write lambda params, inputs"):
        brecq_jax.quantize(params, Unhashable(2.0), x, progress=False)
    for inputs, shapes in ((None, r"float32\[4\]"), (lambda e: e, r"\(float32\[4\], float32\[4\]\)")):
        with pytest.raises(ValueError, match=f"inputs of {shapes} each.*missing 1 required(.|\n)*inputs=lambda e: e"):
            brecq_jax.quantize(params, lambda p, x, t: x @ p + t, [(x, x)], inputs=inputs, progress=False)


def test_the_report_lists_everything(w3a8):
    report = w3a8.report
    assert "stem/kernel" in report.plan
    assert report.size_bits < report.float_bits / 6
    assert {t.name for t in report.tensors if t.format != "float"} == {t.name for t in report.tensors if t.name.endswith("kernel")}
    assert len(report.activations) == len({a.name for a in report.activations}) > 5
    assert type(report).from_json(report.to_json()) == report


def test_presets_say_what_they_do(digits):
    graph = brecq_jax.trace(digits.model.apply, digits.variables, digits.train_images[:2])
    brecq = brecq_jax.make_plan(graph, Uniform(2), Uniform(4), preset="brecq")
    names = list(brecq.activations)
    assert [brecq.weights[n].bits for n in brecq.weights] == [8, *[2] * (len(brecq.weights) - 2), 8]
    assert brecq.activations[names[0]] is None
    assert (brecq.activations[names[1]].bits, brecq.activations[names[2]].bits, brecq.activations[names[-1]].bits) == (8, 4, 8)
    uniform = brecq_jax.make_plan(graph, Uniform(2), Uniform(4), preset="uniform")
    assert [f.bits for f in uniform.activations.values()] == [8] + [4] * (len(names) - 1)
    assert (brecq.whole_values, uniform.whole_values) == (True, False)
    ruled = brecq_jax.make_plan(graph, {"stem.*": Uniform(3), ".*": Uniform(2)}, preset="brecq")
    assert ruled.weights["stem/kernel"].bits == 3


def test_fisher_weights_are_the_squared_gradients_of_the_sampled_loss(digits):
    """Against jax.grad of a hand-written tail: the head's logits, whose gradient is p − onehot(y)."""
    from brecq_jax._calibrate import fisher
    from brecq_jax._model import Problem

    problem = Problem(digits.model.apply, digits.variables, None, digits.train_images[:8], 8)
    blocks = problem.units(8)
    key = jax.random.key(3)
    got = fisher(problem, blocks, key)[-1][0]
    logits = digits.model.apply(digits.variables, digits.train_images[:8])
    keys = jax.random.split(key, 8)
    labels = jnp.stack([jax.random.categorical(k, l[None])[0] for k, l in zip(keys, logits, strict=True)])
    want = jnp.square(jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10))
    np.testing.assert_allclose(got, want / want.mean(), rtol=2e-3, atol=1e-4)


def test_one_program_is_compiled_per_block_shape(digits):
    from brecq_jax.solvers._loop import _step

    before = _step._cache_size()
    quantize(digits, weights=Uniform(5), activations=None, solver=solvers.brecq(num_steps=7))
    blocks = brecq_jax.trace(digits.model.apply, digits.variables, digits.train_images[:32])
    from brecq_jax._blocks import partition

    assert _step._cache_size() - before == len({b.program for b in partition(blocks)[0]})


def test_a_depthwise_convolution_by_shifted_products_is_the_convolution():
    from brecq_jax._fast_ops import _shifted_products

    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 6))
    for strides, padding, dilation in (((1, 1), ((1, 1), (1, 1)), (1, 1)), ((2, 2), ((0, 1), (0, 1)), (1, 1)), ((1, 2), ((2, 0), (1, 3)), (2, 1))):
        want = jax.lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6
        )
        np.testing.assert_allclose(_shifted_products(x, kernel, strides, padding, dilation), want, rtol=1e-4, atol=1e-5)


def test_a_fast_depthwise_convolution_gives_the_dtype_that_was_asked_for():
    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=8, preferred_element_type=jnp.float32
        )

    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 1, 8), jnp.bfloat16)}
    images = jax.random.normal(jax.random.key(1), (16, 6, 6, 8), jnp.bfloat16)
    quantized = brecq_jax.quantize(params, apply, images, weights=Uniform(8), activations=Uniform(8), solver=solvers.nearest(), progress=False)
    want = apply(params, images)
    assert quantized(images).dtype == want.dtype == jnp.float32
    np.testing.assert_allclose(quantized(images), want, atol=0.2)


def test_sizes_are_counted_in_the_numbers_that_came():
    params = {"a": jnp.ones((16, 8), jnp.bfloat16), "b": jnp.ones((8, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.float32)}
    rules = {"a": Uniform(8), "b": None}
    args = params, lambda p, x: (x @ p["a"]) @ p["b"] + p["bias"], jnp.ones((16, 16), jnp.bfloat16)
    report = brecq_jax.quantize(*args, weights=rules, preset=None, solver=solvers.nearest(), progress=False).report
    plan = brecq_jax.make_plan(brecq_jax.trace(args[1], params, args[2]), weights=rules, preset=None)
    assert plan.float_bits == report.float_bits == 16 * (16 * 8 + 8 * 3) + 32 * 3
    assert plan.size_bits == report.size_bits == 8 * (16 * 8) + 8 * (32 + 8) + 16 * (8 * 3) + 32 * 3


def test_settings_have_one_home():
    homes = solvers.Reconstruction, solvers.RectifiedSigmoid, solvers.StraightThrough, solvers.SecondOrder
    names = [{f.name for f in dataclasses.fields(home)} for home in homes]
    assert {"num_steps", "learning_rate", "batch_size"} <= names[0] and {"regularizer", "warmup", "beta"} <= names[1]
    assert not names[0] & names[1] and not names[0] & names[2]


def test_pixels_are_quantized_where_they_are_read():
    """A rule of its own for an input of whole numbers, under a preset that quantizes whole values: its points are no whole numbers."""
    draw = np.random.default_rng(0)
    params = {"first": draw.normal(size=(12, 8)).astype(np.float32), "last": draw.normal(size=(8, 4)).astype(np.float32)}
    pixels = draw.integers(0, 256, (64, 12), np.uint8)

    def apply_fn(params, x):
        return jax.nn.relu(x.astype(jnp.float32) @ params["first"]) @ params["last"]

    rules = {"first": Uniform(4), ".*": None}
    quantized = brecq_jax.quantize(params, apply_fn, pixels, weights={"last": Uniform(8)}, activations=rules, preset="brecq", solver=solvers.nearest(), progress=False)
    grid = jax.tree.map(jnp.squeeze, quantized.activations["first"])
    codes = jnp.clip(jnp.round(pixels / grid.scale) + grid.zero_point, 0, 15)
    assert not np.allclose(grid.scale, jnp.round(grid.scale))
    wanted = apply_fn(quantized.dequantized(), (codes - grid.zero_point) * grid.scale)
    np.testing.assert_allclose(quantized(pixels), wanted, rtol=1e-5, atol=1e-3)
