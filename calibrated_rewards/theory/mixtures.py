"""Mixtures of procedures: what to train for when the number of draws at inference is not known.

>>> from calibrated_rewards.theory.optimum import optimum
>>> from calibrated_rewards.theory.procedures import BestOf
>>> from calibrated_rewards.theory.tilted_policy import win_rate
>>> for served in (BestOf(1), BestOf(4), BestOf(16)):
...     trained = [optimum(each, kl=1.0) for each in (BestOfUpTo(16), BestOf(4))]
...     print(served, [f"{win_rate(each.transform, each.beta, served):.3f}" for each in trained])
BestOf(n=1) ['0.821', '0.774']
BestOf(n=4) ['0.935', '0.941']
BestOf(n=16) ['0.963', '0.974']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from calibrated_rewards.theory.procedures import (
    AnyLaw,
    Rank,
    best_of_subset,
    check_count,
    check_pool,
    pick_best,
    share_ties,
)
from calibrated_rewards.theory.quadrature import Array

# Of a longer polynomial with equal coefficients the sum is known.
MOST_TERMS = 64
MOST_DRAWS = 10_000_000


@dataclass(frozen=True)
class BestOfUpTo:
    """The best of k draws, k drawn from 1..n in proportion to weights: g(C) = sum_k w_k k C^{k-1} / sum_k w_k.

    Without `weights` they are harmonic, w_k = 1/k. Then g(C) is in proportion to 1 + C + ... + C^{n-1}, and the win
    rate over a single draw, base=Standard(), is TailRL's objective (arXiv 2609.02987), cut at n, for rewards that are
    quantiles. By default the reference is decoded with the mixture too, and draws a k of its own.

    >>> BestOfUpTo(3).chances.round(4), BestOfUpTo(3, weights=(0, 1, 1)).chances
    (array([0.5455, 0.2727, 0.1818]), array([0. , 0.5, 0.5]))
    """

    n: int
    weights: Sequence[float] | None = None
    breaks = ()

    def __post_init__(self) -> None:
        check_count("BestOfUpTo", n=self.n)
        if self.n > MOST_DRAWS:
            raise ValueError(f"BestOfUpTo has a weight for each k and needs n <= {MOST_DRAWS:,}, got n={self.n!r}.")
        if self.weights is None:
            return
        weights = np.asarray(self.weights, np.float64)
        if weights.shape != (self.n,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(
                f"BestOfUpTo needs weights for k = 1..{self.n}, finite, >= 0 and not all 0, got {self.weights!r:.80}."
            )
        object.__setattr__(self, "weights", tuple(weights.tolist()))

    @property
    def draws(self) -> int:
        """The largest number of draws, n."""
        return self.n

    @property
    def chances(self) -> Array:
        """The probability of each k = 1..n: the weights over their sum."""
        weights = 1 / np.arange(1, self.n + 1) if self.weights is None else np.array(self.weights)
        return np.asarray(weights / weights.sum())

    @cached_property
    def _coefficients(self) -> list[float]:
        """The coefficients of g from C^{n-1} down to C^0. None is negative, so Horner's rule loses no digits."""
        coefficients: list[float] = (self.chances * np.arange(1, self.n + 1))[::-1].tolist()
        return coefficients

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Draw k for each row and return the largest of its first k, ties at random."""
        scores = np.asarray(scores, np.float64)
        k = 1 + rng.choice(self.n, size=(*scores.shape[:-1], 1), p=self.chances)
        return pick_best(np.where(np.arange(scores.shape[-1]) < k, scores, -np.inf), rng)

    def density(self, rank: Rank, below_one: Rank) -> Rank:
        """Return g(C), a polynomial in C without negative coefficients: it never falls."""
        if self.weights is None and self.n > MOST_TERMS:
            # 1 + C + ... + C^{n-1} = (1 - C^n) / (1 - C), with (1 - C^n) from 1 - C.
            left = np.maximum(below_one, np.finfo(np.float64).tiny)
            with np.errstate(divide="ignore"):
                total = -np.expm1(self.n * np.log1p(-left)) / left
            return total * self._coefficients[0]  # type: ignore[no-any-return]
        value = 0 * rank
        for coefficient in self._coefficients:
            value = value * rank + coefficient
        return value

    def tilt(self, law: AnyLaw) -> Array:
        """Return g(F(u)) at the nodes of the law."""
        return self.density(law.cdf, law.survival)

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return the mean over k of the exact chances to be the best of a random k-subset of the pool."""
        pool = check_pool(scores, self.n, f"BestOfUpTo({self.n})")
        by_rank = sum(chance * best_of_subset(len(pool), k) for k, chance in enumerate(self.chances, start=1))
        return share_ties(pool, np.asarray(by_rank))
