"""Networks partition as their papers draw them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._blocks import MOST_OPS, partition
from brecq_jax.formats import Uniform
from brecq_jax.models.architectures import ARCHITECTURES
from brecq_jax.models.bert import Bert
from brecq_jax.models.efficientnet_lite import EfficientNetLite
from brecq_jax.models.mnasnet import MNasNet
from brecq_jax.models.mobilenet_v2 import MobileNetV2
from brecq_jax.models.regnet import regnetx_600mf, regnetx_3200mf
from brecq_jax.models.resnet import resnet18, resnet50
from brecq_jax.models.resnet_cifar import ResNetCifar
from brecq_jax.models.vit import ViT


def cut(model, *shape, blocks="block", dtype=jnp.float32):
    batch = jax.ShapeDtypeStruct((2, *shape), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    return partition(brecq_jax.trace(model.apply, variables, batch), blocks)


def sizes(blocks):
    return [len(b.ops) for b in blocks[0]]


def test_resnets_are_cut_into_residual_blocks():
    # Stem, then basic blocks of two convolutions (three with a projection), then the classifier.
    assert sizes(cut(resnet18(), 64, 64, 3)) == [1, 2, 2, 3, 2, 3, 2, 3, 2, 1]
    # Bottlenecks of three, the first of each stage with a projection: 3, 4, 6, 3 of them.
    expected = [4, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 4, 3, 3]
    assert sizes(cut(resnet50(), 64, 64, 3)) == [1, *expected, 1]
    assert sizes(cut(ResNetCifar(20), 32, 32, 3)) == [1, *[2] * 9, 1]


def test_resnet18_has_four_stages():
    assert sizes(cut(resnet18(), 64, 64, 3, blocks="stage")) == [1, 4, 5, 5, 5, 1]


def test_mobilenet_v2_is_cut_into_inverted_residuals():
    # 17 of them, the first without expansion; strided ones have no shortcut and are joined by their module.
    assert sizes(cut(MobileNetV2(), 64, 64, 3)) == [1, 2, *[3] * 16, 1, 1]


def test_efficientnet_lite_is_cut_into_inverted_residuals():
    assert sizes(cut(EfficientNetLite(), 64, 64, 3)) == [1, 2, *[3] * 15, 1, 1]


def test_mnasnet_is_cut_into_inverted_residuals():
    # The separable convolution, then 16 inverted residuals, with a shortcut or without.
    assert sizes(cut(MNasNet(), 64, 64, 3)) == [1, 2, *[3] * 16, 1, 1]


@pytest.mark.parametrize(("build", "repeats"), [(regnetx_600mf, (1, 3, 5, 7)), (regnetx_3200mf, (2, 6, 15, 2))])
def test_regnets_are_cut_into_their_bottlenecks(build, repeats):
    # Three convolutions, and a projection in the first block of each stage.
    expected = [4 if i == 0 else 3 for n in repeats for i in range(n)]
    assert sizes(cut(build(), 64, 64, 3)) == [1, *expected, 1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_is_one_module_of_the_network(name):
    """A residual block, an inverted residual, the attention or MLP half of an encoder block, or a layer of its own."""
    blocks, notes = cut(ARCHITECTURES[name].build(), 64, 64, 3)
    modules = [{"/".join(op.weight.split("/")[:-2]) or op.weight for op in b.ops} for b in blocks]
    assert [len(m) for m in modules] == [1] * len(blocks)
    assert len(set.union(*modules)) == len(blocks)
    assert not notes


def test_vit_is_cut_into_attention_and_mlp_halves():
    # Queries, keys and values are one dense layer.
    assert sizes(cut(ViT(depth=2), 32, 32, 3)) == [1, 2, 2, 2, 2, 1]


def test_bert_is_cut_into_attention_and_mlp_halves():
    blocks = sizes(cut(Bert(), 16, dtype=jnp.int32))
    assert blocks[-4:] == [4, 2, 4, 2]


class Pyramid(nn.Module):
    """Like FPN: four levels, top-down sums, a shared head on each."""

    @nn.compact
    def __call__(self, x):
        levels = []
        for i in range(4):
            x = nn.relu(nn.Conv(8, (3, 3), (2, 2), name=f"down{i}")(x))
            x = nn.relu(x + nn.Conv(8, (3, 3), name=f"res{i}")(x))
            levels.append(nn.Conv(8, (1, 1), name=f"lateral{i}")(x))
        for i in reversed(range(3)):
            levels[i] = levels[i] + jnp.repeat(jnp.repeat(levels[i + 1], 2, 1), 2, 2)
        head = [nn.Conv(8, (3, 3), name="head1"), nn.Conv(4, (1, 1), name="head2")]
        return {f"p{i}": head[1](nn.relu(head[0](level))) for i, level in enumerate(levels)}


def test_a_net_that_never_comes_down_to_one_value_is_cut_at_few_and_says_so():
    blocks, notes = cut(Pyramid(), 32, 32, 3)
    assert max(len(b.ops) for b in blocks) <= MOST_OPS
    assert len(blocks) > 2
    assert any("are live" in note for note in notes)
    assert [op.name for b in blocks for op in b.ops].count("head1/kernel") == 1
    assert sum(len(b.ops) for b in blocks) == 20


def test_plain_chains_are_cut_by_threes():
    def f(params, x):
        for name in sorted(params):
            x = jax.nn.relu(x @ params[name])
        return x

    params = {f"w{i}": jnp.ones((4, 4)) for i in range(7)}
    graph = brecq_jax.trace(f, params, jnp.ones((2, 4)))
    assert sizes(partition(graph)) == [3, 3, 1]


@pytest.mark.parametrize("blocks", ["layer", "block", "stage", "net", [r"layer(\d)_.*"]])
def test_blocks_cover_every_op_once_in_order(blocks):
    found, _ = cut(resnet18(), 64, 64, 3, blocks=blocks)
    names = [op.name for b in found for op in b.ops]
    assert len(names) == len(set(names)) == 21
    assert len({b.name for b in found}) == len(found)


def test_users_patterns_group_blocks():
    assert sizes(cut(resnet18(), 64, 64, 3, blocks=[r"layer(\d)_.*"])) == [1, 4, 5, 5, 5, 1]


def frames(params, x):
    """Frames are folded into the batch."""
    y = through(params, x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:2], -1).mean(1) @ params["head"]


def time_first(params, x):
    return through(params, jnp.swapaxes(x, 0, 1)).mean(0) @ params["head"]


def pairs(params, x):
    """Both halves of each example go through one net; and two outputs that no example has for itself."""
    y = through(params, jnp.concatenate([x[:, 0], x[:, 1]]))
    one, other = jnp.split(y, 2)
    return jnp.abs(one - other) @ params["head"], jnp.mean(y), jnp.mean(y, 0)


def through(params, x):
    for w in params["inside"]:
        x = jnp.tanh(x @ w)
    return x


@pytest.mark.parametrize("apply_fn", [frames, time_first, pairs])
def test_nothing_is_cut_while_examples_are_not_on_axis_0(apply_fn):
    draw = functools.partial(jax.random.normal, jax.random.key(0))
    params = {"inside": [draw((6, 6)) for _ in range(5)], "head": draw((6, 3))}
    for size in (1, 4, 6):
        graph = brecq_jax.trace(apply_fn, params, draw((size, 6, 6)))
        for granularity in ("layer", "block"):
            blocks, notes = partition(graph, granularity)
            assert [[op.name for op in b.ops] for b in blocks] == [[f"inside/{i}" for i in range(5)], ["head"]]
            assert all(graph.flat.types[i].shape[0] == size for b in blocks for i in (*b.ins, *b.outs))
            assert len(notes) == 4 * (granularity == "layer") + 2 * (apply_fn is pairs)
    inputs = draw((16, 6, 6))
    quantized = brecq_jax.quantize(params, apply_fn, inputs, weights=Uniform(3), activations=None, solver=solvers.brecq(num_steps=4), progress=False)
    assert [len(b.ops) for b in quantized.report.blocks] == [5, 1]


def test_a_long_loop_over_time_is_said():
    def apply_fn(params, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ params["h"]), None), x[:, 0], jnp.swapaxes(x, 0, 1))[0]

    for length, said in ((63, False), (64, True)):
        _, notes = partition(brecq_jax.trace(apply_fn, {"h": jnp.ones((4, 4))}, jnp.ones((2, length, 4))))
        assert any("h is read 64 times: a loop over time" in note for note in notes) == said


def test_an_output_of_integers_is_said_to_teach_nothing():
    params, x = {n: jnp.ones((6, 6)) for n in "ab"}, jnp.ones((4, 6))
    for last, said in ((lambda h: h, 0), (lambda h: jnp.argmax(h, -1), 1)):
        graph = brecq_jax.trace(lambda p, x, last=last: last(jax.nn.relu(x @ p["a"]) @ p["b"]), params, x)
        assert sum("nothing is learned from an output of int32" in note for note in partition(graph)[1]) == said
