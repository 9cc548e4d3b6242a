"""Confidence bands of the true quantile C, given the rank of a score among K references (Lemma 6, and tighter ones).

The index i = 2 below + equal of a score is all that its rank can be (`finite_k`), so a band is two vectors of 2K+1.

>>> for kind in "dkw", "simultaneous", "pointwise":
...     lower, upper = band(100, 0.05, kind)
...     print(f"{kind:12}  C(y) above 99 of 100: {lower[198]:.3f} or more; above 50 of 100: {lower[100]:.3f} or more")
dkw           C(y) above 99 of 100: 0.854 or more; above 50 of 100: 0.364 or more
simultaneous  C(y) above 99 of 100: 0.912 or more; above 50 of 100: 0.346 or more
pointwise     C(y) above 99 of 100: 0.946 or more; above 50 of 100: 0.398 or more
"""

from functools import lru_cache
from math import exp, isfinite, log, sqrt
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from scipy.special import betaincinv, gammaln, xlogy

from calibrated_rewards.theory.quadrature import Array

Kind: TypeAlias = Literal["dkw", "pointwise", "simultaneous"]


def dkw(K: int, delta: float) -> float:
    """Return sqrt(log(2/delta) / 2K): sup |C^ - C| is at most this with probability 1 - delta (Lemma 6, Massart).

    >>> round(dkw(100, 0.05), 4)
    0.1358
    """
    _check(K, delta)
    return sqrt(log(2 / delta) / (2 * K))


def band(
    K: int, delta: float, kind: Kind = "simultaneous"
) -> tuple[Float[np.ndarray, " {2*K+1}"], Float[np.ndarray, " {2*K+1}"]]:
    """Return both ends of the true quantile by index i = 2 below + equal, each with its guarantee at 1 - delta.

    "dkw" (Lemma 6) and "simultaneous" hold for all responses at once; "simultaneous" gives every order statistic the
    same chance to leave, which is narrower at both ends and, for large K, a little wider in the middle. "pointwise"
    (Clopper-Pearson) holds for one response chosen before looking. An odd index is read as one tie: a response with
    more of them lies between lower[2 below] and upper[2 (below + equal)].
    """
    _check(K, delta)
    match kind:
        case "dkw":
            middle = np.arange(2 * K + 1) / (2 * K)
            return np.maximum(middle - dkw(K, delta), 0.0), np.minimum(middle + dkw(K, delta), 1.0)
        case "pointwise":
            level = delta
        case "simultaneous":
            level = _local_level(K, delta)
        case _:
            raise ValueError(f'band needs kind "dkw", "pointwise" or "simultaneous", got kind={kind!r}.')
    low, high = _boxes(K, level)
    # With b references below and e equal, the quantile lies between the order statistics b and b + e + 1.
    below, above = np.arange(2 * K + 1) // 2, (np.arange(2 * K + 1) + 1) // 2
    return np.append(0.0, low)[below], np.append(high, 1.0)[above]


def coverage(lower: npt.ArrayLike, upper: npt.ArrayLike) -> float:
    """Return P(lower_i <= U_(i) <= upper_i for every i), U_(1) <= ... <= U_(K) sorted uniforms: exact, for any boxes.

    The number of uniforms below t is a Poisson process given its value at 1; its law is carried from one end of a box
    to the next, and each end takes away the counts that would leave a box (Moscovich and Nadler 2017).

    >>> round(coverage([0.0, 0.5], [0.5, 1.0]), 12)  # one uniform in each half
    0.5
    """
    low, high = _sorted_boxes(lower, upper)
    K = len(low)
    times = np.unique(np.concatenate([[0.0], low, high, [1.0]]))
    fewest, most = np.searchsorted(high, times, side="right"), np.searchsorted(low, times, side="left")
    if (low > high).any() or (fewest > most).any():
        return 0.0
    steps, log_factorial = np.diff(times), gammaln(np.arange(K + 1) + 1.0)
    chances, log_total = np.ones(1), 0.0
    for k, step in enumerate(steps, start=1):
        m = np.arange(most[k] - fewest[k - 1] + 1)
        arrivals = np.exp(xlogy(m, K * step) - K * step - log_factorial[m])
        chances = np.convolve(chances, arrivals)[fewest[k] - fewest[k - 1] : m.size]
        total = chances.sum()
        if total == 0.0:
            return 0.0
        chances, log_total = chances / total, log_total + log(total)
    return min(1.0, exp(log_total - (K * log(K) - K - log_factorial[K])))


def _sorted_boxes(lower: npt.ArrayLike, upper: npt.ArrayLike) -> tuple[Array, Array]:
    """Narrow the boxes to what sorted uniforms can reach: no end that an earlier or a later box has passed already."""
    low, high = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    if not (low.ndim == 1 and low.size and low.shape == high.shape and np.isfinite([low, high]).all()):
        raise ValueError(
            f"coverage needs two finite vectors of one length K >= 1, got lower={lower!r:.60}, upper={upper!r:.60}."
        )
    low = np.maximum.accumulate(np.clip(low, 0.0, 1.0))
    return low, np.minimum.accumulate(np.clip(high, 0.0, 1.0)[::-1])[::-1]


def _boxes(K: int, level: float) -> tuple[Array, Array]:
    """Return the central interval of each order statistic, U_(i) ~ Beta(i, K - i + 1), at 1 - level."""
    i = np.arange(1, K + 1)
    low = np.asarray(betaincinv(i, K - i + 1, level / 2), np.float64)
    return low, 1.0 - low[::-1]


@lru_cache(maxsize=256)
def _local_level(K: int, delta: float) -> float:
    """Find the level at which all K central intervals hold together with probability 1 - delta exactly."""
    from scipy.optimize import brentq

    # Between Bonferroni's level and the one that a single order statistic would have.
    low, high = log(delta / K), log(delta)
    if K == 1 or _excess(low, K, delta) <= 0:  # the latter where delta is too small for doubles to tell them apart
        return exp(low)
    return exp(brentq(_excess, low, high, args=(K, delta), xtol=1e-12, rtol=1e-13))


def _excess(log_level: float, K: int, delta: float) -> float:
    return coverage(*_boxes(K, exp(log_level))) - (1 - delta)


def _check(K: float, delta: float) -> None:
    if not (isfinite(K) and int(K) == K and K >= 1):
        raise ValueError(f"A band needs a whole number of references K >= 1, got K={K!r}.")
    if not 0 < delta < 1:
        raise ValueError(f"A band needs 0 < delta < 1, got delta={delta!r}.")
