"""Bias and error of the values of K references against Phi of the true quantile, and the K that is enough.

The posterior mean has the least mean square error, and yet more bias than the plug-in where e^{tu} is small:

>>> for estimator in "empirical", "posterior", "unbiased", "randomised":
...     excess = float(bias(Exponential(10.0), 32, estimator, 0.5)) / np.exp(5.0)
...     print(f"{estimator:10}  bias at C = 1/2 {excess:+.1%}  rmse {rmse(Exponential(10.0), 32, estimator):.0f}")
empirical   bias at C = 1/2 +47.6%  rmse 2011
posterior   bias at C = 1/2 +96.5%  rmse 1695
unbiased    bias at C = 1/2 -0.0%  rmse 1980
randomised  bias at C = 1/2 +44.7%  rmse 1747
"""

from functools import partial
from itertools import count
from math import ceil, isfinite, sqrt

import numpy as np
import numpy.typing as npt

from calibrated_rewards.theory.bands import band
from calibrated_rewards.theory.finite_k import MOST_FITTED, Estimator, binomial_chances, inside, panels, values
from calibrated_rewards.theory.quadrature import MOST_PANELS, Array
from calibrated_rewards.theory.transforms import Affine, Chain, Exponential, Identity, Power, Transform

MOST_REFERENCES = 10**6
# The exact band takes some tenths of a second at this K, and much longer soon after.
MOST_BANDED = 1000


def bias(transform: Transform, K: int, estimator: Estimator, c: npt.ArrayLike) -> Array | np.float64:
    """Return the mean value over K references at true quantiles c, less Phi(c): exact, and infinite where Phi(c) is.

    >>> u = np.array([0.1, 0.5, 0.9])
    >>> bias(Identity(), 8, "posterior", u).round(4)
    array([ 0.08,  0.  , -0.08])
    """
    c = np.asarray(c, np.float64)
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError(f"bias needs true quantiles c in [0, 1], got c={c!r}.")
    mean = _mean_deviation(values(transform, K, estimator)[::2], c.ravel(), np.zeros(c.size), 1)
    return np.asarray(mean.reshape(c.shape) - transform(c))[()]


def rmse(transform: Transform, K: int, estimator: Estimator = "empirical") -> float:
    """Return the root mean square of value less Phi(C) over C ~ Unif[0, 1] and K references, to 1e-9 of itself.

    >>> [round(rmse(Identity(), 50, estimator) ** -2, 6) for estimator in ("empirical", "posterior")]  # 6K, 6(K + 2)
    [300.0, 312.0]
    """
    whole = values(transform, K, estimator)[::2]
    grid = panels(transform)
    most = len(grid.widths) + MOST_PANELS
    while True:
        phi = inside(transform, grid)
        scale = max(np.abs(whole).max(), np.abs(phi).max()) or 1.0
        density = _mean_deviation(whole / scale, grid.u, phi / scale, 2) * np.exp(grid.log_slope)
        coarse = grid.unresolved(density, 1e-10) & (grid.widths > 1e-6)
        if not coarse.any() or len(coarse) > most:
            return float(scale * sqrt(grid.weights @ density))
        grid = grid.split(coarse)


def references_needed(
    transform: Transform, error: float, estimator: Estimator = "empirical", delta: float | None = None
) -> int:
    """Find the smallest K, by doubling and bisection, whose `rmse` is at most `error`.

    With delta: whose values are within `error` of Phi(C) for all responses at once with probability 1 - delta, by the
    better of two bands (no ties; "simultaneous" is considered up to K = 1000).

    >>> references_needed(Identity(), 0.05), references_needed(Identity(), 0.05, delta=0.05)
    (67, 738)
    """
    if not (isfinite(error) and error > 0):
        raise ValueError(f"references_needed needs a finite error > 0, got error={error!r}.")
    if delta is not None and not np.isfinite(transform(np.array([0.0, 1.0]))).all():
        raise ValueError(f"references_needed with delta needs a transform that is finite on [0, 1], got {transform!r}.")
    worst = partial(_worst_error, delta=delta) if delta is not None else rmse
    most = MOST_FITTED if estimator == "unbiased" and not _has_unbiased(transform) else MOST_REFERENCES
    fails, tried, enough = 0, 1, most + 1
    for step in count():
        excess = worst(transform, tried, estimator) / error
        fails, enough = (tried, enough) if excess > 1 else (fails, tried)
        if fails == most:
            raise ValueError(f"references_needed finds no K <= {fails} with an error of {error!r} for {transform!r}.")
        if enough - fails == 1:
            break
        # Errors fall about as 1/sqrt(K): follow that from the last K tried, and bisect (or double) every other time.
        guess = tried * excess**2 if step % 2 == 0 else min((fails + enough) / 2, max(2 * fails, 1))
        tried = min(max(ceil(guess), fails + 1), enough - 1)
    return enough


def _worst_error(transform: Transform, K: int, estimator: Estimator, delta: float) -> float:
    """Return the largest distance from a value to Phi at an end of its band, for the better of two bands."""
    whole = values(transform, K, estimator)[::2]
    bands = [band(K, delta, "dkw")] + ([band(K, delta, "simultaneous")] if K <= MOST_BANDED else [])
    gaps = [max(np.max(transform(high[::2]) - whole), np.max(whole - transform(low[::2]))) for low, high in bands]
    return float(min(gaps))


def _mean_deviation(whole: Array, u: Array, phi: Array, power: int) -> Array:
    """Return E[(v_J - phi)^power] over references, at each true quantile u."""
    K = len(whole) - 1
    means = []
    for part in np.array_split(np.arange(len(u)), ceil(len(u) * min(K + 1, 9 * sqrt(K) + 80) / 2e6) or 1):
        j, chance = binomial_chances(K, u[part])
        means.append((chance * (whole[j] - phi[part, None]) ** power).sum(axis=1))
    return np.concatenate(means)


def _has_unbiased(transform: Transform) -> bool:
    """True if "unbiased" is exact, or a series, once K is large."""
    match transform:
        case Chain(parts=(only,)):
            return _has_unbiased(only)
        case Chain(parts=(*head, Affine())):
            return _has_unbiased(Chain(*head))
        case Power(p=p):
            return p == int(p)
    return isinstance(transform, Identity | Affine | Exponential)
