"""Every architecture against PyTorch code that we did not write, by every naming that it knows.

Vectors: benchmarks/parity.py with torch 2.13.0: yhhhli/BRECQ at e455d62, torchvision 0.29.1, timm 1.0.31, PyPI
efficientnet_lite_pytorch 0.1.0, akamaster/pytorch_resnet_cifar10 at d5489e89. They hold each source's tensor names and
shapes, and its logits for the tensors and the image that `made_up_tensors` and `made_up_image` draw.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from brecq_jax import models
from brecq_jax.models._layout import from_torch

HERE = pathlib.Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("parity", HERE.parents[1] / "benchmarks" / "parity.py")
parity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parity)
VECTORS = np.load(HERE / "vectors" / "parity.npz")
SHAPES = {key: {n: tuple(s) for n, s in shapes.items()} for key, shapes in json.loads(VECTORS["shapes"].tobytes()).items()}
TOLERANCE = 1e-4  # of the largest logit


def sources(name):
    return [key for key in SHAPES if key.split()[0] == name]


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_logits_equal_those_of_the_pytorch_network(name):
    architecture, image = models.ARCHITECTURES[name], parity.made_up_image(name)
    model = architecture.build()
    abstract = jax.eval_shape(model.init, jax.random.key(0), image)
    apply = jax.jit(model.apply)
    for key in sources(name):
        variables = from_torch(parity.made_up_tensors(name, SHAPES[key]), abstract, architecture.namings, key)
        want = VECTORS[key]
        np.testing.assert_allclose(apply(variables, image)[0], want, atol=TOLERANCE * np.abs(want).max(), err_msg=key)


def test_every_naming_is_proven_by_some_network_of_its_family():
    for architecture in models.ARCHITECTURES.values():
        family = [n for n, a in models.ARCHITECTURES.items() if a.namings is architecture.namings]
        proven = {key.split()[1] for n in family for key in sources(n)}
        assert all(any(source in naming for source in proven) for naming in architecture.namings)


def test_torchvisions_released_vit_is_loaded_by_its_older_names():
    """torchvision renames them when it loads (MLPBlock._load_from_state_dict): mlp.linear_1 is mlp.0, linear_2 is 3."""
    architecture = models.ARCHITECTURES["vit_b16"]
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): s for n, s in SHAPES["vit_b16 torchvision"].items()}
    assert any("linear_2" in n for n in old)
    abstract = jax.eval_shape(architecture.build().init, jax.random.key(0), parity.made_up_image("vit_b16"))
    from_torch({n: np.broadcast_to(np.float32(0), s) for n, s in old.items()}, abstract, architecture.namings, "old")
