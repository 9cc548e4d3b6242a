"""Procedures that look at the calibrated score itself, not only at its rank among the draws.

They are not calibrated procedures in the sense of Def. 6, for a given score of theirs stands for a different quantile
under every policy, so their tilt is computed from the whole law. The scores they act on are C_{r,pi_ref} in [0, 1].
"""

from dataclasses import dataclass
from math import isfinite
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from calibrated_rewards.procedures import Law, checked_pool, checked_whole

Array: TypeAlias = npt.NDArray[np.float64]


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
        checked_whole("SoftBestOf", n=self.n)
        if not (isfinite(self.temperature) and self.temperature >= 1e-3):
            raise ValueError(
                "SoftBestOf needs a finite temperature >= 0.001 (BestOf is the same thing below that), "
                f"got temperature={self.temperature!r}."
            )

    @property
    def draws(self) -> int:
        """N."""
        return self.n

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Draw from the softmax, by the Gumbel trick."""
        scores = np.asarray(scores, np.float64)
        return np.asarray(np.argmax(scores / self.temperature + rng.gumbel(size=scores.shape), axis=-1), np.intp)

    def tilt(self, law: Law) -> Array:
        """n E[e_1 / (e_1 + ... + e_n)] given the first, the other n - 1 drawn from the law.

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
        """Exact over all n-subsets of the pool, by the same integral and elementary symmetric polynomials."""
        pool = checked_pool(scores, self.n, f"SoftBestOf({self.n})")
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
    """Elementary symmetric polynomials e_0..e_degree of x[:i], for i = 0..len(x)."""
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
        checked_whole("RewindAndRepeat", max_tries=self.max_tries)
        if not 0 < self.threshold < 1:
            raise ValueError(f"RewindAndRepeat needs a threshold in (0, 1), got threshold={self.threshold!r}.")

    @property
    def draws(self) -> int:
        """max_tries."""
        return self.max_tries

    @property
    def breaks(self) -> tuple[float, ...]:
        """The threshold."""
        return (self.threshold,)

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return the first of the tries to reach the threshold, else the last of them."""
        passed = np.asarray(scores, np.float64)[..., : self.max_tries] >= self.threshold
        last = passed.shape[-1] - 1
        return np.asarray(np.where(passed.any(axis=-1), passed.argmax(axis=-1), last), np.intp)

    def mean_tries(self, law: Law) -> float:
        """(1 - q^N) / (1 - q) with q = F(threshold)."""
        success = float(law.mass[law.u >= self.threshold].sum())
        if not 0 < success < 1:
            return 1.0 if success > 0 else float(self.max_tries)
        return float(-np.expm1(self.max_tries * np.log1p(-success)) / success)

    def tilt(self, law: Law) -> Array:
        """Return the mean number of tries above the threshold, and q^{N-1} below it."""
        failure = float(law.mass[law.u < self.threshold].sum())
        return np.where(law.u >= self.threshold, self.mean_tries(law), failure ** (self.max_tries - 1))

    def pool_weights(self, scores: npt.ArrayLike) -> Array:
        """Exact: tries drawn from the pool without replacement."""
        pool = checked_pool(scores, self.max_tries, f"RewindAndRepeat(max_tries={self.max_tries})")
        below = pool < self.threshold
        failed = int(below.sum())
        if failed < self.max_tries:
            return np.asarray(~below / (len(pool) - failed))
        all_fail = np.exp(_log_binomial(failed, self.max_tries) - _log_binomial(len(pool), self.max_tries))
        return np.asarray(np.where(below, all_fail / failed, (1 - all_fail) / max(len(pool) - failed, 1)))
