"""Solvers by the names that papers gave them."""

import dataclasses

from brecq_jax.solvers._roundings import RectifiedSigmoid, StraightThrough
from brecq_jax.solvers._solver import Solver
from brecq_jax.solvers._walk import relative_error, squared_error
from brecq_jax.solvers.lapq import lapq
from brecq_jax.solvers.nearest import nearest
from brecq_jax.solvers.reconstruct import Reconstruction, reconstruct
from brecq_jax.solvers.second_order import SecondOrder, second_order

# Fewer steps need a longer warmup and step sizes that move faster: EfficientNet-Lite0 W4A8 in 60 steps agrees with float on 87 % of
# photographs so, and on 66 % with what is best at 1,000 steps (docs/results.md). Where between the two to change is a guess.
FEW_STEPS = 300
GENIE = RectifiedSigmoid(scale_learning_rate=1e-4)
PUBLISHED = ("adaround", "brecq", "genie", "qdrop", "squared")  # whose penalty's weight is tuned for each network


def adaround(**settings) -> Solver:
    """Each op on its own, plain squared error. Source: Nagel et al. 2020, https://arxiv.org/abs/2004.10568"""
    return reconstruct(Reconstruction(**{"unit": "layer", "error": squared_error, **settings}))


def brecq(**settings) -> Solver:
    """Residual blocks, Fisher-weighted error. Source: Li et al. 2021, https://arxiv.org/abs/2102.05426

    In the second phase, of activations, the released code minimises |Δ|^2.4 (`--p`) from the float model's inputs; here it is the
    same squared error as in the first, from the quantized prefix's.
    """
    return reconstruct(Reconstruction(**settings))


def genie(**settings) -> Solver:
    """BRECQ's blocks with plain squared error; weight step sizes learned together with the rounding.

    Source: Genie-M, Jeon et al. 2023, https://arxiv.org/abs/2212.04780, section 3.2: the integers of the two neighbours
    stay, and the points move with their step size. The schedule is BRECQ's: in Genie's code weights and activations are learned
    together with dropping (0.5), the step sizes' rate falls as a cosine, and the penalty has weight 1.0 (here 0.01).
    """
    return reconstruct(Reconstruction(**{"error": squared_error, "rounding": GENIE, **settings}))


def qdrop(**settings) -> Solver:
    """Weights and activation steps learned together, while each element's quantization is dropped half of the time.

    Source: Wei et al. 2022, https://arxiv.org/abs/2203.05740, section 4: inside the block, and between the inputs that the
    quantized prefix and the float model give. `drop_prob` is the probability of staying float (in their code, of the opposite).
    """
    return reconstruct(Reconstruction(**{"error": squared_error, "together": True, "drop_prob": 0.5, **settings}))


def annealed(**settings) -> Solver:
    """Ours, and what `quantize` does unless told otherwise: AdaRound's choice at two hundred times its rate, in few small batches.

    Block by block; weight step sizes learned along, activations in the same loop. The error is in parts of
    the target's energy and the penalty a mean, so that one regulariser serves every block
    (colabs/04_inside_one_block.ipynb). It begins at the float weights; where no good guess should be thrown away, see `refined`.
    """
    steps = settings.get("num_steps", 1_000)
    pace = dict(warmup=0.2, scale_learning_rate=3e-3) if steps < FEW_STEPS else dict(warmup=0.1, scale_learning_rate=1e-3)
    rounding = RectifiedSigmoid(regularizer=16.0, average=True, **pace)
    defaults = dict(error=relative_error, rounding=rounding, num_steps=steps, batch_size=8, learning_rate=0.2, together=True)
    return reconstruct(Reconstruction(**{**defaults, **settings}))


def refined(**settings) -> Solver:
    """Second-order rounding, and from its codes on straight-through gradients for codes and step sizes, block by block.

    There is no regulariser: what is run is always rounded. The best that was seen on held-out inputs is kept.
    """
    defaults = dict(
        error=relative_error, start=SecondOrder(), rounding=StraightThrough(), num_steps=600, batch_size=8, learning_rate=1e-2,
        together=True, drop_prob=0.5, checks=4, patience=4,
    )  # fmt: skip
    return reconstruct(Reconstruction(**{**defaults, **settings}))


def by_name(name: str, regularizer: float | None = None, **settings) -> Solver:
    """What `--config.method` says: nearest, second_order, lapq, annealed, refined, adaround, brecq, genie, qdrop, or squared (BRECQ's blocks,
    plain squared error). Settings are those of `Reconstruction`; nearest, second_order and lapq take none of them.

    `regularizer`: the penalty's weight in the `PUBLISHED` methods; the others, which tune none, do not take it. None: 0.01. BRECQ's released
    code takes 0.1 for MobileNetV2 (its README).

    Raises:
      ValueError: another name.
    """
    if regularizer is not None and name in PUBLISHED:
        rounding = settings.get("rounding", GENIE if name == "genie" else RectifiedSigmoid())
        settings["rounding"] = dataclasses.replace(rounding, regularizer=regularizer)
    makers = {
        "nearest": lambda **_: nearest(),
        "second_order": lambda **_: second_order(),
        "lapq": lambda **_: lapq(),
        "annealed": annealed,
        "refined": refined,
        "adaround": adaround,
        "brecq": brecq,
        "genie": genie,
        "qdrop": qdrop,
        "squared": lambda **given: reconstruct(Reconstruction(**{"error": squared_error, **given})),
    }
    if name not in makers:
        raise ValueError(f"There is no solver named {name!r}. Write one of {', '.join(makers)}.")
    return makers[name](**settings)
