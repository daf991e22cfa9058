"""Every architecture against PyTorch code that we did not write, by every naming that it knows.

Vectors: benchmarks/parity.py with torch 2.13.0: yhhhli/BRECQ at e455d62, torchvision 0.29.1, timm 1.0.31, PyPI
efficientnet_lite_pytorch 0.1.0, akamaster/pytorch_resnet_cifar10 at d5489e89. They hold each source's tensor names and
shapes, and its logits for the tensors and the image that `made_up_tensors` and `made_up_image` draw.
"""

import functools
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
HEAVY = ("resnet101", "regnetx_3200mf", "efficientnet_lite4", "vit_b16")


def sources(name):
    return [key for key in SHAPES if key.split()[0] == name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in models.ARCHITECTURES])
def test_logits_equal_those_of_the_pytorch_network(name):
    architecture, image = models.ARCHITECTURES[name], parity.made_up_image(name)
    model = architecture.build()
    abstract = jax.eval_shape(model.init, jax.random.key(0), image)
    apply = jax.jit(model.apply)
    for key in sources(name):
        variables = from_torch(parity.made_up_tensors(name, SHAPES[key]), abstract, architecture.namings, key)
        want = VECTORS[key]
        np.testing.assert_allclose(apply(variables, image)[0], want, atol=TOLERANCE * np.abs(want).max(), err_msg=key)


def test_every_architecture_has_vectors_for_every_naming():
    """Two sources share one naming, or one naming holds for a source's older files: then fewer."""
    for name, architecture in models.ARCHITECTURES.items():
        without = {"torchvision's released file"}
        assert len(sources(name)) == len(set(architecture.namings) - without), name
