"""How good predicted distributions are for prompts that were left out, beside one distribution for all prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from calibrated_rewards.calibration.prediction.curves import Sample

# CRPS is over all of these levels, the pinball loss over the deciles.
LEVELS = (np.arange(100) + 0.5) / 100
DECILES = np.arange(1, 10) / 10
BINS = 10
OWN = "own references"


class Error(NamedTuple):
    """The errors of one way to predict; each prompt counts the same."""

    pinball: float
    """Mean over the deciles, in the reward model's units."""
    crps: float
    """The continuous ranked probability score, in the reward model's units."""
    pit: float
    """How far the distribution of quantiles is from uniform: the largest distance (Kolmogorov's)."""
    u: float
    """Mean distance from the quantile among the prompt's own references."""
    histogram: tuple[float, ...]
    """The share of quantiles in each tenth of [0, 1]."""


@dataclass(frozen=True)
class Errors:
    """The errors of each step, of prompts that were left out; `str()` of it is a table."""

    steps: Mapping[str, Error]
    """The last is no prediction: it is what half of a prompt's own references say of the other half."""
    chosen: str
    """The step that is used: the last with a CRPS lower by more than its standard error."""
    location_r2: float
    """What part of the variance of the prompts' mean scores is predicted, each prompt left out; `scale_r2` likewise."""
    scale_r2: float
    prompts: int
    folds: int
    half: float
    """How many own references the last row has, in the median."""

    def __str__(self) -> str:
        base = self.steps["pooled"].crps or 1.0
        named = [
            (f"{name} ({self.half:g})" if name == OWN else name, name, error) for name, error in self.steps.items()
        ]
        rows = [
            f"{label:<24}{error.pinball:>10.4g}{error.crps:>10.4g}{error.crps / base:>11.0%}{error.pit:>8.3f}"
            f"{error.u:>8.3f}{'  <- used' * (name == self.chosen)}"
            for label, name, error in named
        ]
        head = f"{'':24}{'pinball':>10}{'CRPS':>10}{'of pooled':>11}{'PIT':>8}{'|u-u*|':>8}"
        foot = (
            f"{self.prompts} prompts, left out in {self.folds} folds; the features tell {self.location_r2:.0%} of the "
            f"variance of locations and {self.scale_r2:.0%} of log scales"
        )
        return "\n".join([head, *rows, foot])

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {**vars(self), "steps": {name: error._asdict() for name, error in self.steps.items()}}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Errors":
        """The errors that `as_json` gave."""
        steps = {name: Error(**{**each, "histogram": tuple(each["histogram"])}) for name, each in said["steps"].items()}
        return cls(**{**said, "steps": steps})


class Judged(NamedTuple):
    """What one way to predict got wrong: a number for each prompt, and the quantile of each score."""

    pinball: Float[np.ndarray, " P"]
    crps: Float[np.ndarray, " P"]
    u: Float[np.ndarray, " P"]
    """nan for a prompt with a single score: nothing says where it stands."""
    quantiles: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def judged(
    asked: Sample,
    quantiles: Float[np.ndarray, " n"],
    curves: Float[np.ndarray, "P Q"],
    deciles: Float[np.ndarray, "P nine"],
) -> Judged:
    """Predictions for prompts judged by scores of theirs: the quantile of each score, and the curves at `LEVELS`."""
    u = asked.means(np.abs(quantiles - among_others(asked)))
    return Judged(pinball(asked, deciles, DECILES), 2 * pinball(asked, curves, LEVELS), u, quantiles, asked.weights)


def error_of(parts: Sequence[Judged]) -> Error:
    """The mean errors of several lots of prompts."""
    pinballs, crps, u, quantiles, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    known = u[~np.isnan(u)]
    bins, _ = np.histogram(quantiles, BINS, (0, 1), weights=weights)
    return Error(
        float(pinballs.mean()),
        float(crps.mean()),
        from_uniform(quantiles, weights),
        float(known.mean()) if len(known) else float("nan"),
        tuple((bins / weights.sum()).tolist()),
    )


def pinball(
    asked: Sample, curves: Float[np.ndarray, "P Q"], levels: Float[np.ndarray, " Q"]
) -> Float[np.ndarray, " P"]:
    """The mean pinball loss of each prompt's curve for its scores."""
    losses, owners = np.empty(len(asked.scores)), asked.owners
    for part in np.array_split(np.arange(len(losses)), 1 + len(losses) // 20_000):
        gaps = asked.scores[part, None] - curves[owners[part]]
        losses[part] = np.maximum(levels * gaps, (levels - 1) * gaps).mean(axis=1)
    return asked.means(losses)


def among_others(sample: Sample) -> Float[np.ndarray, " n"]:
    """The quantile of each score among the others of its prompt, ties at the middle; nan where there is no other.

    >>> among_others(Sample(np.array([1.0, 2.0, 2.0, 5.0]), np.array([3, 1]))).tolist()
    [0.0, 0.75, 0.75, nan]
    """
    place = np.arange(len(sample.scores)) - np.repeat(np.cumsum(sample.counts) - sample.counts, sample.counts)
    new = np.append(True, (np.diff(sample.scores) != 0) | (np.diff(sample.owners) != 0))
    sizes = np.diff(np.append(np.flatnonzero(new), len(new)))
    middle = np.repeat(np.add.reduceat(place, np.flatnonzero(new)) / sizes, sizes)
    others = np.repeat(sample.counts - 1, sample.counts)
    return np.where(others > 0, middle / np.maximum(others, 1), np.nan)


def from_uniform(u: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    """The largest distance between a weighted sample's distribution function and the uniform one's."""
    order = np.argsort(u)
    after = np.cumsum(weights[order]) / weights.sum()
    before = np.append(0.0, after[:-1])
    return float(max(np.abs(after - u[order]).max(), np.abs(before - u[order]).max()))
