"""The paper's search: a population of plans, crossed and mutated."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from brecq_jax.mixed_precision._table import Table
from brecq_jax.mixed_precision.exact import cheapest, last_resort, within


@dataclasses.dataclass(frozen=True)
class Genetic:
    """BRECQ's genetic search; call it as `exact`. What it gives is within the limits, and not always the best.

    Source: BRECQ, algorithm 2, https://arxiv.org/abs/2102.05426, after Guo et al. 2019 (SPOS, https://arxiv.org/abs/1904.00420). The paper
    does not say how many are kept, nor what happens where drawing finds few plans within the limits: here the first draws
    move from the middle of the options down to the first, the plans that are cheapest in one of the limited costs join them, and drawing ends
    after `draws` rounds. Where none is within the limits, it begins at a plan that is cheapest in one cost within the limits on the others.
    """

    population: int = 50
    generations: int = 100
    mutation: float = 0.1  # the probability that a decision is drawn anew
    kept: int = 10  # the best seen, which are the parents
    draws: int = 20  # rounds of drawing children until half a population is within the limits

    def __call__(self, table: Table, limits: Mapping[str, float], key: jax.Array | None = None) -> np.ndarray | None:
        """The best choices seen, one for each decision; None if none is within the limits."""
        # One key, one NumPy generator: hundreds of tiny draws.
        draw = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key)))
        sizes = np.array([len(own) for own in table.options])
        best = self._first(table, limits, sizes, draw)
        if not len(best):
            return None
        for _ in range(self.generations):
            half = self.population // 2
            crossed = self._children(table, limits, half, lambda n, best=best: _cross(best, n, draw))
            mutated = self._children(table, limits, half, lambda n, best=best: _mutate(best, n, sizes, self.mutation, draw))
            everyone = np.unique(np.concatenate([best, crossed, mutated]), axis=0)
            best = everyone[np.argsort(table.loss(everyone), kind="stable")[: self.kept]]
        return best[0]

    def _first(self, table, limits, sizes, draw) -> np.ndarray:
        """Gaussian, rounded to the options; centred lower with each round."""
        found = np.zeros((0, len(sizes)), int)
        for n in range(self.draws):
            centre = (sizes - 1) / 2 * (1 - n / self.draws)
            drawn = draw.normal(centre, np.maximum((sizes - 1) / 2, 0.5), (self.population, len(sizes)))
            drawn = np.clip(np.rint(drawn), 0, sizes - 1).astype(int)
            found = np.concatenate([found, drawn[within(table, limits, drawn)]])
            if len(found) >= self.population:
                break
        ends = np.array([np.zeros(len(sizes), int), *(cheapest(table, name) for name in limits)])
        found = np.concatenate([found, ends[within(table, limits, ends)]])
        if not len(found) and (last := last_resort(table, limits)) is not None:
            found = last[None]
        return found[np.argsort(table.loss(found), kind="stable")[: self.kept]]

    def _children(self, table, limits, count, make) -> np.ndarray:
        found = make(0)
        for _ in range(self.draws):
            drawn = make(count)
            found = np.concatenate([found, drawn[within(table, limits, drawn)]])[:count]
            if len(found) == count:
                break
        return found


def _cross(parents: np.ndarray, count: int, draw) -> np.ndarray:
    """Each decision from one of two parents."""
    one, other = parents[draw.integers(len(parents), size=(2, count))]
    return np.where(draw.random(one.shape) < 0.5, one, other)


def _mutate(parents: np.ndarray, count: int, sizes: np.ndarray, probability: float, draw) -> np.ndarray:
    """A parent, each decision drawn anew with a probability."""
    one = parents[draw.integers(len(parents), size=count)]
    return np.where(draw.random(one.shape) < probability, draw.integers(0, sizes, one.shape), one)
