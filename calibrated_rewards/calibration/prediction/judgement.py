"""Errors of predicted distributions for prompts that were left out, beside one distribution for all prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from calibrated_rewards.calibration.prediction.conditional import Sample

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
    """Kolmogorov's distance of the distribution of quantiles from the uniform one."""
    u: float
    """Mean distance from the quantile among the prompt's own references."""
    histogram: tuple[float, ...]
    """The share of quantiles in each tenth of [0, 1]."""


@dataclass(frozen=True)
class Errors:
    """The errors of each step, of prompts that were left out; `str()` of it is a table."""

    steps: Mapping[str, Error]
    """The last is no prediction: half of a prompt's own references judge the other half."""
    chosen: str
    """The step that is used: the last with a CRPS lower by more than its standard error."""
    location_r2: float
    """R squared of the prompts' mean scores, each prompt left out; `scale_r2` likewise."""
    scale_r2: float
    prompts: int
    folds: int
    half: float
    """The median number of own references in the last row."""

    def __str__(self) -> str:
        base = self.steps["pooled"].crps or 1.0
        labels = {name: f"{name} ({self.half:g})" if name == OWN else name for name in self.steps}
        rows = [
            f"{labels[name]:<24}{error.pinball:>10.4g}{error.crps:>10.4g}{error.crps / base:>11.0%}{error.pit:>8.3f}"
            f"{error.u:>8.3f}{'  <- used' * (name == self.chosen)}"
            for name, error in self.steps.items()
        ]
        head = f"{'':24}{'pinball':>10}{'CRPS':>10}{'of pooled':>11}{'PIT':>8}{'|u-u*|':>8}"
        foot = (
            f"{self.prompts} prompts, left out in {self.folds} folds; the features tell {self.location_r2:.0%} of the "
            f"variance of locations and {self.scale_r2:.0%} of log scales"
        )
        return "\n".join([head, *rows, foot])

    def as_json(self) -> dict[str, Any]:
        """Return all fields in the types of JSON."""
        return {**vars(self), "steps": {name: error._asdict() for name, error in self.steps.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Errors":
        """Read the errors that `as_json` gave."""
        steps = {
            name: Error(**{**each, "histogram": tuple(each["histogram"])}) for name, each in saved["steps"].items()
        }
        return cls(**{**saved, "steps": steps})


class Losses(NamedTuple):
    """The losses of one way to predict: a number for each prompt, and the quantile of each score."""

    pinball: Float[np.ndarray, " P"]
    crps: Float[np.ndarray, " P"]
    u: Float[np.ndarray, " P"]
    """nan for a prompt with a single score, which has no rank."""
    quantiles: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def judge(
    tested: Sample,
    quantiles: Float[np.ndarray, " n"],
    curves: Float[np.ndarray, "P Q"],
    deciles: Float[np.ndarray, "P nine"],
) -> Losses:
    """Judge predictions for prompts by scores of theirs: the quantile of each score, and the curves at `LEVELS`."""
    u = tested.means(np.abs(quantiles - rank_among_others(tested)))
    return Losses(pinball(tested, deciles, DECILES), 2 * pinball(tested, curves, LEVELS), u, quantiles, tested.weights)


def average_losses(parts: Sequence[Losses]) -> Error:
    """Average the losses of several lots of prompts."""
    pinballs, crps, u, quantiles, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    ranked = u[~np.isnan(u)]
    bins, _ = np.histogram(quantiles, BINS, (0, 1), weights=weights)
    return Error(
        float(pinballs.mean()),
        float(crps.mean()),
        distance_from_uniform(quantiles, weights),
        float(ranked.mean()) if len(ranked) else float("nan"),
        tuple((bins / weights.sum()).tolist()),
    )


def pinball(
    tested: Sample, curves: Float[np.ndarray, "P Q"], levels: Float[np.ndarray, " Q"]
) -> Float[np.ndarray, " P"]:
    """Return the mean pinball loss of each prompt's curve for its scores."""
    losses, owners = np.empty(len(tested.scores)), tested.owners
    for part in np.array_split(np.arange(len(losses)), 1 + len(losses) // 20_000):
        gaps = tested.scores[part, None] - curves[owners[part]]
        losses[part] = np.maximum(levels * gaps, (levels - 1) * gaps).mean(axis=1)
    return tested.means(losses)


def rank_among_others(sample: Sample) -> Float[np.ndarray, " n"]:
    """Return each score's quantile among the others of its prompt, ties at the middle; nan if there is no other.

    >>> rank_among_others(Sample(np.array([1.0, 2.0, 2.0, 5.0]), np.array([3, 1]))).tolist()
    [0.0, 0.75, 0.75, nan]
    """
    position = np.arange(len(sample.scores)) - np.repeat(np.cumsum(sample.counts) - sample.counts, sample.counts)
    new = np.append(True, (np.diff(sample.scores) != 0) | (np.diff(sample.owners) != 0))
    sizes = np.diff(np.append(np.flatnonzero(new), len(new)))
    middle = np.repeat(np.add.reduceat(position, np.flatnonzero(new)) / sizes, sizes)
    others = np.repeat(sample.counts - 1, sample.counts)
    return np.where(others > 0, middle / np.maximum(others, 1), np.nan)


def distance_from_uniform(u: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    """Return the largest distance between a weighted sample's distribution function and the uniform one."""
    order = np.argsort(u)
    after = np.cumsum(weights[order]) / weights.sum()
    before = np.append(0.0, after[:-1])
    return float(max(np.abs(after - u[order]).max(), np.abs(before - u[order]).max()))
