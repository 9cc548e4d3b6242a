"""A world that is enumerated: the law of the reference over all completions, scores, and all that follows from them.

Plain numpy, nothing of the package: the optimum of any reward, its KL, and win rates with ties one half. Scores tie,
so laws are summed by level first: F is the chance of a lower level or the same, F- of a lower one. Best-of-n has
F^n - F-^n of a level, worst-of-n (1 - F-)^n - (1 - F)^n. Within a level who wins makes no difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# What comes out, by level, of a policy's masses of the levels and the reference's quantiles of them.
Output = Callable[[Array, Array], Array]


def standard(mass: Array, _: Array) -> Array:
    """One draw."""
    return mass


def best_of(n: int, mass: Array, _: Array) -> Array:
    """The best of n draws."""
    upto = mass.cumsum(1)
    return upto**n - np.maximum(upto - mass, 0) ** n


def worst_of(n: int, mass: Array, u: Array) -> Array:
    """The worst of n draws: the best, upside down."""
    return best_of(n, mass[:, ::-1], u)[:, ::-1]


def rewind(threshold: float, tries: int, mass: Array, u: Array) -> Array:
    """Draws until one reaches the quantile, at most so many, the last of which is kept: a sum over the tries."""
    passed = u >= threshold
    failing = np.where(passed, 0.0, mass).sum(1, keepdims=True)
    reached = sum(failing**i for i in range(tries))
    return np.where(passed, mass * reached, mass * failing ** (tries - 1))


OUTPUTS: dict[str, Output] = {
    "Standard()": standard,
    "BestOf(n=4)": partial(best_of, 4),
    "WorstOf(n=4)": partial(worst_of, 4),
    "RewindAndRepeat(threshold=0.85, max_tries=32)": partial(rewind, 0.85, 32),
}


@dataclass(frozen=True)
class Exact:
    """The reference's laws and the scores, a row a prompt."""

    laws: Array
    scores: Array

    @cached_property
    def levels(self) -> Any:
        """For each completion, how many different lower scores its prompt has."""
        return np.stack([np.unique(row, return_inverse=True)[1] for row in self.scores])

    def by_level(self, laws: Array) -> Array:
        """Laws summed over completions that tie."""
        prompts, levels = len(laws), int(self.levels.max()) + 1
        flat = self.levels + levels * np.arange(prompts)[:, None]
        return np.bincount(flat.ravel(), laws.ravel(), prompts * levels).reshape(prompts, levels)

    @cached_property
    def level_quantiles(self) -> Array:
        """The reference's chance of a lower level, and half that of the same."""
        mass = self.by_level(self.laws)
        return np.asarray(mass.cumsum(1) - mass / 2)

    @cached_property
    def quantiles(self) -> Array:
        """C(x, y) of each completion."""
        return np.take_along_axis(self.level_quantiles, self.levels, 1)

    def optimum(self, values: Array, beta: float) -> Array:
        """pi_ref e^{values / beta} / Z."""
        weight = self.laws * np.exp((values - values.max(1, keepdims=True)) / beta)
        return np.asarray(weight / weight.sum(1, keepdims=True))

    def kl(self, laws: Array) -> float:
        """KL(laws || reference), the mean over prompts."""
        return float(self.kl_by_prompt(laws).mean())

    def kl_by_prompt(self, laws: Array) -> Array:
        """KL(laws || reference) of each prompt."""
        return np.asarray((laws * np.log(np.where(laws > 0, laws, 1.0) / self.laws)).sum(1))

    def beta(self, values: Array, kl: float) -> float:
        """The beta at which the optimum's mean KL is `kl`, by bisection."""
        low, high = 1e-5, 1e5
        for _ in range(70):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.kl(self.optimum(values, middle)) > kl else (low, middle)
        return low

    def at_kl(self, values: Array, kl: float) -> Array:
        """The optimum whose mean KL is `kl`."""
        return self.optimum(values, self.beta(values, kl))

    def win_rate(self, laws: Array, output: Output) -> float:
        """How often a policy beats the reference where both are decoded so, ties one half; the mean over prompts."""
        ours, theirs = (output(self.by_level(each), self.level_quantiles) for each in (laws, self.laws))
        return float((ours * (theirs.cumsum(1) - theirs / 2)).sum(1).mean())

    def win_rates(self, laws: Array) -> dict[str, float]:
        """By procedure."""
        return {name: self.win_rate(laws, output) for name, output in OUTPUTS.items()}

    def distance(self, one: Array, other: Array) -> float:
        """Total variation, the mean over prompts."""
        return float(np.abs(one - other).sum(1).mean() / 2)
