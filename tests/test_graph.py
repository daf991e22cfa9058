"""The program is read: every kind of model that users bring, and every refusal."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import brecq_jax
from brecq_jax._blocks import partition
from brecq_jax._interpret import param_values, run, whole
from brecq_jax.formats import Uniform

KEY = jax.random.key(0)


def interpret(graph, params, batch):
    """The graph run by the interpreter, without hooks."""
    block = whole(graph)

    @jax.jit
    def outputs(leaves, inputs):
        values = dict(zip(graph.flat.inputs[graph.num_leaves :], inputs, strict=True))
        return run(block.program, [values[i] for i in block.ins], param_values(graph, block, leaves), block.constants)

    return jax.tree.unflatten(graph.out_tree, outputs(jax.tree.leaves(params), jax.tree.leaves(batch)))


class Residual(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), (self.stride,) * 2, use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(y))
        y = nn.Conv(self.features, (3, 3), name="conv2")(y)
        if self.stride > 1:
            x = nn.Conv(self.features, (1, 1), (self.stride,) * 2, name="proj")(x)
        return nn.relu(x + y)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = Residual(8, name="b0")(x)
        x = nn.remat(Residual)(16, 2, name="b1")(x)
        x = nn.jit(Residual)(16, name="b2")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), feature_group_count=1, name="plain")(x)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2, name="dilated")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="strided")(x))
        return nn.ConvTranspose(6, (3, 3), strides=(2, 2), name="transposed")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return carry + nn.Dense(8, name="fc2")(nn.gelu(nn.Dense(16, name="fc1")(carry))), carry.mean()

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, means = scan(name="layers")(x, None)
        return nn.Dense(2, name="head")(x), means


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(20, 8, name="embed")
        return embed.attend(nn.gelu(nn.Dense(8, name="fc")(embed(ids))))


class Standardised(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (8, 4))
        kernel = (kernel - kernel.mean(0)) / (kernel.std(0) + 1e-5)
        return x @ kernel


class Encoder(nn.Module):
    """Post-LN attention with a mask, by einsum, as BERT."""

    @nn.compact
    def __call__(self, batch):
        x = nn.Embed(30, 8, name="words")(batch["ids"])
        for i in range(2):
            heads = [nn.DenseGeneral((2, 4), name=f"l{i}_{n}")(x) for n in "qkv"]
            scores = jnp.einsum("bqhd,bkhd->bhqk", heads[0], heads[1])
            scores = jnp.where(batch["mask"][:, None, None, :], scores, -1e9)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads[2])
            x = nn.LayerNorm(name=f"l{i}_n1")(x + nn.DenseGeneral(8, axis=(-2, -1), name=f"l{i}_out")(mixed))
            x = nn.LayerNorm(name=f"l{i}_n2")(x + nn.Dense(8, name=f"l{i}_fc2")(nn.gelu(nn.Dense(16, name=f"l{i}_fc1")(x))))
        return {"logits": nn.Dense(3, name="head")(x[:, 0]), "states": x}


@jax.custom_vjp
def straight(x):
    return jnp.round(x)


straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def dense_with_own_rule(x, w):
    return x @ w


dense_with_own_rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def plain(params, x):
    hidden = jax.jit(lambda a, w: jax.nn.relu(a @ w))(x, params["one"])
    hidden = straight(jnp.dot(hidden, params["two"].astype(jnp.bfloat16).astype(jnp.float32).T))
    return dense_with_own_rule(hidden, params["three"]), jnp.einsum("bi,io->bo", hidden, params["four"])


def plain_params():
    shapes = {"one": (6, 5), "two": (4, 5), "three": (4, 3), "four": (4, 2)}
    return {n: jax.random.normal(jax.random.fold_in(KEY, i), s) for i, (n, s) in enumerate(shapes.items())}


def images(*shape):
    return jax.random.normal(KEY, shape)


def sentences(batch=4):
    return {"ids": jnp.arange(batch * 6).reshape(batch, 6) % 30, "mask": jnp.arange(6)[None].repeat(batch, 0) < 5}


LINEN = {
    "residual net with remat, jit and batch norm": (Net(), lambda b: images(b, 8, 8, 3), 9),
    "convolutions": (Convolutions(), lambda b: images(b, 8, 8, 3), 6),
    "scan": (Scanned(), lambda b: images(b, 8), 7),
    "tied embedding": (Tied(), lambda b: jnp.arange(b * 3).reshape(b, 3) % 20, 3),
    "weight standardisation": (Standardised(), lambda b: images(b, 8), 1),
    "encoder": (Encoder(), sentences, 14),
    "1-D convolution": (nn.Sequential([nn.Conv(4, (3,)), nn.relu, nn.Conv(2, (3,))]), lambda b: images(b, 9, 3), 2),
    "3-D convolution": (nn.Sequential([nn.Conv(4, (3, 3, 3)), nn.relu, nn.Conv(2, (3, 3, 3))]), lambda b: images(b, 4, 4, 4, 2), 2),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_are_read_and_interpreting_equals_apply(name):
    model, make, ops = LINEN[name]
    batch = make(4)
    variables = model.init(KEY, batch)
    graph = brecq_jax.trace(model.apply, variables, batch)
    assert len(graph.ops) == ops
    want, got = jax.jit(model.apply)(variables, batch), interpret(graph, variables, batch)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "net"])
def test_names_and_blocks_do_not_depend_on_the_batch_size(name, granularity):
    model, make, _ = LINEN[name]
    variables = model.init(KEY, make(4))
    cuts = []
    for batch in (1, 4, 7):
        graph = brecq_jax.trace(model.apply, variables, make(batch))
        blocks, _ = partition(graph, granularity)
        cuts.append([(b.name, [op.name for op in b.ops]) for b in blocks])
        assert [op.name for b in blocks for op in b.ops] == [op.name for op in graph.ops]
    assert cuts[0] == cuts[1] == cuts[2]


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize("granularity", ["layer", "block", "stage"])
def test_blocks_run_one_after_the_other_are_the_program(name, granularity):
    model, make, _ = LINEN[name]
    batch = make(4)
    variables = model.init(KEY, batch)
    graph = brecq_jax.trace(model.apply, variables, batch)
    values = dict(zip(graph.flat.inputs[graph.num_leaves :], jax.tree.leaves(batch), strict=True))
    for block in partition(graph, granularity)[0]:
        params = param_values(graph, block, jax.tree.leaves(variables))
        values.update(zip(block.outs, run(block.program, [values[i] for i in block.ins], params, block.constants), strict=True))
    for i, want in zip(graph.flat.outputs, jax.tree.leaves(model.apply(variables, batch)), strict=True):
        if i in graph.by_example:
            np.testing.assert_allclose(values[i], want, rtol=2e-5, atol=2e-5)


def test_plain_functions_with_jit_casts_and_custom_rules_are_read():
    params, x = plain_params(), images(3, 6)
    graph = brecq_jax.trace(plain, params, x)
    assert [op.name for op in graph.ops] == ["one", "two", "three", "four"]
    assert graph.weights["two"].channel_axes == (0,)  # it is transposed on the way
    jax.tree.map(np.testing.assert_array_equal, interpret(graph, params, x), jax.jit(plain)(params, x))


def test_custom_gradient_rules_survive_interpretation():
    def f(params, x):
        return straight(x @ params["w"]).sum()

    params, x = {"w": images(4, 3)}, images(2, 4)
    graph = brecq_jax.trace(f, params, x)
    np.testing.assert_allclose(
        jax.grad(lambda p: interpret(graph, p, x))(params)["w"], jax.grad(lambda p: f(p, x))(params)["w"], rtol=1e-6
    )


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(3)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.blocks:
            x = x + nnx.relu(layer(x))
        return self.head(self.drop(self.norm(x)))


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return x + nnx.relu(layer(x))

        return self.head(forward(x, self.layers))


def test_nnx_modules_are_read_in_inference_mode():
    module, x = NnxNet(nnx.Rngs(0)), images(4, 6)
    params, apply_fn = brecq_jax.from_nnx(module)
    graph = brecq_jax.trace(apply_fn, params, x)
    assert [op.name for op in graph.ops] == ["blocks/0/kernel", "blocks/1/kernel", "blocks/2/kernel", "head/kernel"]
    np.testing.assert_array_equal(interpret(graph, params, x), jax.jit(apply_fn)(params, x))
    module.eval()
    np.testing.assert_allclose(apply_fn(params, x), module(x), rtol=1e-6)


def test_nnx_scan_is_unrolled():
    params, apply_fn = brecq_jax.from_nnx(NnxScanned(nnx.Rngs(0)))
    x = images(4, 6)
    graph = brecq_jax.trace(apply_fn, params, x)
    assert [op.name for op in graph.ops] == [f"layers[{i}]/kernel" for i in range(3)] + ["head/kernel"]
    np.testing.assert_allclose(interpret(graph, params, x), jax.jit(apply_fn)(params, x), rtol=1e-6)


class NnxDrawing(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(6, 6, rngs=rngs), rngs=rngs)
        self.rngs = nnx.Rngs(1)

    def __call__(self, x):
        return self.rnn(x)[:, -1] + jax.random.normal(self.rngs(), (6,))


def test_nnx_modules_that_draw_give_the_same_draws_in_each_call():
    params, apply_fn = brecq_jax.from_nnx(NnxDrawing(nnx.Rngs(0)))
    x = images(4, 2, 6)
    graph = brecq_jax.trace(apply_fn, params, x)
    for _ in range(2):
        np.testing.assert_allclose(interpret(graph, params, x), apply_fn(params, x), rtol=1e-6)


def test_from_nnx_refuses_what_is_no_nnx_module():
    with pytest.raises(TypeError, match="module.apply"):
        brecq_jax.from_nnx(Net())


def test_linen_scan_is_unrolled_into_slices_of_the_stacked_leaf():
    model, make, _ = LINEN["scan"]
    variables = model.init(KEY, make(2))
    graph = brecq_jax.trace(model.apply, variables, make(2))
    assert [op.name for op in graph.ops][:2] == ["layers[0]/fc1/kernel", "layers[0]/fc2/kernel"] or [
        op.name for op in graph.ops
    ][:2] == ["layers/fc1[0]/kernel", "layers/fc2[0]/kernel"]
    assert [len(b.ops) for b in partition(graph)[0]] == [2, 2, 2, 1]


STACK = {"W": jax.random.normal(KEY, (4, 6, 6)) / 3, "out": jax.random.normal(KEY, (6, 3))}


def stacked(read):
    """A net of residual layers whose weights are one leaf: `read(W)` gives them, one by one."""

    def apply_fn(params, x):
        for w in read(params["W"]):
            x = x + jax.nn.relu(x @ w)
        return x @ params["out"]

    return apply_fn


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (x + jax.nn.relu(x @ w), None), x, params["W"])[0] @ params["out"]


READ = {
    "numbers": lambda w: [w[i] for i in range(4)],
    "from the end": lambda w: [w[i] for i in (-4, -3, -2, -1)],
    "iteration": list,
    "unstack": jnp.unstack,
    "one by one": lambda w: [w[i][:, :] for i in range(4)],
}


@pytest.mark.parametrize("read", READ)
def test_a_stacked_leaf_that_a_loop_indexes_is_read_as_a_scan_reads_it(read):
    graph = brecq_jax.trace(stacked(READ[read]), STACK, jnp.ones((2, 6)))
    scan = brecq_jax.trace(scanned, STACK, jnp.ones((2, 6)))
    assert graph.weights == scan.weights and [op.name for op in graph.ops] == [op.name for op in scan.ops] == ["W[0]", "W[1]", "W[2]", "W[3]", "out"]
    x = jax.random.normal(KEY, (2, 6))
    np.testing.assert_array_equal(interpret(graph, STACK, x), jax.jit(stacked(READ[read]))(STACK, x))


def test_two_leading_axes_are_indexed_at_once_and_one_after_the_other():
    params = {"W": jax.random.normal(KEY, (2, 3, 6, 6))}

    def apply_fn(params, x):
        for i in range(2):
            for j in range(3):
                x = x @ (params["W"][i, j] if i else params["W"][i][j])
        return x

    graph = brecq_jax.trace(apply_fn, params, jnp.ones((2, 6)))
    assert [op.name for op in graph.ops] == [f"W[{i}][{j}]" for i in range(2) for j in range(3)]
    x = jax.random.normal(KEY, (2, 6))
    np.testing.assert_array_equal(interpret(graph, params, x), jax.jit(apply_fn)(params, x))


@pytest.mark.parametrize(
    "read",
    {
        "one is not read": lambda w: [w[0], w[1], w[2]],
        "one has its channels on another axis": lambda w: [w[0], w[1].T, w[2], w[3]],
        "the whole is read, too": lambda w: [w[0], w[1], w[2], w[3] * w.mean()],
        "at two depths": lambda w: [w[0], w[1], w[2], w[3][0] * jnp.eye(6)],
        "two make one weight": lambda w: [w[0], w[1], w[2] * 0 + w[3]],
        "one is read in strides": lambda w: [w[0], w[1], w[2], jnp.repeat(w[3, ::2], 2, 0)],
        "two are joined, too": lambda w: [*w, jnp.concatenate([w[0], w[1]])[3:9]],
    }.items(),
    ids=lambda item: item[0],
)
def test_a_leaf_whose_slices_are_not_all_alike_stays_one_weight(read):
    apply_fn = stacked(read[1])
    graph = brecq_jax.trace(apply_fn, STACK, jnp.ones((2, 6)))
    assert set(graph.weights) == {"W", "out"}
    x = jax.random.normal(KEY, (2, 6))
    np.testing.assert_array_equal(interpret(graph, STACK, x), jax.jit(apply_fn)(STACK, x))


def test_a_slice_that_is_read_twice_is_one_weight_with_two_ops():
    for apply_fn in (stacked(lambda w: [w[0], w[1], w[2], w[3], w[0]]), lambda p, x: scanned(p, scanned(p, x) @ jnp.ones((3, 6)))):
        graph = brecq_jax.trace(apply_fn, STACK, jnp.ones((2, 6)))
        assert sum(op.weight == "W[0]" for op in graph.ops) == 2
        block = whole(graph)
        assert len({op.weight for op in block.program.ops if op.kind == "dense"}) == len(graph.weights)
        assert len(block.params) == len(graph.weights)
        x = jax.random.normal(KEY, (2, 6))
        np.testing.assert_array_equal(interpret(graph, STACK, x), jax.jit(apply_fn)(STACK, x))


@pytest.mark.parametrize("preset", ["brecq", "uniform"])
def test_a_stack_has_the_stated_bits_where_one_of_its_slices_is_the_first_layer(preset):
    graph = brecq_jax.trace(scanned, STACK, jnp.ones((2, 6)))
    plan = brecq_jax.make_plan(graph, Uniform(4), Uniform(4), preset=preset)
    assert {name: format.bits for name, format in plan.weights.items()} == {"W[0]": 4, "W[1]": 4, "W[2]": 4, "W[3]": 4, "out": 8}
    assert "not the preset's 8 bits" in plan.rows[0][-1] and not any("preset" in row[-1] for row in plan.rows[1:])


def test_two_uses_of_one_layer_are_two_ops_of_one_weight():
    model, make, _ = LINEN["tied embedding"]
    graph = brecq_jax.trace(model.apply, model.init(KEY, make(2)), make(2))
    assert [(op.name, op.kind) for op in graph.ops] == [
        ("embed/embedding", "embed"),
        ("fc/kernel", "dense"),
        ("embed/embedding#2", "dense"),
    ]
    assert graph.weights["embed/embedding"].channel_axes == (0,)


def test_a_computed_weight_is_named_as_such_in_the_plan():
    model, make, _ = LINEN["weight standardisation"]
    graph = brecq_jax.trace(model.apply, model.init(KEY, make(2)), make(2))
    assert "sub" in graph.ops[0].computed
    assert "the parameter is quantized, then" in str(brecq_jax.make_plan(graph))


@pytest.mark.parametrize(
    ("name", "axis"), [("plain", 3), ("depthwise", 3), ("grouped", 3), ("dilated", 3), ("strided", 3), ("transposed", 3)]
)
def test_output_channels_of_convolutions_are_found(name, axis):
    model, make, _ = LINEN["convolutions"]
    graph = brecq_jax.trace(model.apply, model.init(KEY, make(2)), make(2))
    assert graph.weights[f"{name}/kernel"].channel_axes == (axis,)


def test_activation_times_activation_is_not_a_weighted_op():
    model, make, ops = LINEN["encoder"]
    graph = brecq_jax.trace(model.apply, model.init(KEY, make(2)), make(2))
    assert sum(s.primitive == "dot_general" for s in graph.flat.steps) == ops - 1 + 4  # 13 dense, one lookup, 4 scores


def test_two_relus_of_one_function_are_two_values():
    """JAX shares one inner jaxpr, with the same Vars, between calls of one function."""

    def f(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]

    params = {n: images(4, 4) for n in "abc"}
    graph = brecq_jax.trace(f, params, images(2, 4))
    made = [o for s in graph.flat.steps for o in s.outputs]
    assert len(made) == len(set(made))
    assert [len(b.ops) for b in partition(graph, "layer")[0]] == [1, 1, 1]


def test_closed_over_parameters_are_refused():
    model, make, _ = LINEN["convolutions"]
    variables = model.init(KEY, make(2))
    with pytest.raises(ValueError, match="closed over instead of passed"):
        brecq_jax.trace(lambda _, x: model.apply(variables, x), variables, make(2))


def test_a_function_without_weighted_ops_is_refused():
    with pytest.raises(ValueError, match="no op that can be quantized"):
        brecq_jax.trace(lambda p, x: x * p["scale"], {"scale": jnp.ones(3)}, images(2, 3))


def test_train_mode_is_refused():
    class Trained(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))

    variables = Trained().init(KEY, images(2, 3))
    with pytest.raises(ValueError, match="train mode"):
        brecq_jax.trace(lambda v, x: Trained().apply(v, x, mutable=["batch_stats"]), variables, images(2, 3))


@pytest.mark.parametrize("primitive", ["while", "cond"])
def test_weights_inside_control_flow_stay_float_and_are_listed(primitive):
    def f(params, x):
        x = x @ params["outside"]
        if primitive == "while":
            return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ params["inside"]), (0, x))[1]
        return jax.lax.cond(x.sum() > 0, lambda: x @ params["inside"], lambda: x)

    params = {n: images(4, 4) for n in ("inside", "outside")}
    graph = brecq_jax.trace(f, params, images(2, 4))
    assert [op.name for op in graph.ops] == ["outside"]
    assert dict(graph.skipped)["inside"] == f"it is read inside a `{primitive}`, which stays whole"


def test_parameters_that_no_op_reads_are_listed():
    def f(params, x):
        return x @ params["w"] + params["table"].sum()

    graph = brecq_jax.trace(f, {"w": images(4, 4), "table": images(3, 3)}, images(2, 4))
    assert [name for name, _ in graph.skipped] == ["table"]


def gates(params, x):
    """Four gates' weights in one product, as in an LSTM cell; and the other way round, under a vmap that shares an axis."""
    one = x @ jnp.concatenate([params["i"], params["f"], params["o"]], -1)
    other = jnp.einsum("koi,bki->bko", jnp.concatenate([params["k"], params["l"]], 1), one[:, :6].reshape(-1, 2, 3))
    return other, x @ jnp.concatenate([params["top"], params["bottom"]], 0)


def test_weights_that_are_concatenated_for_one_product_are_ops_of_their_own():
    shapes = {"i": (4, 2), "f": (4, 5), "o": (4, 1), "k": (2, 4, 3), "l": (2, 2, 3), "top": (3, 2), "bottom": (1, 2)}
    params, x = {n: images(*s) for n, s in shapes.items()}, images(3, 4)
    graph = brecq_jax.trace(gates, params, x)
    assert [op.name for op in graph.ops] == ["i", "f", "o", "k", "l"]
    assert [w.channel_axes for w in graph.weights.values()] == [(1,), (1,), (1,), (0, 1), (0, 1)]
    assert [name for name, _ in graph.skipped] == ["bottom", "top"]  # they are summed over together
    for got, want in zip(interpret(graph, params, x), gates(params, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_ragged_product_is_listed():
    def f(params, x):
        return jax.lax.ragged_dot(x @ params["w"], params["experts"], jnp.array([1, 1]))

    graph = brecq_jax.trace(f, {"w": images(4, 4), "experts": images(2, 4, 4)}, images(2, 4))
    assert dict(graph.skipped)["experts"] == "it is read inside a `ragged_dot_general`, which stays whole"


def test_output_channels_are_followed_through_flips_transposes_and_slices():
    def f(params, x):
        x = jax.lax.conv_transpose(x, params["conv"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True)
        queries, keys = jnp.split(params["both"].T, 2, 1)
        return x @ queries + (x @ keys) @ params["flipped"][::-1]

    params = {"conv": images(3, 5, 4), "both": images(12, 5), "flipped": images(6, 6)}
    graph = brecq_jax.trace(f, params, images(2, 7, 4))
    assert {n: w.channel_axes for n, w in graph.weights.items()} == {"conv": (1,), "both": (0,), "flipped": (1,)}


def test_channels_of_a_transposed_head_are_found_without_an_array_of_its_size():
    head, x = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32), jax.ShapeDtypeStruct((2, 10**6), jnp.float32)
    graph = brecq_jax.trace(lambda p, x: x @ p["head"].astype(jnp.bfloat16).T.astype(x.dtype), {"head": head}, x)
    assert graph.weights["head"].channel_axes == (0,)


@pytest.mark.parametrize("size", [None, 2])
def test_a_map_over_the_examples_is_one_op_at_any_batch_size(size):
    def f(params, x):
        x = jax.lax.map(lambda row: jnp.tanh(row @ params["w"]), x, batch_size=size)
        return x @ params["head"]

    params = {"w": images(4, 4), "head": images(4, 2)}
    for batch in (1, 2, 6):
        graph = brecq_jax.trace(f, params, images(batch, 4))
        assert [op.name for op in graph.ops] == ["w", "head"]
        np.testing.assert_allclose(interpret(graph, params, images(batch, 4)), f(params, images(batch, 4)), rtol=1e-5)


def test_channels_of_a_tall_weight_in_float16_are_found():
    shape = 66_000, 2  # float16 counts to 65,504
    for dtype, cast in ((jnp.float16, jnp.float16), (jnp.float32, jnp.float16)):
        weight, inputs = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((1, 2), cast)
        graph = brecq_jax.trace(lambda p, x, cast=cast: x @ p["w"].astype(cast).T, {"w": weight}, inputs)
        assert graph.weights["w"].channel_axes == (0,)
