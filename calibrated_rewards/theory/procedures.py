"""Inference-time procedures: ways to choose one of a policy's responses (sections 2, 4.2 and App. G of the paper).

Every procedure has three methods, which the tests hold against each other:

* `choose(scores, rng)`: run it, on the calibrated scores of `draws` responses;
* `tilt(law)`: what it does to the law of u, as the density of its output against the density of one draw (Def. 6);
* `pool_weights(scores)`: how likely each of m >= `draws` given responses is to come out when the procedure is run on a
  random choice of them: the weights of the exact U-statistic in `evaluation`.

>>> BestOf(2).pool_weights([0.1, 0.7, 0.4]).round(4)
array([0.    , 0.6667, 0.3333])

`SoftBestOf` and `RewindAndRepeat` look at the calibrated score C_{r,pi_ref} itself, not only at its rank among the
draws. They are no calibrated procedures in the sense of Def. 6, since a score is another quantile under every policy,
so their tilt is computed from the whole law.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isfinite
from typing import Any, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from calibrated_rewards.theory.quadrature import Array, Law, NodeLaw

# Quantiles one by one (an ODE solver asks for millions of them) or as an array.
Rank = TypeVar("Rank", float, npt.NDArray[np.float64])
AnyLaw: TypeAlias = Law | NodeLaw


@runtime_checkable
class Procedure(Protocol):
    """A way to get one response out of a policy."""

    @property
    def draws(self) -> int:
        """The largest number of responses that it looks at."""

    @property
    def breaks(self) -> tuple[float, ...]:
        """Quantiles at which its tilt jumps."""

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return the index of the response that comes out, along the last axis of `scores`."""

    def tilt(self, law: AnyLaw) -> Array:
        """Return the density of the output over the density of a single draw."""

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return the probability of each response of a pool to come out."""


@runtime_checkable
class CalibratedProcedure(Procedure, Protocol):
    """A procedure whose tilt is a function g of the policy's own quantile (Def. 6): Theorem 2 holds for it."""

    def density(self, rank: Rank, below_one: Rank) -> Rank:
        """Return g at the quantile `rank`, with `below_one` = 1 - rank given to full precision; its integral is 1."""


def check_count(name: str, **number: object) -> None:
    """Refuse a count that is not a whole number >= 1, naming the procedure and the parameter."""
    for key, value in number.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} needs a whole {key} >= 1, got {key}={value!r}.")


def check_pool(scores: npt.ArrayLike, draws: int, name: str) -> Array:
    """Return the scores as an array; refuse any that are not finite, on one axis and as many as the procedure draws."""
    pool = np.asarray(scores, np.float64)
    if pool.ndim != 1 or len(pool) < draws:
        raise ValueError(f"{name} needs a pool of at least {draws} scores on one axis, got shape {pool.shape}.")
    if not np.isfinite(pool).all():
        raise ValueError(f"{name} needs finite scores, got {pool[~np.isfinite(pool)][0]}.")
    return pool


def pick_best(scores: Array, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Pick the first largest in a random order, so that ties fall to each with equal chance."""
    order = rng.permuted(np.broadcast_to(np.arange(scores.shape[-1]), scores.shape), axis=-1)
    best = np.argmax(np.take_along_axis(scores, order, -1), axis=-1)
    return np.asarray(np.take_along_axis(order, best[..., None], -1)[..., 0], np.intp)


def share_ties(pool: Array, by_rank: Array) -> Array:
    """Hand out weights by rank; tied scores share theirs, as a random tie-break would."""
    _, group, size = np.unique(pool, return_inverse=True, return_counts=True)
    ends = np.cumsum(size)
    total = np.add.reduceat(by_rank, ends - size)
    return np.asarray((total / size)[group])


def best_of_subset(m: int, n: int) -> Array:
    """Return P(the best of a random n of m is the i-th smallest) = binom(i - 1, n - 1) / binom(m, n), i = 1..m.

    >>> best_of_subset(4, 2)
    array([0.        , 0.16666667, 0.33333333, 0.5       ])
    """
    i = np.arange(1, m + 1)
    reachable = i >= n
    i = np.where(reachable, i, n)
    log_ways = gammaln(i) - gammaln(n) - gammaln(i - n + 1)
    weights = np.where(reachable, np.exp(log_ways - (gammaln(m + 1) - gammaln(n + 1) - gammaln(m - n + 1))), 0.0)
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class Standard:
    """One draw, with no choice among several."""

    draws = 1
    breaks = ()

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return 0, the index of the first response."""
        return np.zeros(np.shape(scores)[:-1], np.intp)

    def density(self, rank: Rank, below_one: Rank) -> Rank:
        """Return g = 1 at every quantile."""
        return 0 * rank + 1.0

    def tilt(self, law: AnyLaw) -> Array:
        """Return a density of 1 everywhere."""
        return np.ones_like(law.u)

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return 1/m for each of m responses."""
        pool = check_pool(scores, 1, "Standard")
        return np.full(len(pool), 1 / len(pool))


@dataclass(frozen=True)
class BestOf:
    """The best of n draws: g(C) = n C^{n-1} (Lemma 5)."""

    n: int
    breaks = ()

    def __post_init__(self) -> None:
        check_count("BestOf", n=self.n)

    @property
    def draws(self) -> int:
        """The number of draws, n."""
        return self.n

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return the largest, ties at random."""
        return pick_best(np.asarray(scores, np.float64), rng)

    def density(self, rank: Rank, below_one: Rank) -> Rank:
        """Return g(C) = n C^{n-1}, high at the top."""
        return self.n * rank ** (self.n - 1)

    def tilt(self, law: AnyLaw) -> Array:
        """Return g(F(u)) at the nodes of the law."""
        return self.density(law.cdf, law.survival)

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return the exact chances to be the best of a random n-subset of the pool."""
        pool = check_pool(scores, self.n, f"BestOf({self.n})")
        return share_ties(pool, best_of_subset(len(pool), self.n))


@dataclass(frozen=True)
class WorstOf:
    """The worst of n draws, as a best-of-n jailbreak would pick it: g(C) = n (1 - C)^{n-1} (Lemma 5)."""

    n: int
    breaks = ()

    def __post_init__(self) -> None:
        check_count("WorstOf", n=self.n)

    @property
    def draws(self) -> int:
        """The number of draws, n."""
        return self.n

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return the smallest, ties at random."""
        return pick_best(-np.asarray(scores, np.float64), rng)

    def density(self, rank: Rank, below_one: Rank) -> Rank:
        """Return g(C) = n (1 - C)^{n-1}."""
        return self.n * below_one ** (self.n - 1)

    def tilt(self, law: AnyLaw) -> Array:
        """Return g(F(u)) at the nodes of the law."""
        return self.density(law.cdf, law.survival)

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return the exact chances to be the worst of a random n-subset of the pool."""
        pool = check_pool(scores, self.n, f"WorstOf({self.n})")
        return share_ties(pool, best_of_subset(len(pool), self.n)[::-1])


@dataclass(frozen=True)
class Calibrated:
    """A calibrated procedure of any density: T_pi(y) ~ pi(y) g(C_pi(y)) for a g >= 0 on [0, 1] (Def. 6, Theorem 4).

    It is known by its density alone, so it is run by drawing `draws` responses and picking one in proportion to
    g(rank): exact as draws grows, as any sampling-importance-resampling is.

    >>> Calibrated(np.square).density(np.array([0.5, 1.0]), np.array([0.5, 0.0])).round(6)
    array([0.75, 3.  ])
    """

    g: Callable[[Array], Any]
    draws: int = 64
    breaks = ()

    def __post_init__(self) -> None:
        check_count("Calibrated", draws=self.draws)
        values = np.asarray(self.g(np.linspace(0, 1, 1025)), np.float64)
        if values.shape != (1025,) or not (np.isfinite(values) & (values >= 0)).all() or not self.total > 0:
            raise ValueError(
                f"Calibrated needs a g that maps arrays on [0, 1] to finite values >= 0, not all 0, got g={self.g!r}."
            )

    @cached_property
    def total(self) -> float:
        """The integral of g over [0, 1]."""
        from scipy.integrate import quad

        # In pieces, or the rule would step over a g that is 0 but for a narrow bump.
        ends = np.linspace(0, 1, 65)
        pieces = [quad(self._at, a, b, epsabs=1e-14, epsrel=1e-12, limit=200)[0] for a, b in pairwise(ends)]
        return float(sum(pieces))

    def _at(self, c: float) -> float:
        return float(np.asarray(self.g(np.array([c])))[0])

    def density(self, rank: Rank, below_one: Rank) -> Rank:
        """Return g(C) over its integral."""
        value: Any = self.g(np.asarray(rank))
        return cast(Rank, value / self.total)

    def tilt(self, law: AnyLaw) -> Array:
        """Return g(F(u)) at the nodes of the law."""
        return self.density(law.cdf, law.survival)

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Pick one in proportion to g at its rank among the draws."""
        scores = np.asarray(scores, np.float64)
        rows = scores.reshape(-1, scores.shape[-1])
        picked = [rng.choice(len(row), p=self.pool_weights(row)) for row in rows]
        return np.array(picked, np.intp).reshape(scores.shape[:-1])

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return self-normalised weights in proportion to g at the middle of each rank's bin; ties share."""
        pool = check_pool(scores, 1, "Calibrated")
        by_rank = np.asarray(self.g((np.arange(len(pool)) + 0.5) / len(pool)), np.float64)
        if not by_rank.any():
            raise ValueError(f"Calibrated needs more than {len(pool)} responses: g is 0 at the ranks of all of them.")
        return share_ties(pool, by_rank / by_rank.sum())


def _log_binomial(n: int, k: int) -> float:
    return float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


@dataclass(frozen=True)
class SoftBestOf:
    """One of n draws, in proportion to e^{u / temperature}: BestOf(n) as it goes to 0, one draw at infinity.

    >>> SoftBestOf(2, temperature=1.0).pool_weights([0.0, 1.0]).round(6)
    array([0.268941, 0.731059])
    """

    n: int
    temperature: float
    breaks = ()

    def __post_init__(self) -> None:
        check_count("SoftBestOf", n=self.n)
        if not (isfinite(self.temperature) and self.temperature >= 1e-3):
            raise ValueError(
                "SoftBestOf needs a finite temperature >= 0.001 (BestOf is the same thing below that), "
                f"got temperature={self.temperature!r}."
            )

    @property
    def draws(self) -> int:
        """The number of draws, n."""
        return self.n

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Draw from the softmax, by the Gumbel trick."""
        scores = np.asarray(scores, np.float64)
        return np.asarray(np.argmax(scores / self.temperature + rng.gumbel(size=scores.shape), axis=-1), np.intp)

    def tilt(self, law: AnyLaw) -> Array:
        """Return n E[e_1 / (e_1 + ... + e_n)] given the first, the other n - 1 drawn from the law.

        1/S = int_0^inf e^{-xS} dx turns the mean over n - 1 others into the (n - 1)th power of one.
        """
        log_heat = (law.u - 1) / self.temperature
        total = np.zeros_like(log_heat)
        for part in np.array_split(self._nodes, max(1, len(self._nodes) // 256)):
            z = np.minimum(part[:, None] + log_heat, 700.0)
            others = (np.exp(-np.exp(z)) @ law.mass) ** (self.n - 1)
            total += others @ np.exp(z - np.exp(z))
        return np.asarray(self.n * total * self._step)

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return exact weights over all n-subsets of the pool, by elementary symmetric polynomials."""
        pool = check_pool(scores, self.n, f"SoftBestOf({self.n})")
        coldest = max(-700.0, (pool.min() - pool.max()) / self.temperature)
        y = np.arange(-40.0, 6.0 - coldest, self._step)
        z = np.minimum(y + np.maximum((pool - pool.max()) / self.temperature, -700.0)[:, None], 700.0)
        gone = np.exp(-np.exp(z))
        ahead, behind = _symmetric(gone, self.n - 1), _symmetric(gone[::-1], self.n - 1)[::-1]
        others = np.einsum("iky,iky->iy", ahead[:-1], behind[1:, ::-1])
        weights = (others * np.exp(z - np.exp(z))).sum(axis=1) * self._step
        return np.asarray(weights / np.exp(_log_binomial(len(pool), self.n)))

    # The integrand in y = log x is analytic for |Im y| < pi/2, so the trapezoid rule's error is e^{-pi^2 / step}.
    _step = 0.25

    @property
    def _nodes(self) -> Array:
        return np.arange(-40.0, 1 / self.temperature + 6.0, self._step)


def _symmetric(x: Array, degree: int) -> Array:
    """Return the elementary symmetric polynomials e_0..e_degree of x[:i], for i = 0..len(x)."""
    table = np.zeros((len(x) + 1, degree + 1, *x.shape[1:]))
    table[0, 0] = 1.0
    for i, new in enumerate(x):
        table[i + 1] = table[i]
        table[i + 1, 1:] += new * table[i, :-1]
    return table


@dataclass(frozen=True)
class RewindAndRepeat:
    """Draw until the calibrated score reaches the threshold, at most max_tries times, keeping the last (App. G).

    >>> RewindAndRepeat(threshold=0.85, max_tries=32).choose([0.2, 0.9, 0.95], np.random.default_rng(0))
    array(1)
    """

    threshold: float = 0.85
    max_tries: int = 32

    def __post_init__(self) -> None:
        check_count("RewindAndRepeat", max_tries=self.max_tries)
        if not 0 < self.threshold < 1:
            raise ValueError(f"RewindAndRepeat needs a threshold in (0, 1), got threshold={self.threshold!r}.")

    @property
    def draws(self) -> int:
        """The number of draws at most, max_tries."""
        return self.max_tries

    @property
    def breaks(self) -> tuple[float, ...]:
        """The threshold, where the tilt jumps."""
        return (self.threshold,)

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return the first of the tries to reach the threshold, else the last of them."""
        passed = np.asarray(scores, np.float64)[..., : self.max_tries] >= self.threshold
        last = passed.shape[-1] - 1
        return np.asarray(np.where(passed.any(axis=-1), passed.argmax(axis=-1), last), np.intp)

    def mean_tries(self, law: AnyLaw) -> float:
        """Return (1 - q^N) / (1 - q) with q = F(threshold)."""
        success = float(law.mass[law.u >= self.threshold].sum())
        if not 0 < success < 1:
            return 1.0 if success > 0 else float(self.max_tries)
        return float(-np.expm1(self.max_tries * np.log1p(-success)) / success)

    def tilt(self, law: AnyLaw) -> Array:
        """Return the mean number of tries above the threshold, and q^{N-1} below it."""
        failure = float(law.mass[law.u < self.threshold].sum())
        return np.where(law.u >= self.threshold, self.mean_tries(law), failure ** (self.max_tries - 1))

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Return exact weights for tries drawn from the pool without replacement."""
        pool = check_pool(scores, self.max_tries, f"RewindAndRepeat(max_tries={self.max_tries})")
        below = pool < self.threshold
        failed = int(below.sum())
        if failed < self.max_tries:
            return np.asarray(~below / (len(pool) - failed))
        all_fail = np.exp(_log_binomial(failed, self.max_tries) - _log_binomial(len(pool), self.max_tries))
        return np.asarray(np.where(below, all_fail / failed, (1 - all_fail) / max(len(pool) - failed, 1)))
