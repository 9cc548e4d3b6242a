"""One distribution as a curve of quantiles, with exponential tails: no score is ever beyond it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


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
    """How far beyond the lowest value the scores below it are on average; `above` likewise."""
    above: float

    def cdf(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The quantile of each value; a value that stands at several levels is at the middle of them."""
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
        """The value at each level, in (0, 1)."""
        if not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"a quantile has a level in (0, 1), got levels from {levels.min()} to {levels.max()}")
        low = np.log(np.minimum(levels / self.levels[0], 1)) * self.below
        high = np.log(np.minimum((1 - levels) / (1 - self.levels[-1]), 1)) * self.above
        return np.asarray(np.interp(levels, self.levels, self.values) + low - high)


def curve_of(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], levels: Float[np.ndarray, " Q"]
) -> Curve:
    """The curve of a weighted sample."""
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order] / weights.sum()
    quantiles = np.interp(levels, np.cumsum(weights) - weights / 2, values)
    gaps = np.maximum(quantiles[0] - values, 0), np.maximum(values - quantiles[-1], 0)
    # The mean over those beyond, of whom there may be none.
    beyond = [float((gap * weights).sum() / max(weights[gap > 0].sum(), 1e-300)) for gap in gaps]
    least = 1e-6 * max(float(quantiles[-1] - quantiles[0]), 1e-6)
    return Curve(levels, quantiles, *(max(excess, least) for excess in beyond))
