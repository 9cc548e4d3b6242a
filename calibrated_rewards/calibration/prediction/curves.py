"""Samples of scores of many prompts, and a distribution as a curve of quantiles with exponential tails."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from calibrated_rewards.table.reference_table import ReferenceTable


class Sample(NamedTuple):
    """Scores of prompts one after the other, ascending within each prompt; prompts may have different numbers."""

    scores: Float[np.ndarray, " n"]
    counts: Int[np.ndarray, " P"]

    @property
    def owners(self) -> Int[np.ndarray, " n"]:
        """The number of each score's prompt."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """The weight of each score, so that each prompt counts 1."""
        return np.asarray(np.repeat(1 / self.counts, self.counts))

    def means(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " P"]:
        """Average values, one for each score, over each prompt."""
        return np.asarray(np.add.reduceat(values, np.cumsum(self.counts) - self.counts) / self.counts)

    def select(self, prompts: Bool[np.ndarray, " P"]) -> "Sample":
        """Return the scores of some of the prompts."""
        return Sample(self.scores[np.repeat(prompts, self.counts)], self.counts[prompts])

    def halves(self, rng: np.random.Generator) -> tuple["Sample", "Sample"]:
        """Split each prompt's scores in two random halves; the second has the odd one, and the first may have none."""
        order = np.lexsort((rng.random(len(self.scores)), self.owners))
        place = np.arange(len(order)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        half = self.counts // 2
        first = np.zeros(len(order), bool)
        first[order] = place < np.repeat(half, self.counts)
        return Sample(self.scores[first], half), Sample(self.scores[~first], self.counts - half)


def read_sample(table: ReferenceTable, rows: Int[np.ndarray, " P"]) -> Sample:
    """Read the scores of some rows of a table."""
    counts = table.counts(rows)
    starts, scores = np.cumsum(counts) - counts, np.empty(counts.sum())
    for positions, block in table.blocks(rows):
        scores[starts[positions][:, None] + np.arange(block.shape[1])] = block
    return Sample(scores, counts)


@dataclass(frozen=True, eq=False)
class Curve:
    """Quantiles at ascending levels, linear between them; beyond the ends chances fall off exponentially.

    With tails, better is better also above all that was ever seen: a policy that gets there still has a gradient.

    >>> curve = Curve(np.array([0.25, 0.5, 0.75]), np.array([-1.0, 0.0, 2.0]), 1.0, 1.0)
    >>> curve.cdf(np.array([-2.0, -1.0, 1.0, 3.0])).round(3)
    array([0.092, 0.25 , 0.625, 0.908])
    >>> curve.icdf(np.array([0.092, 0.25, 0.625, 0.908])).round(2)
    array([-2., -1.,  1.,  3.])
    """

    levels: Float[np.ndarray, " Q"]
    values: Float[np.ndarray, " Q"]
    below: float
    """The mean distance below the lowest value of the scores that are below it; `above` likewise."""
    above: float

    def cdf(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the quantile of each value; a value that stands at several levels is at the middle of them."""
        first = np.searchsorted(self.values, values, side="left")
        after = np.searchsorted(self.values, values, side="right")
        last, ends = len(self.values) - 1, np.minimum(first, len(self.values) - 1)
        inside = (self.levels[ends] + self.levels[np.clip(after - 1, 0, last)]) / 2
        between = (first == after) & (first > 0) & (first <= last)
        inside[between] = np.interp(values[between], self.values, self.levels)
        low = self.levels[0] * np.exp(np.minimum(values - self.values[0], 0) / self.below)
        high = 1 - (1 - self.levels[-1]) * np.exp(np.minimum(self.values[-1] - values, 0) / self.above)
        return np.asarray(np.where(first > last, high, np.where(after == 0, low, inside)))

    def icdf(self, levels: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the value at each level, in (0, 1)."""
        if not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"a quantile has a level in (0, 1), got levels from {levels.min()} to {levels.max()}")
        low = np.log(np.minimum(levels / self.levels[0], 1)) * self.below
        high = np.log(np.minimum((1 - levels) / (1 - self.levels[-1]), 1)) * self.above
        return np.asarray(np.interp(levels, self.levels, self.values) + low - high)


def fit_curve(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], levels: Float[np.ndarray, " Q"]
) -> Curve:
    """Fit the curve of a weighted sample."""
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order] / weights.sum()
    quantiles = np.interp(levels, np.cumsum(weights) - weights / 2, values)
    gaps = np.maximum(quantiles[0] - values, 0), np.maximum(values - quantiles[-1], 0)
    # The mean over those beyond, of whom there may be none.
    beyond = [float((gap * weights).sum() / max(weights[gap > 0].sum(), 1e-300)) for gap in gaps]
    least = 1e-6 * max(float(quantiles[-1] - quantiles[0]), 1e-6)
    return Curve(levels, quantiles, *(max(excess, least) for excess in beyond))
