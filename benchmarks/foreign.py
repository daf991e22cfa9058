r"""Models that others wrote, with made-up weights, through the front door: which are read, and what W4A8 and W8 leave of their outputs.

    PYTHONPATH=FOLDER python benchmarks/foreign.py --only=haiku

FOLDER: pip install --no-deps --target FOLDER dm-haiku==0.0.17 jmp==0.0.4 tabulate equinox==0.13.8 wadler-lindig flaxmodels==0.1.3 h5py
jax-resnet==0.0.4 transformers==4.57.1 huggingface_hub==0.36.0 tokenizers==0.22.1 regex filelock packaging pyyaml. Prints a table in
Markdown: the error is |quantized − float| / |float| of the worst output, after 5 steps of `annealed` a block.
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import brecq_jax
from brecq_jax import deploy, solvers
from brecq_jax.formats import Uniform

EXAMPLES = 16
TEXT = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)  # of transformers' configs
IMAGE = dict(image_size=32, patch_size=8, **{k: v for k, v in TEXT.items() if k != "vocab_size"})


class Foreign(NamedTuple):
    params: Any
    apply_fn: Callable
    inputs: Any


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(EXAMPLES, *shape)).astype(np.float32)


def tokens(length: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(3, TEXT["vocab_size"], (EXAMPLES, length)).astype(np.int32)


def haiku(net: Callable, inputs: np.ndarray, trains: bool = False) -> Foreign:
    """`net(hk)` gives what is transformed; `trains`: it takes is_training, which makes its statistics."""
    import haiku as hk

    function = hk.transform_with_state(net(hk))
    params, state = function.init(jax.random.key(0), inputs[:1], *[True] * trains)
    return Foreign(params, lambda params, x: function.apply(params, state, None, x, *[False] * trains)[0], inputs)


def haiku_resnet(hk):
    logits = {"w_init": hk.initializers.RandomNormal(0.05)}  # its own are zeros, of which no error is a part
    return lambda x, train: hk.nets.ResNet18(10, logits_config=logits)(x, train)


def haiku_lstm(hk):
    def net(x):
        core = hk.LSTM(16)
        return hk.Linear(4)(hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)[0][:, -1])

    return net


def haiku_attention(hk):
    def net(x):
        def layer(x):
            h = hk.LayerNorm(-1, True, True)(x)
            x += hk.MultiHeadAttention(4, 8, w_init_scale=1.0)(h, h, h)
            return x + hk.nets.MLP([64, 32])(hk.LayerNorm(-1, True, True)(x))

        return hk.experimental.layer_stack(3)(layer)(layer(x))

    return net


def equinox(make: Callable, inputs: np.ndarray, call: Callable = lambda module, x: module(x)) -> Foreign:
    """`make(eqx, keys)` gives the module, of one example; `call(module, x)` runs it."""
    import equinox as eqx

    arrays, rest = eqx.partition(make(eqx, jax.random.split(jax.random.key(0), 4)), eqx.is_array)
    return Foreign(arrays, lambda arrays, x: jax.vmap(lambda one: call(eqx.combine(arrays, rest), one))(x), inputs)


def equinox_convolutions(eqx, keys):
    return eqx.nn.Sequential([
        eqx.nn.Conv2d(3, 16, 3, padding=1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(16, 32, 3, groups=4, key=keys[1]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.ConvTranspose2d(32, 8, 2, stride=2, key=keys[2]),
        eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(8 * 12 * 12, 10, key=keys[3]),
    ])  # fmt: skip


def equinox_gru(cell, x):
    return jax.lax.scan(lambda h, one: (cell(one, h), None), jnp.zeros(16), x)[0]


def linen(module, inputs: np.ndarray, **settings) -> Foreign:
    return Foreign(module.init(jax.random.key(0), inputs[:1]), lambda variables, x: module.apply(variables, x, **settings), inputs)


def flaxmodels(name: str, **settings) -> Foreign:
    import flaxmodels

    return linen(getattr(flaxmodels, name)(output="logits", pretrained=None, num_classes=10, **settings), values(64, 64, 3), train=False)


def jax_resnet() -> Foreign:
    import jax_resnet

    return linen(jax_resnet.ResNet18(n_classes=10), values(64, 64, 3), mutable=False)


def transformers(model: str, config: str, inputs: dict, outputs: tuple[str, ...] = ("logits",), **settings) -> Foreign:
    import transformers

    net = getattr(transformers, model)(getattr(transformers, config)(**settings), seed=0)

    def apply_fn(params, inputs):
        found = net(**inputs, params=params, train=False)
        return [found[name] for name in outputs]

    return Foreign(net.params, apply_fn, inputs)


def clip() -> Foreign:
    inputs = {"input_ids": tokens(), "pixel_values": values(3, 32, 32), "attention_mask": np.ones((EXAMPLES, 10), np.int32)}
    text = TEXT | dict(max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    outputs = ("text_embeds", "image_embeds")
    return transformers("FlaxCLIPModel", "CLIPConfig", inputs, outputs, text_config=text, vision_config=IMAGE, projection_dim=16)


def whisper() -> Foreign:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))}
    positions = dict(max_source_positions=50, max_target_positions=20)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    inputs = {"input_features": values(80, 100), "decoder_input_ids": tokens(5)}
    return transformers(
        "FlaxWhisperForConditionalGeneration", "WhisperConfig", inputs, vocab_size=100, d_model=32, **sizes, **positions, **ids
    )


def wav2vec2() -> Foreign:
    layers = dict(conv_dim=(16, 16, 16), conv_stride=(4, 2, 2), conv_kernel=(8, 3, 3), num_feat_extract_layers=3)
    norms = dict(feat_extract_norm="layer", do_stable_layer_norm=True, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    return transformers("FlaxWav2Vec2Model", "Wav2Vec2Config", {"input_values": values(800)}, ("last_hidden_state",), **TEXT, **layers, **norms)


MODELS: dict[str, Callable[[], Foreign]] = {
    "haiku ResNet-18": lambda: haiku(haiku_resnet, values(32, 32, 3), trains=True),
    "haiku MobileNetV1": lambda: haiku(lambda hk: lambda x, train: hk.nets.MobileNetV1(num_classes=10)(x, train), values(32, 32, 3), trains=True),
    "haiku LSTM": lambda: haiku(haiku_lstm, values(7, 8)),
    "haiku attention, layer_stack": lambda: haiku(haiku_attention, values(7, 32)),
    "equinox MLP": lambda: equinox(lambda eqx, keys: eqx.nn.MLP(8, 4, 32, 3, key=keys[0]), values(8)),
    "equinox convolutions": lambda: equinox(equinox_convolutions, values(3, 16, 16)),
    "equinox attention": lambda: equinox(lambda eqx, keys: eqx.nn.MultiheadAttention(4, 32, key=keys[0]), values(7, 32), lambda module, x: module(x, x, x)),
    "equinox GRU": lambda: equinox(lambda eqx, keys: eqx.nn.GRUCell(8, 16, key=keys[0]), values(7, 8), equinox_gru),
    "flaxmodels ResNet-18": lambda: flaxmodels("ResNet18"),
    "jax_resnet ResNet-18": jax_resnet,
    "transformers BERT": lambda: transformers("FlaxBertForSequenceClassification", "BertConfig", {"input_ids": tokens()}, **TEXT),
    "transformers GPT-2": lambda: transformers("FlaxGPT2LMHeadModel", "GPT2Config", {"input_ids": tokens()}, vocab_size=100, n_embd=32, n_layer=2, n_head=2),
    "transformers Llama": lambda: transformers("FlaxLlamaForCausalLM", "LlamaConfig", {"input_ids": tokens()}, **TEXT),
    "transformers Bloom": lambda: transformers(
        "FlaxBloomForCausalLM", "BloomConfig", {"input_ids": tokens(), "attention_mask": np.ones((EXAMPLES, 10), np.int32)},
        vocab_size=100, hidden_size=32, n_layer=2, n_head=2,
    ),
    "transformers DistilBERT": lambda: transformers(
        "FlaxDistilBertModel", "DistilBertConfig", {"input_ids": tokens()}, ("last_hidden_state",), vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64
    ),
    "transformers ViT": lambda: transformers("FlaxViTForImageClassification", "ViTConfig", {"pixel_values": values(3, 32, 32)}, **IMAGE),
    "transformers CLIP": clip,
    "transformers Whisper": whisper,
    "transformers wav2vec 2.0": wav2vec2,
}  # fmt: skip


def row(name: str) -> str:
    """The model's line of the table."""
    params, apply_fn, inputs = MODELS[name]()
    want, start = jax.tree.leaves(apply_fn(params, inputs)), time.perf_counter()
    settings = dict(inputs=lambda element: element, progress=False)
    quantized = brecq_jax.quantize(params, apply_fn, inputs, solver=solvers.annealed(num_steps=5), **settings)
    seconds = time.perf_counter() - start
    integer = deploy.to_integer(quantized, jax.tree.map(lambda a: a[:2], inputs))
    eight = brecq_jax.quantize(params, apply_fn, inputs, weights=Uniform(8), activations=None, solver=solvers.nearest(), **settings)

    def error(model) -> str:
        norms = [(np.linalg.norm(np.subtract(ours, theirs)), np.linalg.norm(theirs)) for ours, theirs in zip(jax.tree.leaves(model(inputs)), want, strict=True)]
        return f"{max(part / whole for part, whole in norms):.4f}"

    size = quantized.report.float_bits / quantized.report.size_bits
    return f"| {name} | {error(quantized)} | {error(integer)} | {error(eight)} | {size:.1f} | {seconds:.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for the names")
    only = parser.parse_args().only
    print("| model | W4A8 | on integers | W8 | times smaller | seconds |\n|---|---|---|---|---|---|")
    for name in filter(lambda name: re.search(only, name), MODELS):
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
