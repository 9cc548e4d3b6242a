"""Weighted rollouts as policies: their KL, their output under a procedure and their win rates, as exact sums.

K rollouts of a prompt stand for the reference with weights 1/K, and for any other policy with weights of their own.
Rows of unequal length are padded with places of no weight; scores, values and weights are all (P, K).

>>> from calibrated_rewards.theory.procedures import BestOf
>>> pools = WeightedPools(Samples(select=[[0.3, 0.1, 0.7]]))
>>> pools.output(pools.uniform, BestOf(2)).round(3)  # 5/9 of all pairs, drawn with replacement, hold the largest
array([[0.333, 0.111, 0.556]])
"""

from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.table.search import tie_spans
from calibrated_rewards.theory.procedures import CalibratedProcedure

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Standings:
    """Order and ties of each prompt's responses by one score."""

    order: Int[np.ndarray, "P K"]
    below: Int[np.ndarray, "P K"]
    """Number of responses that each one beats."""
    upto: Int[np.ndarray, "P K"]
    """The same with itself and those that it ties with."""

    @classmethod
    def of(cls, scores: Float[np.ndarray, "P K"]) -> "Standings":
        """Sort each row and find its ties."""
        order = np.argsort(scores, axis=1, kind="stable")
        first, last = tie_spans(np.take_along_axis(scores, order, 1))
        below, upto = np.empty_like(order), np.empty_like(order)
        np.put_along_axis(below, order, first, 1)
        np.put_along_axis(upto, order, last, 1)
        return cls(order, below, upto)

    def shares(self, mass: Float[np.ndarray, "P K"]) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, "P K"]]:
        """Return the mass below each response, and the mass at or below it."""
        running = np.cumsum(np.take_along_axis(mass, self.order, 1), axis=1)
        running = np.minimum(np.hstack([np.zeros((len(mass), 1)), running]), 1.0)
        return np.take_along_axis(running, self.below, 1), np.take_along_axis(running, self.upto, 1)

    def beaten(self, mass: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        """Return the share of the mass that each response beats, ties one half."""
        below, upto = self.shares(mass)
        return np.asarray((below + upto) / 2)


@dataclass(frozen=True, eq=False)
class WeightedPools:
    """Rollouts of the reference, a row a prompt, to be given weights."""

    samples: Samples

    @cached_property
    def there(self) -> Bool[np.ndarray, "P K"]:
        """Mask of the rollouts: False in padding."""
        return np.arange(self.samples.sizes.max()) < self.samples.sizes[:, None]

    def filled(self, values: Float[np.ndarray, " responses"], rest: float) -> Float[np.ndarray, "P K"]:
        """Arrange values of all rollouts, prompts end to end, as padded rows."""
        out = np.full(self.there.shape, rest)
        out[self.there] = values
        return out

    @cached_property
    def uniform(self) -> Float[np.ndarray, "P K"]:
        """Weights of the reference itself, 1/K for each rollout."""
        return np.asarray(self.there / self.samples.sizes[:, None])

    @cached_property
    def by_select(self) -> Standings:
        """Standings by the score that procedures select by."""
        return Standings.of(self.filled(np.concatenate(self.samples.select), inf))

    @cached_property
    def by_judge(self) -> Standings:
        """Standings by the judge's score."""
        return Standings.of(self.filled(np.concatenate(self.samples.judge), inf))

    def tilted(
        self, values: Float[np.ndarray, "P K"], beta: float
    ) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, " P"]]:
        """Compute weights ~ e^{values / beta}, and their KL from the reference, prompt by prompt."""
        exponent = np.where(self.there, values - np.max(values, axis=1, where=self.there, initial=-inf)[:, None], 0.0)
        exponent /= beta
        mass = np.exp(exponent) * self.there
        total = mass.sum(axis=1)
        weights = mass / total[:, None]
        moved = np.sum(weights * np.where(mass > 0, exponent, 0.0), axis=1)
        return weights, np.maximum(moved - np.log(total / self.samples.sizes), 0.0)

    def check_reach(self, kl: float, most: float | None = None) -> None:
        """Refuse a KL of `most` or more, by default log K: that of all weight on one rollout."""
        most = float(np.log(self.samples.sizes).mean()) if most is None else most
        if not 0 < kl < most * (1 - 1e-9):
            raise ValueError(
                f"these rollouts, K >= {self.samples.sizes.min()}, reach a KL between 0 and {most:.3g}, got kl={kl!r}."
            )

    def most_kl(self, values: Float[np.ndarray, "P K"]) -> float:
        """Compute the limit of the KL as beta falls to 0: all weight on the largest values of each prompt."""
        top = np.max(values, axis=1, where=self.there, initial=-inf)[:, None]
        return float(np.log(self.samples.sizes / np.sum((values == top) & self.there, axis=1)).mean())

    def beta_for_kl(self, values: Float[np.ndarray, "P K"], kl: float) -> float:
        """Solve for the beta at which the mean KL is `kl`: it falls as beta rises."""
        from scipy.optimize import brentq

        self.check_reach(kl, self.most_kl(values))
        spread = float(np.sqrt(np.sum(self.uniform * self._centred(values) ** 2, axis=1)).mean())
        low = high = log(spread)
        while self._excess_kl(low, values, kl) < 0:
            low -= 2.0
        while self._excess_kl(high, values, kl) > 0:
            high += 2.0
        return exp(brentq(self._excess_kl, low, high, args=(values, kl), xtol=1e-12, rtol=1e-12))

    def _excess_kl(self, log_beta: float, values: Float[np.ndarray, "P K"], kl: float) -> float:
        return float(self.tilted(values, exp(log_beta))[1].mean()) - kl

    def _centred(self, values: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        padded = np.where(self.there, values, 0.0)
        return np.where(self.there, padded - np.sum(padded * self.uniform, axis=1)[:, None], 0.0)

    def output(self, weights: Float[np.ndarray, "P K"], procedure: CalibratedProcedure) -> Float[np.ndarray, "P K"]:
        """Compute the law of the procedure's output: its draws are independent, and ties are broken at random.

        A group of ties takes the integral of g over its share of the quantiles (Def. 6): F^N - F'^N for the best of N.
        Gauss's rule is exact for polynomials, and ties go by weight, so that no weight is divided by.
        """
        below, upto = self.by_select.shares(weights)
        width, above = upto - below, 1.0 - upto
        nodes, shares = np.polynomial.legendre.leggauss((procedure.draws + 1) // 2)
        tilt = np.zeros_like(weights)
        for x, share in zip((nodes + 1) / 2, shares / 2, strict=True):
            tilt += share * procedure.density(below + x * width, above + (1 - x) * width)
        mass = weights * tilt
        return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def win_rates_of(
    policy: Float[np.ndarray, "P K"], base: Float[np.ndarray, "P K"], beaten: Float[np.ndarray, "P K"], itself: bool
) -> Float[np.ndarray, " P"]:
    """Compute each prompt's win rate of the policy's output over the base's, of which a response beats `beaten`.

    By the score that selects, a rollout stands for its bin of quantiles, in which two responses are a fair match: it
    meets `itself` too, for one half; the midpoint rule, off by O(1/K^2) where weights depend on the rank alone. By
    another judge, one rollout says nothing of two responses in its bin, so none meets itself, as in
    `evaluation.predict`: sum_{i != j} A_i B_j w(i, j) / sum_{i != j} A_i B_j, nan where all of both is one rollout.
    """
    wins = np.sum(policy * beaten, axis=1)
    if itself:
        return np.asarray(wins)
    same = np.sum(policy * base, axis=1)
    return np.asarray((wins - same / 2) / np.where(1 - same > 1e-9, 1 - same, np.nan))
