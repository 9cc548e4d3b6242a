"""Values of a rank among K references, one vector of 2K + 1 numbers for any transform and estimator; their errors.

A score with `below` of its K references strictly below it and `equal` tied has the index i = 2 below + equal: its
empirical quantile (Eq. 12) is i / 2K, and no more is known of it. Four ways to value the index:

* "empirical", the paper's: Phi(i / 2K). Biased wherever Phi is curved;
* "posterior": E[Phi(C) | i] with C ~ Beta(i/2 + 1, K - i/2 + 1): the least mean square error, and the mean of Phi kept;
* "unbiased": its mean over references is Phi(C) for every C, exactly or as nearly as a non-decreasing vector can;
* "randomised": the mean of Phi over the bin `randomised` draws from, whose u is exactly uniform under pi_ref.

`bias`, `rmse` and `references_needed` say how far off each is, `fixed_references` what K costs in win rate.

>>> for estimator in "empirical", "posterior", "unbiased", "randomised":
...     print(f"{estimator:10}", values(Identity(), 2, estimator).round(3))
empirical  [0.   0.25 0.5  0.75 1.  ]
posterior  [0.25  0.375 0.5   0.625 0.75 ]
unbiased   [0.   0.25 0.5  0.75 1.  ]
randomised [0.167 0.333 0.5   0.667 0.833]

The posterior mean has the least mean square error, and yet more bias than the plug-in where e^{tu} is small:

>>> for estimator in "empirical", "posterior", "unbiased", "randomised":
...     excess = float(bias(Exponential(10.0), 32, estimator, 0.5)) / np.exp(5.0)
...     print(f"{estimator:10}  bias at C = 1/2 {excess:+.1%}  rmse {rmse(Exponential(10.0), 32, estimator):.0f}")
empirical   bias at C = 1/2 +47.6%  rmse 2011
posterior   bias at C = 1/2 +96.5%  rmse 1695
unbiased    bias at C = 1/2 -0.0%  rmse 1980
randomised  bias at C = 1/2 +44.7%  rmse 1747
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from math import ceil, exp, isfinite, log, sqrt
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from scipy.special import digamma, gammaln, log_expit, logit, logsumexp, xlog1py, xlogy

from calibrated_rewards.theory.bands import band
from calibrated_rewards.theory.quadrature import MOST_PANELS, ORDER, WINDOW, Array, Grid
from calibrated_rewards.theory.transforms import Affine, Chain, Exponential, Identity, Log, Power, Transform, knots

Estimator: TypeAlias = Literal["empirical", "posterior", "unbiased", "randomised"]
"""The name of a way to estimate Phi(u) from the rank among K references."""
# The least-squares fit behind "unbiased" takes up to a second at this K, and much longer soon after.
MOST_FITTED = 1000
MOST_REFERENCES = 10**6
# The exact band takes some tenths of a second at this K, and much longer soon after.
MOST_BANDED = 1000


def values(transform: Transform, K: int, estimator: Estimator = "empirical") -> Float[np.ndarray, " {2*K+1}"]:
    """Return the value of each index i = 2 below + equal in 0..2K: non-decreasing and finite.

    "empirical" values index 0 at u = 1/2K where Phi is infinite at 0, and index 2K at u = 1 - 1/2K where it is at 1.
    "unbiased" is exact for Identity and for Power with a whole p <= K; for Exponential its bias is O(t^{K+1}/(K+1)!).
    Only polynomials up to degree K have an exact one at all. Any other transform gets the non-decreasing vector with
    the least squared bias, integrated over C ~ Unif[0, 1]. Under "unbiased" and "randomised", a tie (an odd i) is
    broken by a fair coin.

    >>> values(Log(), 2).round(3)
    array([-1.386, -1.386, -0.693, -0.288,  0.   ])
    >>> values(Log(), 2, "posterior").round(3)
    array([-1.833, -1.22 , -0.833, -0.553, -0.333])
    """
    if not (isfinite(K) and int(K) == K and K >= 1):
        raise ValueError(f"values needs a whole number of references K >= 1, got K={K!r}.")
    estimate = _ESTIMATES.get(estimator)
    if estimate is None:
        raise ValueError(f"values needs an estimator in {', '.join(_ESTIMATES)}, got estimator={estimator!r}.")
    vector = _shifted(transform, int(K), estimate)
    if not np.isfinite(vector).all():
        raise ValueError(f"values needs a transform that is finite inside (0, 1), got {transform!r}.")
    return np.maximum.accumulate(vector)


def _shifted(transform: Transform, K: int, estimate: Callable[[Transform, int], Array]) -> Array:
    """Estimate, with affine parts at the end of a chain acting on the vector: every estimator is linear in Phi."""
    match transform:
        case Chain(parts=(only,)):
            return _shifted(only, K, estimate)
        case Chain(parts=(*head, Affine() as last)):
            return np.asarray(last(_shifted(Chain(*head), K, estimate)))
        case Affine():
            return np.asarray(transform(_shifted(Identity(), K, estimate)))
    return estimate(transform, K)


def _empirical(transform: Transform, K: int) -> Array:
    u = np.arange(2 * K + 1) / (2 * K)
    vector = np.array(transform(u), np.float64)
    # Half a reference short of the end is where j = 1/2, a tie with the lowest of all, would stand.
    for end, inner in (0, 1), (2 * K, 2 * K - 1):
        if np.isinf(vector[end]):
            vector[end] = vector[inner]
    return vector


def _posterior(transform: Transform, K: int) -> Array:
    a, b = np.arange(2 * K + 1) / 2 + 1, K + 2.0
    match transform:
        case Identity():
            return a / b
        case Log():
            return np.asarray(digamma(a) - digamma(b))
        case Power(p=p) if K <= 10_000:  # beyond, what is left of two large logarithms is no longer good to 1e-10
            return np.exp(gammaln(a + p) - gammaln(a) - (gammaln(b + p) - gammaln(b)))
        case Exponential(t=t) if t > 0:
            return _confluent(a, b, t)
        case Exponential(t=t):  # Kummer's transformation leaves a series of terms > 0, hence no cancellation
            return -exp(t) * _confluent(b - a, b, -t)
    grid = panels(transform, K)
    phi, mass = inside(transform, grid), np.log(grid.weights) + grid.log_slope
    # In theta = arcsin sqrt(u), C given i has standard deviation 1 / sqrt(4K) for every i: 14 of them hold it all.
    theta, reach, low, high = np.arcsin(np.sqrt(grid.u)), 7 / sqrt(K), log_expit(grid.s), log_expit(-grid.s)
    vector = np.empty(2 * K + 1)
    for block in np.array_split(np.arange(2 * K + 1), ceil(sqrt(K))):
        first, last = np.arcsin(np.sqrt(block[[0, -1]] / (2 * K)))
        near = slice(*np.searchsorted(theta, [first - reach, last + reach]))
        log_weight = block[:, None] / 2 * low[near] + (K - block[:, None] / 2) * high[near] + mass[near]
        weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
        vector[block] = weight @ phi[near] / weight.sum(axis=1)
    return vector


def _confluent(a: Array, b: float, t: float) -> Array:
    """Sum 1F1(a; b; t) for 0 < a <= b and t > 0, which is at most e^t, as a series."""
    term, total, m = np.ones_like(a), np.ones_like(a), 0
    while (term > 1e-18 * total).any():
        term = term * (a + m) / (b + m) * (t / (m + 1))
        total, m = total + term, m + 1
    return total


def _unbiased(transform: Transform, K: int) -> Array:
    j = np.arange(K + 1.0)
    match transform:
        case Identity():
            return np.arange(2 * K + 1) / (2 * K)
        case Power(p=p) if p == int(p) <= K:
            return _with_ties(_falling(j, K, int(p)))
        case Exponential(t=t) if t > 0:
            return _with_ties(_exponential_series(K, t))
        case Exponential(t=t):  # e^{tC} = e^t e^{-t(1 - C)}, and 1 - C has K - j
            return _with_ties(-exp(t) * _exponential_series(K, -t)[::-1])
    return _with_ties(_least_biased(transform, K))


def _falling(j: Array, K: int, p: int) -> Array:
    """Return binom(j, p) / binom(K, p), whose mean over j ~ Binomial(K, C) is C^p."""
    product = np.ones_like(j)
    for m in range(p):
        product *= np.maximum(j - m, 0.0) / (K - m)
    return product


def _exponential_series(K: int, t: float) -> Array:
    """Sum, over m <= j, of t^m / m! binom(j, m) / binom(K, m), the unbiased e^{tC} but for its terms beyond K."""
    j = np.arange(K + 1.0)
    term, total = np.ones_like(j), np.ones_like(j)
    for m in range(K):
        term = term * np.maximum(j - m, 0.0) / (K - m) * (t / (m + 1))
        total = total + term
        if (term <= 1e-18 * total).all():
            break
    return total


def _least_biased(transform: Transform, K: int) -> Array:
    """Fit increments by non-negative least squares against the Bernstein basis on the panels' nodes.

    The basis is singular in double precision from K = 50 or so. A penalty of 1e-8 of the mean square error picks, among
    vectors whose biases no double can tell apart, the one with the least variance: the root mean square bias is within
    1e-4 of an rmse of the least.
    """
    from scipy.optimize import nnls

    if K > MOST_FITTED:
        raise ValueError(f'"unbiased" needs K <= {MOST_FITTED} for {transform!r}, which has no exact one, got K={K}.')
    grid = panels(transform, K)
    phi, weight = inside(transform, grid), np.sqrt(grid.weights * np.exp(grid.log_slope))
    origin, span = phi[0], phi[-1] - phi[0]
    if span == 0:
        return np.full(K + 1, origin)
    penalty, bernstein = 1e-4 / sqrt(K + 1), np.zeros((len(phi), K + 1))
    np.put_along_axis(bernstein, *binomial_chances(K, grid.u), axis=1)
    basis = np.vstack([weight[:, None] * bernstein, penalty * np.eye(K + 1)])
    target = np.concatenate([weight * (phi - origin), penalty * (_posterior(transform, K)[::2] - origin)]) / span
    steps = np.flip(np.cumsum(np.flip(basis, 1), axis=1), 1)
    triangle = np.asarray(np.linalg.qr(np.column_stack([steps, -steps[:, :1], target]), mode="r"))
    increments = nnls(triangle[:, :-1], triangle[:, -1], maxiter=100 * (K + 2))[0]
    return np.asarray(origin + span * (np.cumsum(increments[:-1]) - increments[-1]))


def _randomised(transform: Transform, K: int) -> Array:
    grid = panels(transform, 1, logit(np.arange(1, K + 1) / (K + 1)))
    mass = (grid.weights * np.exp(grid.log_slope)).reshape(-1, ORDER)
    first = np.searchsorted(grid.edges, logit(np.arange(1, K + 1) / (K + 1)))
    bins = partial(np.add.reduceat, indices=np.concatenate([[0], first]))
    return _with_ties(bins((mass * inside(transform, grid).reshape(-1, ORDER)).sum(axis=1)) / bins(mass.sum(axis=1)))


_ESTIMATES: dict[str, Callable[[Transform, int], Array]] = {
    "empirical": _empirical,
    "posterior": _posterior,
    "unbiased": _unbiased,
    "randomised": _randomised,
}


def _with_ties(whole: Array) -> Array:
    """Give the odd indices between 0, 2, ... 2K the mean of their neighbours."""
    vector = np.empty(2 * len(whole) - 1)
    vector[::2], vector[1::2] = whole, (whole[1:] + whole[:-1]) / 2
    return vector


def randomised(below: npt.ArrayLike, equal: npt.ArrayLike, K: int, rng: np.random.Generator) -> Array | np.float64:
    """Draw u = (below + V (equal + 1)) / (K + 1), V ~ Unif(0, 1): exactly uniform under pi_ref, for any K and any ties.

    >>> randomised([0, 3], [2, 0], 3, np.random.default_rng(0)).round(3)
    array([0.478, 0.817])
    """
    below, equal = np.asarray(below, np.float64), np.asarray(equal, np.float64)
    if not ((below >= 0) & (equal >= 0) & (below + equal <= K)).all():
        raise ValueError(f"randomised needs below, equal >= 0 and below + equal <= K={K}, got {below!r} and {equal!r}.")
    draw = rng.random(np.broadcast_shapes(below.shape, equal.shape))
    return np.asarray((below + draw * (equal + 1)) / (K + 1))[()]


def inside(transform: Transform, grid: Grid) -> Array:
    """Evaluate Phi at the nodes, short of u = 1 where the logit is finite and the float is not."""
    return np.asarray(transform(np.clip(grid.u, 1e-300, 1 - 2.0**-53)), np.float64)


def panels(transform: Transform, K: int = 1, edges: npt.ArrayLike = ()) -> Grid:
    """Make panels that resolve Phi to 1e-12 of its largest value on each, and the likelihood of C given any index."""
    turns = np.linspace(0, np.pi / 2, ceil(sqrt(K)) + 1)[1:-1]  # 3.1 standard deviations of arcsin sqrt(C) each
    kinks = np.asarray(logit(knots(transform)), np.float64)
    grid = Grid(np.unique(np.concatenate([WINDOW, edges, kinks, 2 * np.log(np.tan(turns))])))
    most = len(grid.widths) + MOST_PANELS
    while True:
        phi = inside(transform, grid)
        missed = grid.missed(phi, kinks) / np.maximum(np.abs(phi.reshape(-1, ORDER)).max(axis=1), 1e-300)
        # Far out in the logit a float u < 1 is noisy, and what is noise there is of no weight.
        inner = np.abs(grid.edges[1:] + grid.edges[:-1]) / 2 - grid.widths / 2
        coarse = (missed > 1e-12) & (missed * np.exp(-inner) > 1e-15) & (grid.widths > 1e-9 * np.maximum(1.0, inner))
        if not coarse.any() or len(coarse) > most:  # the latter for a Phi whose values are noisy themselves
            _check_tails(transform, grid)
            return grid
        grid = grid.split(coarse)


def _check_tails(transform: Transform, grid: Grid) -> None:
    """Refuse a Phi so steep towards an infinite end that quantiles no float can tell from 0 or 1 carry its mean."""
    if np.isfinite(transform(np.array([0.0, 1.0]))).all():
        return
    size = np.abs(inside(transform, grid) - transform(0.5)) * grid.weights * np.exp(grid.log_slope)
    if size[np.abs(grid.s) > 34].sum() > 1e-10 * size.sum():
        raise ValueError(
            f"{transform!r} is too steep near 0 or 1: its mean depends on quantiles within 1e-15 of there."
        )


def binomial_chances(K: int, u: Array) -> tuple[npt.NDArray[np.intp], Array]:
    """Return counts j and P(J = j), J ~ Binomial(K, u): a row for each u, with all that is above 1e-17."""
    width = min(K + 1, int(2 * (9 * sqrt(K / 4) + 40)))
    start = np.clip(np.floor(K * u) - width // 2, 0, K + 1 - width).astype(np.intp)
    j = start[:, None] + np.arange(width)
    log_ways = -gammaln(np.arange(K + 1) + 1.0)
    log_chance = log_ways[j] + log_ways[K - j] + xlogy(j, u[:, None]) + xlog1py(K - j, -u[:, None])
    chance = np.exp(log_chance - log_chance.max(axis=1, keepdims=True))
    return j, chance / chance.sum(axis=1, keepdims=True)


def log_partition(transform: Transform, beta: float, K: int, estimator: Estimator = "empirical") -> float:
    """Return log Z_K, Z_K = (1/(K+1)) sum_j e^{v_j / beta}: exact over references, for the rank is uniform.

    >>> round(log_partition(Identity(), 0.1, 8), 4), round(log_partition(Identity(), 0.1, 10_000), 4)
    (8.1403, 7.6978)
    """
    if not (isfinite(beta) and beta > 0):
        raise ValueError(f"log_partition needs a finite beta > 0, got beta={beta!r}.")
    with np.errstate(over="ignore"):
        total = float(logsumexp(values(transform, K, estimator)[::2] / beta)) - log(K + 1)
    if not isfinite(total):
        raise OverflowError(f"log_partition needs values / beta that a float can hold, got beta={beta!r}.")
    return total


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
