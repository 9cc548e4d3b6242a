"""A prompt's distribution of scores from its features: a location, a scale, and a curve, common or bent for it."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from calibrated_rewards.calibration.prediction.curves import Curve, Sample, curve_of
from calibrated_rewards.calibration.prediction.regression import Directions, Network, Ridge, ridge, trained

# How much of the distribution the features tell, step by step; the first is the same for all prompts.
STEPS = ("pooled", "+ location", "+ scale", "+ network")


@dataclass(frozen=True, eq=False)
class Conditional:
    """The distribution, given features: what they say of a prompt maps its scores to the scale of `curve`.

    The curve is that of scores whose own prompt was left out, so it is as wide as the predictions are uncertain: a
    quantile under it is the expected one, and uniform over the prompts of the table.
    """

    weights: Float[np.ndarray, "d 2"]
    """From features to location and log scale."""
    intercept: Float[np.ndarray, " 2"]
    low: Float[np.ndarray, " 2"]
    """No prompt's location and scale are taken beyond those of the table's prompts: `low` and `high`."""
    high: Float[np.ndarray, " 2"]
    curve: Curve
    network: Network | None = None

    def places(self, features: Float[np.ndarray, "P d"]) -> Float[np.ndarray, "P T"]:
        """What the features say of each prompt: location, log scale, and from the network its quantiles."""
        told = np.clip(features @ self.weights + self.intercept, self.low, self.high)
        return told if self.network is None else np.hstack([told, self.network(features)])

    def cdf(self, places: Float[np.ndarray, "n T"], scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The quantile of each score, given its prompt's place."""
        standard = (scores - places[:, 0]) / np.exp(places[:, 1])
        if self.network is not None:
            standard = moved(standard, places[:, 2:], self.network.quantiles[None])
        return self.curve.cdf(standard)

    def quantiles(self, places: Float[np.ndarray, "P T"], levels: Float[np.ndarray, " Q"]) -> Float[np.ndarray, "P Q"]:
        """The score at each level, for each prompt."""
        standard = np.tile(self.curve.icdf(levels), (len(places), 1))
        if self.network is not None:
            bent = np.repeat(places[:, 2:], len(levels), axis=0)
            standard = moved(standard.ravel(), self.network.quantiles[None], bent).reshape(standard.shape)
        return np.asarray(places[:, :1] + np.exp(places[:, 1:2]) * standard)

    def on_features(self, directions: Directions) -> "Conditional":
        """The same, of features in place of their coordinates."""
        weights, intercept = directions.on_features(self.weights, self.intercept)
        network = self.network
        if network is not None:
            first, bias = directions.on_features(network.first, network.first_bias)
            network = replace(network, first=first, first_bias=bias)
        return replace(self, weights=weights, intercept=intercept, network=network)


@dataclass(frozen=True, eq=False)
class Steps:
    """The distributions that a sample leads to: each has more of the features, and is made when asked for."""

    coordinates: Float[np.ndarray, "P r"]
    sample: Sample
    location: Ridge
    scale: Ridge
    levels: Float[np.ndarray, " Q"]
    seed: int

    def __call__(self, step: int) -> Conditional:
        """The distribution of a step."""
        nothing = _constant(self.coordinates)
        parts = [(nothing, nothing), (self.location, nothing), (self.location, self.scale)][min(step, 2)]
        left_out = np.hstack([part.left_out for part in parts])
        each = left_out[self.sample.owners]
        standard = (self.sample.scores - each[:, 0]) / np.exp(each[:, 1])
        curve = curve_of(standard, self.sample.weights, self.levels)
        weights, intercept = np.hstack([part.weights for part in parts]), np.hstack([part.intercept for part in parts])
        found = Conditional(weights, intercept, left_out.min(axis=0), left_out.max(axis=0), curve)
        if step < 3:
            return found
        network = trained(self.coordinates, self.sample._replace(scores=standard), curve, self.seed)
        return replace(found, network=network)

    def explained(self) -> tuple[float, float]:
        """What part of the variance of locations, and of log scales, is told by the features of others."""
        mean = self.sample.means(self.sample.scores)
        size = log_size(self.sample, self.location.left_out[:, 0])
        return _explained(self.location, mean), _explained(self.scale, size)


def steps_of(
    coordinates: Float[np.ndarray, "P r"], sample: Sample, levels: Float[np.ndarray, " Q"], seed: int
) -> Steps:
    """The location and the scale of a sample's prompts, as linear functions of their coordinates."""
    location = ridge(coordinates, sample.means(sample.scores)[:, None])
    scale = ridge(coordinates, log_size(sample, location.left_out[:, 0])[:, None])
    return Steps(coordinates, sample, location, scale, levels, seed)


def log_size(sample: Sample, location: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """The logarithm of how far each prompt's scores are from a location, in the root of the mean square."""
    size = np.sqrt(sample.means((sample.scores - location[sample.owners]) ** 2))
    # A prompt whose scores are all predicted exactly has no logarithm.
    return np.asarray(np.log(np.maximum(size, 1e-4 * size.mean() + 1e-30)))


def moved(
    values: Float[np.ndarray, " n"], start: Float[np.ndarray, "#n S"], end: Float[np.ndarray, "#n S"]
) -> Float[np.ndarray, " n"]:
    """Values under the map that takes a row of ascending knots to another: linear between them, a shift outside.

    >>> moved(np.array([0.5, 3.0]), np.array([[0.0, 1.0]]), np.array([[0.0, 10.0]]))
    array([ 5., 12.])
    """
    steps = np.maximum(np.diff(start), 1e-300)
    between = (np.clip((values[:, None] - start[:, :-1]) / steps, 0, 1) * np.diff(end)).sum(axis=1)
    outside = np.minimum(values - start[:, 0], 0) + np.maximum(values - start[:, -1], 0)
    return np.asarray(end[:, 0] + between + outside)


def _explained(part: Ridge, targets: Float[np.ndarray, " P"]) -> float:
    """R squared of the predictions for prompts left out; below 0 it is worth nothing, and shown as 0."""
    variance = float(targets.var())
    return max(0.0, 1 - float(np.mean((targets - part.left_out[:, 0]) ** 2)) / variance) if variance else 0.0


def _constant(coordinates: Float[np.ndarray, "P r"]) -> Ridge:
    """What is 0 for every prompt."""
    return Ridge(np.zeros((coordinates.shape[1], 1)), np.zeros(1), np.zeros((len(coordinates), 1)))
