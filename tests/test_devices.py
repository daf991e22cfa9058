"""Batches that many devices share give what one device gives: forced CPU devices, and two processes on this machine."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import brecq_jax
from brecq_jax import _sharding
from brecq_jax.__main__ import make_mesh

CONFIG = """
    import dataclasses
    import jax
    import numpy as np
    from brecq_jax import Experiment, solvers
    from brecq_jax.formats import Uniform

    def apply_fn(params, x):
        for kernel in params["kernels"]:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return x.mean((1, 2)) @ params["head"]

    @dataclasses.dataclass
    class Config:
        method: str = "adaround"
        num_steps: int = 60
        count: int = 45  # 40 of them to learn from

        def build(self):
            *keys, key_inputs = jax.random.split(jax.random.key(0), 4)
            params = {"kernels": [jax.random.normal(k, (3, 3, 4, 4)) / 4 for k in keys[:2]], "head": jax.random.normal(keys[2], (4, 3))}
            inputs = np.asarray(jax.random.normal(key_inputs, (self.count, 5, 5, 4)))
            settings = dict(num_steps=self.num_steps, act_steps=self.num_steps, batch_size=8)
            return Experiment(
                params, apply_fn, inputs, lambda exact, quantized: {"error": float(((exact(inputs) - quantized(inputs)) ** 2).mean())},
                weights=Uniform(3), activations=Uniform(8), solver=solvers.by_name(self.method, **settings), blocks="layer",
            )
"""


SHARED = """
    import sys
    import jax
    import numpy as np
    import brecq_jax
    from brecq_jax.__main__ import load_config

    def run(devices, method, num_steps, count):
        made = load_config(sys.argv[1], [f"--config.method={method}", f"--config.num_steps={num_steps}", f"--config.count={count}"]).build()
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        quantized = brecq_jax.quantize(
            made.params, made.apply_fn, made.calib_ds, weights=made.weights, activations=made.activations, solver=made.solver,
            blocks=made.blocks, mesh=mesh, progress=False,
        )
        leaves = jax.tree.leaves(quantized.params, is_leaf=lambda x: isinstance(x, brecq_jax.QArray))
        return np.concatenate([np.ravel(x.codes) for x in leaves]), made.evaluate(lambda x: made.apply_fn(made.params, x), quantized)["error"]

    one, error = run(1, "adaround", 60, 45)
    for devices in (2, 4, 8):
        codes, own_error = run(devices, "adaround", 60, 45)
        assert np.array_equal(codes, one), (devices, np.mean(codes == one))
        np.testing.assert_allclose(own_error, error, rtol=0.05)  # ranges of activations are learned, too, and are no codes
    # Fast rates, many steps, and 39 examples for two devices: the codes part, the errors stay near.
    fast, fast_error = run(1, "annealed", 300, 44)
    codes, own_error = run(2, "annealed", 300, 44)
    assert np.abs(codes.astype(int) - fast).max() <= 1 and own_error < 1.5 * fast_error, (own_error, fast_error)
"""


COINS = """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from brecq_jax._model import dropped

    mesh = jax.make_mesh((8,), ("data",))
    x = np.zeros((16, 5, 5, 3), np.float32)
    toss = jax.jit(lambda key, x: dropped(0.5, key, x, x + 1), out_shardings=NamedSharding(mesh, PartitionSpec("data")))
    spread, key = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), jax.random.key(0)
    assert "all-gather" not in toss.lower(key, spread).compile().as_text()
    np.testing.assert_array_equal(toss(key, spread), dropped(0.5, key, x, x + 1))
"""


def test_devices_toss_the_coins_of_their_own_examples():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(COINS)], env=environment, check=True)


IDLE = """
    import jax
    import jax.numpy as jnp
    import brecq_jax
    from brecq_jax import solvers
    from brecq_jax._quantize import _idle

    mesh = jax.make_mesh((8,), ("data",))
    x, features = jax.random.normal(jax.random.key(0), (8, 4)), lambda w, x: {"hidden": [], "scores": [], "logits": x @ w}
    distilled = solvers.distilled(features, solvers.Distillation(num_steps=1, batch_size=2, checks=1))
    quantized = brecq_jax.quantize(jnp.eye(4), lambda w, x: x @ w, x, solver=distilled, mesh=mesh, progress=False)
    assert "mesh: solvers.distilled works on one device; the others are idle (docs/pods.md)" in quantized.report.notes
    assert _idle(distilled, mesh) and not _idle(distilled, None)
    shared = solvers.second_order(), solvers.lapq(), solvers.adaround(), solvers.annealed(), lambda problem, guess, key: (guess, ())
    assert not any(_idle(solver, mesh) for solver in shared)
"""


def test_devices_that_a_solver_leaves_idle_are_told_of():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(IDLE)], env=environment, check=True)


PASSES = """
    import functools
    import sys
    import jax
    import numpy as np
    import brecq_jax
    from brecq_jax import solvers
    from brecq_jax.__main__ import load_config
    from brecq_jax.solvers import _quadratic
    from brecq_jax.solvers._solver import split
    from brecq_jax.solvers._walk import Walk
    from brecq_jax._calibrate import fisher, observe
    from brecq_jax._model import Problem
    from brecq_jax._stream import Stream
    from brecq_jax._interpret import param_values
    from brecq_jax.formats import Affine, Multipoint, Uniform

    made = load_config(sys.argv[1], ["--config.count=150"]).build()  # five batches of 32: three for two devices, the last one nearly empty
    plan = brecq_jax.make_plan(brecq_jax.trace(made.apply_fn, made.params, made.calib_ds[:2]), Uniform(3), Uniform(8))

    def passes(mesh):
        problem = Problem(made.apply_fn, made.params, plan, made.calib_ds, len(made.calib_ds), blocks="layer", mesh=mesh)
        names = [name for name, format in plan.activations.items() if format]
        weights = fisher(problem, problem.units(32), jax.random.key(1), chunk=4)
        graph, blocks = problem.graph(32), problem.units(32)
        stream, outputs = Stream(graph, blocks, made.calib_ds, 32, mesh=mesh), []
        for block in blocks:
            params = param_values(graph, block, problem.leaves)
            outputs.append(stream.outputs(block, params))
            stream.advance(block, params, outputs=outputs[-1])
        return observe(problem, problem.leaves, names), weights, outputs

    one = passes(None)
    mesh, two = jax.make_mesh((8,), ("data",)), jax.make_mesh((2, 4), ("data", "model"), axis_types=2 * (jax.sharding.AxisType.Auto,))
    for m in (two, mesh):
        jax.tree.map(np.testing.assert_array_equal, passes(m), one)

    def sums(mesh):
        problem = Problem(made.apply_fn, made.params, plan, made.calib_ds, len(made.calib_ds), blocks="layer", mesh=mesh)
        walk = Walk(problem)
        block, op, kept = walk.blocks[0], walk.blocks[0].ops[0], functools.partial(_quadratic.gram, walk.blocks[0].program, 0)
        return walk.summed(op, block, [walk.rough], 10**6, kept, param_values(walk.graph, block, walk.leaves), list(block.constants))

    gram = sums(None)
    x = np.asarray(made.calib_ds)[split(150)[0]]
    centre = np.einsum("bijc,bijd->cd", x, x)
    np.testing.assert_allclose(gram.reshape(9, 4, 9, 4)[4, :, 4], centre, rtol=1e-4, atol=1e-3)
    for m in (two, mesh):
        np.testing.assert_allclose(sums(m), gram, rtol=1e-5, atol=1e-3)  # none that fills up counts

    def quantized(mesh, solver, weights):
        return brecq_jax.quantize(
            made.params, made.apply_fn, made.calib_ds, weights=weights, activations=None, solver=solver, blocks="layer", mesh=mesh, progress=False
        )

    def codes(q):
        return np.concatenate([np.ravel(x.codes) for x in jax.tree.leaves(q.params, is_leaf=lambda x: isinstance(x, brecq_jax.QArray))])

    alone, shared = (
        brecq_jax.mixed_precision.measure(made.params, made.apply_fn, made.calib_ds, activations=(Uniform(4), Uniform(8)), mesh=m, progress=False)
        for m in (None, two)
    )
    assert alone.losses == shared.losses and alone.interactions == shared.interactions and alone.interactions

    one, shared = (quantized(m, solvers.lapq(iterations=1, batch_size=16), Affine(3, granularity="per_tensor")) for m in (None, two))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(shared), jax.tree.leaves(one))

    for solver, weights in ((solvers.second_order(), Uniform(3)), (solvers.multipoint(), Multipoint(3, points=3, tolerance=0.1))):
        alone, shared = quantized(None, solver, weights), quantized(mesh, solver, weights)
        agreement = np.mean(codes(alone) == codes(shared))
        assert agreement >= 0.99, (solver, agreement)  # sums are added up in another order
        errors = [made.evaluate(lambda x: made.apply_fn(made.params, x), q)["error"] for q in (alone, shared)]
        np.testing.assert_allclose(*errors, rtol=0.02)

    def constrained(params, x):  # as models for pods have them
        return made.apply_fn(params, jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(two, jax.sharding.PartitionSpec("data"))))

    settings = dict(weights=Uniform(3), activations=None, solver=solvers.second_order(), blocks="layer", progress=False)
    found = brecq_jax.quantize(made.params, constrained, made.calib_ds, mesh=two, **settings)
    assert np.mean(codes(found) == codes(quantized(two, solvers.second_order(), Uniform(3)))) == 1
"""


def test_passes_without_gradients_are_shared_and_give_the_bits_of_one_device(tmp_path):
    """Outputs of blocks, ranges' samples and Fisher weights: each device passes batches by itself. Sums of many batches part in the last bits."""
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(PASSES), str(tmp_path / "config.py")], env=environment, check=True)


def test_one_two_four_and_eight_devices_give_the_same_codes_and_do_not_stall(tmp_path):
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(SHARED), str(tmp_path / "config.py")], env=environment, check=True)


def test_two_processes_give_the_codes_of_one(tmp_path):
    """Over gloo on the loopback, Fisher weights included."""
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
    words = [sys.executable, "-m", "brecq_jax", f"--config={tmp_path / 'config.py'}", "--quiet", "--config.num_steps=20", "--config.method=brecq"]
    subprocess.run([*words, f"--workdir={tmp_path / 'one'}"], check=True)
    at = free_address()
    pair = [subprocess.Popen([*words, f"--workdir={tmp_path / 'two'}", f"--process={i}/2@{at}"]) for i in range(2)]
    assert [process.wait(timeout=600) for process in pair] == [0, 0]
    one, two = (jax.tree.leaves(brecq_jax.restore(tmp_path / name / "model", None).params) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4) if jnp.issubdtype(a.dtype, jnp.floating) else np.testing.assert_array_equal(a, b)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_processes_with_other_calibration_sets_are_refused(tmp_path):
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
    words = [sys.executable, "-m", "brecq_jax", f"--config={tmp_path / 'config.py'}", "--quiet", f"--workdir={tmp_path / 'run'}"]
    at = free_address()
    pair = [subprocess.Popen([*words, f"--process={i}/2@{at}", f"--config.count={45 + i}"], stderr=subprocess.PIPE, text=True) for i in range(2)]
    for process in pair:
        _, told = process.communicate(timeout=600)
        assert process.returncode != 0 and "the 2 processes of this run were given other calib_ds. Give each the same" in told


READ = """
    import sys
    import jax
    import numpy as np
    from brecq_jax import data

    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    calibration, scored = data.open_images(sys.argv[3])
    reds = [int(image[0, 0, 0]) for images, _ in data.stream(scored, np.asarray, 2) for image in images]
    print(len(calibration), *reds)
"""


def test_two_processes_share_out_the_images_of_a_folder(tmp_path):
    for n in range(9):
        Image.new("RGB", (4, 4), (10 * n, 0, 0)).save(tmp_path / f"{n}.png")
    words = [sys.executable, "-c", textwrap.dedent(READ), free_address()]
    pair = [subprocess.Popen([*words, str(i), str(tmp_path)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    assert [process.communicate(timeout=300)[0].split() for process in pair] == [["5", "10", "50"], ["5", "30", "70"]]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_examples_that_cannot_be_shared_evenly_are_filled_up():
    mesh = _sharding.data_mesh(jax.make_mesh((1,), ("data",)))
    np.testing.assert_array_equal(_sharding.spread(mesh, np.arange(3)), np.arange(3))
    key = jax.random.key(1)
    assert jax.random.key_data(_sharding.everywhere(mesh, key)).tolist() == jax.random.key_data(key).tolist()


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="Call one 'data'"):
        _sharding.data_mesh(jax.make_mesh((1,), ("batch",)))
    with pytest.raises(ValueError, match="--devices=9"):
        make_mesh(9, "")
    for words in ("2/2@localhost:1", "0/2", "somewhere"):
        with pytest.raises(ValueError, match="write I/N@HOST:PORT"):
            make_mesh(1, words)
    for process in ("auto", "0/2@localhost:1"):
        with pytest.raises(ValueError, match=f"--devices=4 with --process={process}: .*Leave --devices out"):
            make_mesh(4, process)
