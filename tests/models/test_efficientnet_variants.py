"""EfficientNet-Lite0 to Lite4 have the size of the original network."""

import jax
import jax.numpy as jnp
import pytest

from brecq_jax.models.efficientnet_lite import VARIANTS, efficientnet_lite

COUNTS = (4_652_008, 5_416_680, 6_092_072, 8_197_096, 13_006_568)


@pytest.mark.parametrize("variant", range(5))
def test_the_number_of_parameters_is_the_original_one(variant):
    """Counts: PyPI efficientnet_lite_pytorch 0.1.0, EfficientNet.from_name, in torch 2.13.0."""
    side = VARIANTS[variant][2]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(efficientnet_lite(variant).init, jax.random.key(0), image)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == COUNTS[variant]


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="0 to 4"):
        efficientnet_lite(5)
