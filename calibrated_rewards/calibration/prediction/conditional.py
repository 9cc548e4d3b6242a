"""The distribution of a prompt's scores given its features: a location, a scale, and a curve, common or bent.

`Sample` holds the scores of many prompts, `Curve` a distribution as quantiles with exponential tails; `Conditional` is
a curve that is moved and stretched for each prompt, and `Steps` fits it, simple or less so.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from calibrated_rewards.calibration.prediction.regression import (
    NETWORK_LEVELS,
    Directions,
    Network,
    Ridge,
    fit_ridge,
    train_network,
)
from calibrated_rewards.table.reference_table import ReferenceTable

# Models of growing size: each lets the features decide more; the first is the same for all prompts.
STEPS = ("pooled", "+ location", "+ scale", "+ network")


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
        rank = np.arange(len(order)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        half = self.counts // 2
        first = np.zeros(len(order), bool)
        first[order] = rank < np.repeat(half, self.counts)
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


@dataclass(frozen=True, eq=False)
class Conditional:
    """The distribution of scores given features: a prompt's parameters map its scores to the scale of `curve`.

    The curve is that of scores whose own prompt was left out, so it is as wide as the predictions are uncertain: a
    quantile under it is the expected one, and uniform over the prompts of the table.
    """

    weights: Float[np.ndarray, "d 2"]
    """From features to location and log scale."""
    intercept: Float[np.ndarray, " 2"]
    low: Float[np.ndarray, " 2"]
    """Bounds of location and log scale, `low` and `high`: those of the prompts that were fitted."""
    high: Float[np.ndarray, " 2"]
    curve: Curve
    network: Network | None = None

    def parameters(self, features: Float[np.ndarray, "P d"]) -> Float[np.ndarray, "P T"]:
        """Return each prompt's parameters: location, log scale, and the quantiles of the network if there is one."""
        linear = np.clip(features @ self.weights + self.intercept, self.low, self.high)
        return linear if self.network is None else np.hstack([linear, self.network(features)])

    def cdf(self, parameters: Float[np.ndarray, "n T"], scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the quantile of each score, given its prompt's parameters."""
        standard = (scores - parameters[:, 0]) / np.exp(parameters[:, 1])
        if self.network is not None:
            standard = map_values(standard, parameters[:, 2:], self.network.quantiles[None])
        return self.curve.cdf(standard)

    def quantiles(
        self, parameters: Float[np.ndarray, "P T"], levels: Float[np.ndarray, " Q"]
    ) -> Float[np.ndarray, "P Q"]:
        """Return the score at each level, for each prompt."""
        standard = np.tile(self.curve.icdf(levels), (len(parameters), 1))
        if self.network is not None:
            bent = np.repeat(parameters[:, 2:], len(levels), axis=0)
            standard = map_values(standard.ravel(), self.network.quantiles[None], bent).reshape(standard.shape)
        return np.asarray(parameters[:, :1] + np.exp(parameters[:, 1:2]) * standard)

    def on_features(self, directions: Directions) -> "Conditional":
        """Return the same distribution as a function of features in place of their coordinates."""
        weights, intercept = directions.on_features(self.weights, self.intercept)
        network = self.network
        if network is not None:
            first, bias = directions.on_features(network.first, network.first_bias)
            network = replace(network, first=first, first_bias=bias)
        return replace(self, weights=weights, intercept=intercept, network=network)


@dataclass(frozen=True, eq=False)
class Steps:
    """The models of growing size that a sample leads to; each is fitted when it is called for."""

    coordinates: Float[np.ndarray, "P r"]
    sample: Sample
    location: Ridge
    scale: Ridge
    levels: Float[np.ndarray, " Q"]
    seed: int

    def __call__(self, step: int) -> Conditional:
        """Fit the distribution of a step."""
        nothing = _zero(self.coordinates)
        parts = [(nothing, nothing), (self.location, nothing), (self.location, self.scale)][min(step, 2)]
        left_out = np.hstack([part.left_out for part in parts])
        each = left_out[self.sample.owners]
        standard = (self.sample.scores - each[:, 0]) / np.exp(each[:, 1])
        curve = fit_curve(standard, self.sample.weights, self.levels)
        weights, intercept = np.hstack([part.weights for part in parts]), np.hstack([part.intercept for part in parts])
        linear = Conditional(weights, intercept, left_out.min(axis=0), left_out.max(axis=0), curve)
        if step < 3:
            return linear
        network = train_network(self.coordinates, standard, self.sample.counts, curve.icdf(NETWORK_LEVELS), self.seed)
        return replace(linear, network=network)

    def r_squared(self) -> tuple[float, float]:
        """Return the R squared of locations, and of log scales, for prompts that are left out."""
        mean = self.sample.means(self.sample.scores)
        spread = log_spread(self.sample, self.location.left_out[:, 0])
        return _r_squared(self.location, mean), _r_squared(self.scale, spread)


def fit_steps(
    coordinates: Float[np.ndarray, "P r"], sample: Sample, levels: Float[np.ndarray, " Q"], seed: int
) -> Steps:
    """Fit location and scale of a sample's prompts, as linear functions of their coordinates."""
    location = fit_ridge(coordinates, sample.means(sample.scores)[:, None])
    scale = fit_ridge(coordinates, log_spread(sample, location.left_out[:, 0])[:, None])
    return Steps(coordinates, sample, location, scale, levels, seed)


def log_spread(sample: Sample, location: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """Return the log of the root mean square distance of each prompt's scores from a location."""
    spread = np.sqrt(sample.means((sample.scores - location[sample.owners]) ** 2))
    # A prompt whose scores are all predicted exactly has no logarithm.
    return np.asarray(np.log(np.maximum(spread, 1e-4 * spread.mean() + 1e-30)))


def map_values(
    values: Float[np.ndarray, " n"], start: Float[np.ndarray, "#n S"], end: Float[np.ndarray, "#n S"]
) -> Float[np.ndarray, " n"]:
    """Map values as a row of ascending knots is mapped to another: linear between them, a shift outside.

    >>> map_values(np.array([0.5, 3.0]), np.array([[0.0, 1.0]]), np.array([[0.0, 10.0]]))
    array([ 5., 12.])
    """
    steps = np.maximum(np.diff(start), 1e-300)
    between = (np.clip((values[:, None] - start[:, :-1]) / steps, 0, 1) * np.diff(end)).sum(axis=1)
    outside = np.minimum(values - start[:, 0], 0) + np.maximum(values - start[:, -1], 0)
    return np.asarray(end[:, 0] + between + outside)


def _r_squared(part: Ridge, targets: Float[np.ndarray, " P"]) -> float:
    """Return the R squared of predictions for prompts left out, 0 where it is negative."""
    variance = float(targets.var())
    return max(0.0, 1 - float(np.mean((targets - part.left_out[:, 0]) ** 2)) / variance) if variance else 0.0


def _zero(coordinates: Float[np.ndarray, "P r"]) -> Ridge:
    """Return a regression that is 0 for every prompt."""
    return Ridge(np.zeros((coordinates.shape[1], 1)), np.zeros(1), np.zeros((len(coordinates), 1)))
