"""What K references can tell, by independent routes: mpmath, scipy's quadrature and laws, enumeration, simulation."""

import inspect
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import comb, factorial

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from numpy.polynomial import legendre
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import lsq_linear
from strategies import procedures, transforms

from calibrated_rewards.theory.bands import band
from calibrated_rewards.theory.finite_k import bias, log_partition, randomised, references_needed, rmse, values
from calibrated_rewards.theory.fixed_references import StepPolicies, win_rate_at_k, win_rate_at_kl
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import win_rate
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Tabulated,
    Transform,
)

ESTIMATORS = ("empirical", "posterior", "unbiased", "randomised")
FLAT = Tabulated([0.0, 1.0], [2.0, 2.0])
BENT = Tabulated([0.0, 0.4, 0.5, 1.0], [-1.0, 0.0, 3.0, 3.5])
EVERY = [
    Identity(),
    Log(),
    NormalQuantile(),
    Exponential(10.0),
    Exponential(-10.0),
    Exponential(700.0),
    Exponential(-700.0),
    Power(2.0),
    Power(0.3),
    BENT,
    FLAT,
    Affine(2.0, -1.0),
    Chain(Exponential(5.0), Affine(0.01, 3.0)),
    Chain(Power(2.0), Exponential(20.0)),
    Chain(NormalQuantile(), Affine(2.0, 1.0)),
]
# The mean of each over u ~ Unif[0, 1], by calculus.
MEANS = [
    (Identity(), 0.5),
    (Log(), -1.0),
    (NormalQuantile(), 0.0),
    (Exponential(10.0), np.expm1(10.0) / 10),
    (Exponential(-10.0), np.expm1(-10.0) / 10),
    (Power(2.0), 1 / 3),
    (Power(0.3), 1 / 1.3),
    (Chain(Log(), Affine(2.0, 1.0)), -1.0),
]


@dataclass(frozen=True)
class Opaque:
    """A transform that hides what it is, so that no closed form is used."""

    inner: Transform

    def __call__(self, u):
        """Return the value of the one inside."""
        return self.inner(u)


def expected(vector, K, c):
    """Mean of the values over J ~ Binomial(K, c) references below, with scipy's binomial."""
    return np.array([vector[::2] @ stats.binom.pmf(np.arange(K + 1), K, x) for x in np.atleast_1d(c)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_every_vector_is_finite_and_rises(transform, estimator):
    """2K + 1 numbers, none of which falls, from the index 0 to 2K."""
    for K in (1, 2, 3, 8, 100):
        vector = values(transform, K, estimator)
        assert vector.shape == (2 * K + 1,)
        assert np.isfinite(vector).all()
        assert (np.diff(vector) >= 0).all()


@settings(max_examples=50, deadline=None)
@given(transforms, st.integers(1, 20), st.sampled_from(ESTIMATORS))
@example(Tabulated([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 1.0, 2.0, 4.0, 5.0]), 5, "randomised")
def test_any_transform_gives_a_vector_that_affine_maps_pass_through(transform, K, estimator):
    """Finite, rising, and linear, whether or not the Affine is in sight; the example has a kink behind a last node."""
    vector = values(transform, K, estimator)
    shifted = Chain(transform, Affine(3.0, -2.0))
    assert np.isfinite(vector).all()
    assert (np.diff(vector) >= 0).all()
    assert values(shifted, K, estimator) == pytest.approx(3 * vector - 2, rel=1e-9)
    hidden = np.abs(values(Opaque(shifted), K, estimator) - (3 * vector - 2)).max()
    assert estimator == "unbiased" or hidden <= 1e-9 * (1 + np.abs(vector).max())


@pytest.mark.parametrize("K", [1, 4, 100])
def test_empirical_is_equation_12(K):
    """Phi((below + equal / 2) / K) for every way to stand among K; Identity to the last bit."""
    for below, equal in product(range(0, K + 1, 1 + K // 20), range(min(K, 5))):
        if below + equal <= K:
            quantile = (below + equal / 2) / K
            assert values(Identity(), K)[2 * below + equal] == quantile
            assert values(BENT, K)[2 * below + equal] == pytest.approx(float(BENT(quantile)), rel=1e-15)


def test_empirical_ends():
    """Half a reference from the end where Phi is infinite there, and nowhere else."""
    assert values(Log(), 8)[[0, 1, 16]] == pytest.approx(np.log([1 / 16, 1 / 16, 1.0]))
    assert values(NormalQuantile(), 8)[[0, 16]] == pytest.approx(stats.norm.ppf([1 / 16, 15 / 16]))
    assert values(Chain(Log(), Affine(2.0)), 1) == pytest.approx(2 * np.log([0.5, 0.5, 1.0]))
    assert values(Chain(Log(), Exponential(2.0)), 4)[0] == 0.0


# Closed forms are held against mpmath, and against quadrature by way of Opaque; quadrature against scipy's quad.


def mp_posterior(transform, i, K):
    """E[Phi(C)], C ~ Beta(i/2 + 1, K - i/2 + 1), to 40 digits."""
    a, b = mpmath.mpf(i) / 2 + 1, mpmath.mpf(K + 2)
    match transform:
        case Log():
            return mpmath.digamma(a) - mpmath.digamma(b)
        case Power(p=p):
            return mpmath.gammaprod([a + p, b], [a, b + p])
        case Exponential(t=t):
            return mpmath.sign(t) * mpmath.hyp1f1(a, b, t)


@pytest.mark.parametrize("K", [1, 8, 100, 10_000])
@pytest.mark.parametrize(
    "transform",
    [Log(), Power(0.3), Power(2.0), Power(250.0), *(Exponential(t) for t in (1e-3, 10.0, -10.0, 100.0, 700.0, -700.0))],
    ids=repr,
)
def test_posterior_closed_forms(transform, K):
    """Digamma and 1F1 of both signs at 40 digits, each value to 1e-10 of itself; gamma ratios, which are <= 1, of 1."""
    vector = values(transform, K, "posterior")
    with mpmath.workdps(40):
        for i in {0, 1, 2, K // 2, K, K + 1, 2 * K - 1, 2 * K}:
            exact = mp_posterior(transform, i, K)
            assert abs(vector[i] - exact) < 1e-10 * (1 if isinstance(transform, Power) else abs(exact))


@pytest.mark.parametrize("K", [1, 3, 40, 1000])
@pytest.mark.parametrize(
    "transform", [Identity(), Log(), Power(0.3), *map(Exponential, (10.0, -10.0, 300.0))], ids=repr
)
def test_posterior_quadrature_gives_the_closed_forms(transform, K):
    """The same numbers without knowing the transform's name."""
    vector = values(transform, K, "posterior")
    assert values(Opaque(transform), K, "posterior") == pytest.approx(vector, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("transform", [NormalQuantile(), BENT, Chain(Power(2.0), Exponential(20.0))], ids=repr)
@pytest.mark.parametrize("K", [1, 7, 60])
def test_posterior_quadrature_is_scipys(transform, K):
    """Adaptive quadrature against scipy's Beta density, kinks given to it."""
    vector = values(transform, K, "posterior")
    for i in {0, 1, K, 2 * K}:
        law = stats.beta(i / 2 + 1, K - i / 2 + 1)
        points = sorted({0.4, 0.5, *law.ppf([1e-6, 0.1, 0.9, 1 - 1e-6])})
        exact = quad(lambda u, law=law: float(transform(u)) * law.pdf(u), 0, 1, points=points, limit=500, epsabs=1e-13)[
            0
        ]
        assert vector[i] == pytest.approx(exact, rel=1e-9, abs=1e-10)


@dataclass(frozen=True)
class Jump:
    """One above 0.7, nothing below: a transform with a jump that nobody announced."""

    def __call__(self, u):
        """Return 0 or 1."""
        return (np.asarray(u) > 0.7) * 1.0


@pytest.mark.parametrize("K", [1, 10, 200])
def test_posterior_finds_a_jump(K):
    """P(C > 0.7 | i), by scipy's Beta."""
    i = np.arange(2 * K + 1)
    assert values(Jump(), K, "posterior") == pytest.approx(stats.beta(i / 2 + 1, K - i / 2 + 1).sf(0.7), abs=1e-9)


@pytest.mark.parametrize("K", [1, 2, 9, 100])
@pytest.mark.parametrize("estimator", ["posterior", "randomised"])
@pytest.mark.parametrize(("transform", "mean"), MEANS, ids=repr)
def test_mean_is_preserved(transform, mean, estimator, K):
    """Over the K + 1 ranks, which are equally likely under pi_ref, the values have the mean of Phi itself."""
    assert values(transform, K, estimator)[::2].mean() == pytest.approx(mean, rel=1e-11, abs=1e-12)


C = np.array([0.0, 1e-3, 0.2, 0.5, 0.77, 1.0])


@pytest.mark.parametrize("K", [1, 2, 5, 30, 100])
def test_unbiased_is_exact_for_polynomials(K):
    """Binomial mean of the values = C^p for every whole p <= K."""
    for p in {1, 2, 5, K} & set(range(1, K + 1)):
        assert expected(values(Power(p), K, "unbiased"), K, C) == pytest.approx(C**p, abs=1e-12)
    assert expected(values(Identity(), K, "unbiased"), K, C) == pytest.approx(C, abs=1e-12)


@pytest.mark.parametrize("K", [1, 4, 16, 100, 1000])
@pytest.mark.parametrize("t", [0.5, 10.0, 30.0])
def test_unbiased_exponential_is_the_truncated_series(K, t):
    """Its binomial mean is the Taylor polynomial of degree K of e^{tC}, or e^t times that of e^{t(1 - C)} - t < 0 -."""
    taylor = np.array([sum(mpmath.mpf(t * c) ** m / mpmath.factorial(m) for m in range(K + 1)) for c in C], float)
    assert expected(values(Exponential(t), K, "unbiased"), K, C) == pytest.approx(taylor, rel=1e-10)
    downwards = np.array(
        [sum(mpmath.mpf(t * (1 - c)) ** m / mpmath.factorial(m) for m in range(K + 1)) for c in C], float
    )
    assert expected(values(Exponential(-t), K, "unbiased"), K, C) == pytest.approx(-np.exp(-t) * downwards, rel=1e-10)


def test_unbiased_exponential_leaves_what_the_formula_says():
    """Bias below t^{K+1} e^t / (K+1)!: nothing to speak of at K = 32 and t = 10, and 7 % at K = 8."""
    for K, t in (8, 3.0), (16, 10.0), (32, 10.0):
        left = bias(Exponential(t), K, "unbiased", C)
        assert np.abs(left).max() <= t ** (K + 1) / factorial(K + 1) * np.exp(t) + 1e-9 * np.exp(t)
    assert bias(Exponential(10.0), 8, "unbiased", 0.5) / np.exp(5) == pytest.approx(-0.07, abs=0.005)


@pytest.mark.parametrize("estimator", ["unbiased", "randomised"])
@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_a_tie_is_a_fair_coin(transform, estimator):
    """Odd indices are the mean of their neighbours."""
    vector = values(transform, 6, estimator)
    assert vector[1::2] == pytest.approx((vector[2::2] + vector[:-2:2]) / 2, rel=1e-12)


def squared_bias(transform, K):
    """A least-squares problem for the rises of the vector: Gauss-Legendre in x with u = x^3 (10 - 15 x + 6 x^2)."""
    x, weight = legendre.leggauss(600)
    x = (x + 1) / 2
    u, weight = np.minimum(x**3 * (10 - 15 * x + 6 * x * x), 1 - 1e-16), weight / 2 * 30 * x**2 * (1 - x) ** 2
    bernstein = np.array([comb(K, j) * u**j * (1 - u) ** (K - j) for j in range(K + 1)]).T
    rises = np.cumsum(bernstein[:, ::-1], axis=1)[:, ::-1]
    return np.sqrt(weight)[:, None] * rises, np.sqrt(weight) * transform(u)


@pytest.mark.parametrize("K", [1, 2, 5, 12])
@pytest.mark.parametrize("transform", [Log(), NormalQuantile(), BENT, Power(0.3), Power(30.0)], ids=repr)
def test_least_biased_vector_is_the_bounded_least_squares_one(transform, K):
    """scipy's lsq_linear, another algorithm on another quadrature, finds no rising vector with a smaller bias."""
    matrix, target = squared_bias(transform, K)
    lower = np.r_[-np.inf, np.zeros(K)]
    best = lsq_linear(matrix, target, (lower, np.full(K + 1, np.inf)), method="bvls", tol=1e-14)
    vector = values(transform, K, "unbiased")[::2]
    ours = matrix @ np.r_[vector[0], np.diff(vector)] - target
    assert ours @ ours / 2 == pytest.approx(best.cost, rel=1e-5)
    assert vector == pytest.approx(np.cumsum(best.x), abs=1e-3 * np.ptp(vector))


@pytest.mark.parametrize("K", [2, 20, 100, 300])
@pytest.mark.parametrize("transform", [Log(), NormalQuantile(), BENT], ids=repr)
def test_least_biased_has_less_bias_than_the_others(transform, K):
    """Integrated squared bias, by the midpoint rule on scipy's binomial."""
    u = (np.arange(400) + 0.5) / 400
    sizes = {e: np.mean((expected(values(transform, K, e), K, u) - transform(u)) ** 2) for e in ESTIMATORS}
    assert sizes["unbiased"] < 0.7 * min(size for e, size in sizes.items() if e != "unbiased")


def test_unbiased_refuses_a_fit_that_would_take_minutes():
    """Only where no exact one exists."""
    with pytest.raises(
        ValueError, match=r'"unbiased" needs K <= 1000 for Log\(\), which has no exact one, got K=1001\.'
    ):
        values(Log(), 1001, "unbiased")
    assert values(Exponential(5.0), 5000, "unbiased")[-1] == pytest.approx(np.exp(5.0))


@pytest.mark.parametrize("K", [1, 5, 64])
@pytest.mark.parametrize("transform", [Log(), NormalQuantile(), Exponential(-40.0), BENT, Power(0.3)], ids=repr)
def test_randomised_vector_is_the_mean_over_its_bin(transform, K):
    """scipy's quad over [b, b + 1] / (K + 1), the kinks given to it."""
    vector = values(transform, K, "randomised")
    for below in {0, K // 2, K}:
        low, high = below / (K + 1), (below + 1) / (K + 1)
        inside = [x for x in (0.4, 0.5) if low < x < high] or None
        exact = quad(lambda u: float(transform(u)), low, high, points=inside, epsabs=1e-13, epsrel=1e-9, limit=200)[0]
        assert vector[2 * below] == pytest.approx((K + 1) * exact, rel=1e-8, abs=1e-10)


def image(below, equal, K):
    """The interval that `randomised` maps V ~ Unif(0, 1) onto, from two of its draws and the V behind them."""
    v = [np.random.default_rng(seed).random() for seed in (0, 1)]
    u = [float(randomised(below, equal, K, np.random.default_rng(seed))) for seed in (0, 1)]
    slope = (u[1] - u[0]) / (v[1] - v[0])
    return u[0] - slope * v[0], u[0] - slope * v[0] + slope


@pytest.mark.parametrize("chances", [[1.0], [0.7, 0.3], [0.1, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_randomised_is_exactly_uniform_under_heavy_ties(chances, K):
    """Every response and all references of a model with 1 to 4 distinct scores, enumerated: mean 1/2 and CDF x."""
    x = np.linspace(0, 1, 101)
    cdf, mean = np.zeros_like(x), 0.0
    for score, *references in product(range(len(chances)), repeat=K + 1):
        chance = np.prod([chances[score], *(chances[z] for z in references)])
        low, high = image(sum(z < score for z in references), sum(z == score for z in references), K)
        cdf += chance * np.clip((x - low) / (high - low), 0, 1)
        mean += chance * (low + high) / 2
    assert cdf == pytest.approx(x, abs=1e-12)
    assert mean == pytest.approx(0.5, abs=1e-12)


def test_randomised_draws():
    """Without ties, 100,000 of them pass scipy's test of uniformity, and broadcast."""
    rng = np.random.default_rng(5)
    below = rng.binomial(6, rng.random(100_000))
    u = randomised(below, 0, 6, rng)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert randomised([[1], [2]], [0, 1, 2], 6, rng).shape == (2, 3)
    assert isinstance(float(randomised(1, 2, 6, rng)), float)


@pytest.mark.parametrize(("K", "excess"), [(100, 0.13), (32, 0.48), (8, 3.35)])
def test_bias_of_the_paper(K, excess):
    """Plug-in e^{10 C^} at C = 1/2: +13 % at the paper's K = 100, +48 % at 32, +335 % at 8."""
    assert bias(Exponential(10.0), K, "empirical", 0.5) / np.exp(5.0) == pytest.approx(excess, abs=0.005)


@pytest.mark.parametrize("K", [1, 8, 300, 5000])
@pytest.mark.parametrize("estimator", ["empirical", "posterior"])
def test_bias_is_the_binomial_sum(K, estimator):
    """scipy's binomial, in the middle, in the tails and at the ends."""
    exact = expected(values(Exponential(10.0), K, estimator), K, C) - np.exp(10 * C)
    assert bias(Exponential(10.0), K, estimator, C) == pytest.approx(exact, rel=1e-9, abs=1e-9)
    assert bias(Log(), K, estimator, 0.0) == np.inf


def test_rmse_closed_forms():
    """1/6K for j/K, 1/6(K + 2) for the posterior mean, and differences of trigamma for the posterior of the log."""
    for K in (1, 7, 100, 3000):
        assert rmse(Identity(), K) ** 2 == pytest.approx(1 / (6 * K), rel=1e-9)
        assert rmse(Identity(), K, "posterior") ** 2 == pytest.approx(1 / (6 * (K + 2)), rel=1e-9)
        exact = mpmath.nsum(lambda j, K=K: mpmath.psi(1, j + 1) - mpmath.psi(1, K + 2), [0, K]) / (K + 1)
        assert rmse(Log(), K, "posterior") ** 2 == pytest.approx(float(exact), rel=1e-8)


def test_rmse_of_the_exponential_is_its_variance_in_the_mean():
    """1F1 at 2t less the square of 1F1 at t, averaged, at 40 digits; and at t = 700, whose square no float holds."""
    with mpmath.workdps(40):
        for K, t in (8, 10.0), (32, 10.0), (8, -10.0), (8, 700.0), (50, 700.0):
            first = [mpmath.hyp1f1(j + 1, K + 2, t) for j in range(K + 1)]
            second = [mpmath.hyp1f1(j + 1, K + 2, 2 * t) for j in range(K + 1)]
            exact = mpmath.sqrt(sum(b - a * a for a, b in zip(first, second, strict=True)) / (K + 1))
            assert abs(rmse(Exponential(t), K, "posterior") / exact - 1) < 1e-8


@pytest.mark.parametrize(("estimator", "share"), [("unbiased", 0.449), ("empirical", 0.456), ("posterior", 0.385)])
def test_rmse_at_32_references(estimator, share):
    """As a share of the standard deviation of e^{10u}: figures computed elsewhere, by simulation, to three digits."""
    spread = np.sqrt(np.expm1(20.0) / 20 - (np.expm1(10.0) / 10) ** 2)
    assert rmse(Exponential(10.0), 32, estimator) / spread == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("transform", [Log(), NormalQuantile(), BENT, Exponential(-10.0)], ids=repr)
def test_rmse_by_simulation(transform, estimator):
    """200,000 responses, each with its own 9 references."""
    rng, K = np.random.default_rng(6), 9
    c = rng.random(200_000)
    squares = (values(transform, K, estimator)[2 * rng.binomial(K, c)] - transform(c)) ** 2
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - rmse(transform, K, estimator) ** 2) < 4 * error


@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_posterior_has_the_least_mean_square_error(transform):
    """Of the four, for every transform."""
    errors = {estimator: rmse(transform, 11, estimator) for estimator in ESTIMATORS}
    assert errors["posterior"] <= min(errors.values()) * (1 + 1e-9) + 1e-14
    assert (errors["posterior"] < 0.9999 * errors["empirical"]) == (transform != FLAT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_partition_by_simulation(estimator):
    """E e^{v / beta} over references and responses that are drawn, K = 3."""
    rng, beta = np.random.default_rng(7), 0.4
    below = (rng.random((200_000, 3)) < rng.random((200_000, 1))).sum(axis=1)
    drawn = np.exp(values(Identity(), 3, estimator)[2 * below] / beta)
    error = drawn.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - np.exp(log_partition(Identity(), beta, 3, estimator))) < 4 * error


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("estimator", ["empirical", "posterior", "randomised"])
def test_partition_tends_to_the_continuous_one(beta, estimator):
    """beta (e^{1/beta} - 1) for the identity and beta / (1 + beta) for the log, as 1 / K."""
    for K, slack in (500, 1), (5000, 10):
        gap = log_partition(Identity(), beta, K, estimator) - np.log(beta * np.expm1(1 / beta))
        assert abs(gap) < 12 / beta / 500 / slack
        gap = log_partition(Log(), beta, K, estimator) - np.log(beta / (1 + beta))
        assert abs(gap) < 12 / beta / 500 / slack


def test_partition_does_not_overflow():
    """Where e^{1/beta} does, log Z is 1/beta - log(K + 1); where 1/beta does too, an error says so."""
    assert log_partition(Identity(), 1e-5, 4) == pytest.approx(1e5 - np.log(5))
    assert log_partition(Exponential(700.0), 1e3, 4) == pytest.approx(np.exp(700) / 1e3)
    with pytest.raises(OverflowError, match=r"beta=1e-09"):
        log_partition(Exponential(700.0), 1e-9, 4)


@pytest.mark.parametrize(
    ("transform", "error", "estimator"),
    [
        (Identity(), 0.03, "empirical"),
        (Identity(), 0.5, "posterior"),
        (Exponential(5.0), 4.0, "posterior"),
        (Exponential(10.0), 1500.0, "unbiased"),
        (Log(), 0.2, "randomised"),
        (BENT, 0.5, "unbiased"),
        (Chain(Power(2.0), Affine(2.0)), 0.3, "unbiased"),
    ],
)
def test_references_needed_is_the_smallest(transform, error, estimator):
    """One fewer is too few."""
    K = references_needed(transform, error, estimator)
    assert rmse(transform, K, estimator) <= error
    assert K == 1 or rmse(transform, K - 1, estimator) > error


def test_references_needed_closed_forms():
    """ceil(1 / 6 error^2) on the average, and DKW's log(2/delta) / 2 error^2 for all responses at once."""
    for error in (0.1, 0.02, 0.003):
        assert references_needed(Identity(), error) == np.ceil(1 / (6 * error**2))
    for error in np.linspace(0.021, 0.2, 30):
        assert references_needed(Identity(), error, "posterior") == np.ceil(1 / (6 * error**2) - 2)
    for error, delta in (0.04, 0.05), (0.02, 0.3):
        assert references_needed(Identity(), error, delta=delta) == np.ceil(np.log(2 / delta) / (2 * error**2))


def test_references_needed_takes_the_better_band():
    """For e^{10u} what it finds is enough by the simultaneous band, where DKW's is still half as wide again."""
    transform, delta = Exponential(10.0), 0.1
    error = 0.4 * float(transform(1.0) - transform(0.0))
    K = references_needed(transform, error, delta=delta)
    u, (low, high) = np.arange(K + 1) / K, band(K, delta, "simultaneous")
    width = np.sqrt(np.log(2 / delta) / (2 * K))
    assert max((transform(high[::2]) - transform(u)).max(), (transform(u) - transform(low[::2])).max()) <= error
    assert (transform(np.minimum(u + width, 1)) - transform(u)).max() > 1.5 * error


@pytest.mark.parametrize("estimator", ["empirical", "posterior"])
@pytest.mark.parametrize("transform", [Exponential(3.0), Exponential(-3.0), BENT], ids=repr)
def test_references_needed_for_all_responses_by_simulation(transform, estimator):
    """With that many references, the worst response of all is within the error as often as promised."""
    error, delta, draws = 0.6 * float(transform(1.0) - transform(0.0)), 0.2, 4000
    K = references_needed(transform, error, estimator, delta=delta)
    u = np.sort(np.random.default_rng(8).random((draws, K)), axis=1)
    fence = transform(np.hstack([np.zeros((draws, 1)), u, np.ones((draws, 1))]))
    whole = values(transform, K, estimator)[::2]
    worst = np.maximum(fence[:, 1:] - whole, whole - fence[:, :-1]).max(axis=1)
    assert (worst <= error).mean() > 1 - delta - 4 * np.sqrt(delta * (1 - delta) / draws)


# Policies trained against fixed references.

DECODED = [
    (BestOf(4), None),
    (WorstOf(3), None),
    (BestOf(2), WorstOf(5)),
    (Standard(), BestOf(3)),
    (RewindAndRepeat(0.6, 5), None),
    (SoftBestOf(3, 0.2), Standard()),
]


def simulated_win_rate(references, whole, beta, procedure, base, rng, size):
    """Draw from the policy by inverting its CDF, run the procedures, and count: one draw of references."""
    ends = np.concatenate([[0.0], np.sort(references), [1.0]])
    mass = np.exp(whole / beta) * np.diff(ends)
    cdf = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
    draws = np.interp(rng.random((size, procedure.draws)), cdf, ends)
    base_draws = rng.random((size, base.draws))
    chosen = np.take_along_axis(draws, procedure.choose(draws, rng)[:, None], 1)
    return chosen[:, 0] > np.take_along_axis(base_draws, base.choose(base_draws, rng)[:, None], 1)[:, 0]


@pytest.mark.parametrize(("procedure", "base"), DECODED)
def test_win_rate_at_k_by_simulation(procedure, base):
    """300 draws of references, each with its own policy, responses drawn from it, decoded and judged."""
    rng, K, beta = np.random.default_rng(9), 5, 0.3
    whole = values(Power(2.0), K, "posterior")[::2]
    rows = [
        simulated_win_rate(rng.random(K), whole, beta, procedure, base or procedure, rng, 600).mean()
        for _ in range(300)
    ]
    result = win_rate_at_k(Power(2.0), beta, procedure, K, "posterior", base=base, draws=300, seed=1)
    error = np.hypot(np.std(rows) / np.sqrt(300), result.win_rate_error)
    assert abs(np.mean(rows) - result.win_rate) < 4 * error


def exact_at_one_reference(beta, n, outcome):
    """Mean over U ~ Unif[0, 1] of `outcome` for the policy e^{u^/beta} with one reference at U, by scipy."""
    high = np.exp(1 / beta)

    def at(x):
        total = x + high * (1 - x)
        return outcome(x, 1 / total, high / total, n)

    return quad(at, 0, 1, epsabs=1e-8)[0]


def best_of_win(x, low, high, n):
    """1 - n int F^n u^{n-1} du (Thm 3), F of slope `low` up to x and `high` from there."""
    first = low**n * x ** (2 * n) / 2
    return 1 - first - n * quad(lambda u: (low * x + high * (u - x)) ** n * u ** (n - 1), x, 1, epsabs=1e-9)[0]


def step_kl(x, low, high, _):
    """Of a density `low` up to x and `high` from there."""
    return x * low * np.log(low) + (1 - x) * high * np.log(high)


@pytest.mark.parametrize(("beta", "n"), [(0.5, 1), (0.5, 4), (0.1, 40)])
def test_win_rate_at_one_reference_is_an_integral(beta, n):
    """K = 1 in closed form but for the integral over the reference."""
    result = win_rate_at_k(Identity(), beta, BestOf(n), 1, draws=4000, seed=2)
    assert abs(result.win_rate - exact_at_one_reference(beta, n, best_of_win)) < 4 * result.win_rate_error
    assert abs(result.kl - exact_at_one_reference(beta, n, step_kl)) < 4 * result.kl_error


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 1), (3, 5), (128, 128), (100, 3)])
def test_a_flat_reward_leaves_the_reference(n, m):
    """Then BestOf(n) beats BestOf(m) n times in n + m and WorstOf(m) with all but probability 1/binom(n + m, n)."""
    result = win_rate_at_k(FLAT, 0.1, BestOf(n), 4, base=BestOf(m), draws=2)
    assert result.win_rate == pytest.approx(n / (n + m), abs=1e-12)
    assert result.kl == pytest.approx(0.0, abs=1e-14)
    against_worst = win_rate_at_k(FLAT, 0.1, BestOf(n), 4, base=WorstOf(m), draws=2).win_rate
    assert against_worst == pytest.approx(1 - float(Fraction(1, comb(n + m, n))), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(procedures, st.integers(1, 6))
def test_at_large_beta_a_policy_ties_with_the_reference(procedure, K):
    """Win rate 1/2, KL 0 for any procedure, against itself."""
    result = win_rate_at_k(Identity(), 1e9, procedure, K, draws=3)
    assert (result.win_rate, result.kl) == pytest.approx((0.5, 0.0), abs=1e-7)


@pytest.mark.parametrize("estimator", ["empirical", "posterior", "randomised"])
@pytest.mark.parametrize("procedure", [BestOf(4), WorstOf(4), RewindAndRepeat(0.85, 8)], ids=repr)
def test_many_references_tell_all(procedure, estimator):
    """At K = 4000 the win rate is the theory's, which knows every quantile."""
    result = win_rate_at_k(Power(3.0), 0.3, procedure, 4000, estimator, draws=20)
    assert abs(result.win_rate - win_rate(Power(3.0), 0.3, procedure)) < 1e-3 + 4 * result.win_rate_error


@pytest.mark.parametrize(
    ("transform", "procedure", "K"), [(Exponential(10.0), BestOf(4), 6), (Identity(), Standard(), 3)], ids=repr
)
def test_win_rate_at_kl_has_that_kl_and_an_honest_error(transform, procedure, K):
    """Over 40 seeds, the spread of the results is the error that each reports, and their mean is a long run's."""
    runs = [win_rate_at_kl(transform, 0.5, procedure, K, draws=60, seed=seed) for seed in range(40)]
    assert [run.kl for run in runs] == pytest.approx([0.5] * 40, abs=1e-9)
    spread, reported = np.std([run.win_rate for run in runs], ddof=1), np.mean([run.win_rate_error for run in runs])
    assert 0.65 < spread / reported < 1.5
    long_run = win_rate_at_kl(transform, 0.5, procedure, K, draws=4000, seed=99)
    assert abs(np.mean([run.win_rate for run in runs]) - long_run.win_rate) < 5 * spread / np.sqrt(40)


@pytest.mark.parametrize("transform", [Log(), Exponential(700.0), Chain(Identity(), Affine(1e-200))], ids=repr)
def test_win_rate_at_kl_agrees_with_win_rate_at_k(transform):
    """At the beta that it found, same draws, however large or small the values."""
    found = win_rate_at_kl(transform, 0.3, WorstOf(2), 10, "posterior", draws=50, seed=4)
    again = win_rate_at_k(transform, found.beta, WorstOf(2), 10, "posterior", draws=50, seed=4)
    assert (again.win_rate, again.kl) == pytest.approx((found.win_rate, found.kl), abs=1e-12)


@pytest.mark.parametrize(
    ("procedure", "base"),
    [(BestOf(4), BestOf(4)), (WorstOf(7), Standard()), (BestOfUpTo(5), WorstOf(3)), (Standard(), Standard())],
)
def test_as_many_nodes_as_draws_are_exact(procedure, base, monkeypatch):
    """Win rates of polynomials change by rounding alone where each panel has 64 nodes."""
    few = win_rate_at_k(Exponential(5.0), 0.3, procedure, 12, base=base, draws=40)
    monkeypatch.setattr(StepPolicies, "order", 64)
    assert few.win_rate == pytest.approx(
        win_rate_at_k(Exponential(5.0), 0.3, procedure, 12, base=base, draws=40).win_rate, abs=1e-13
    )


def test_the_most_kl_that_references_give():
    """All mass above the highest reference: E -log(1 - U_(K)) = 1 + 1/2 + ... + 1/K, near which KLs are refused."""
    K = 6
    result = win_rate_at_k(Identity(), 1e-6, BestOf(2), K, draws=2000)
    assert abs(result.kl - sum(1 / k for k in range(1, K + 1))) < 4 * result.kl_error
    with pytest.raises(ValueError, match=r"the most K=6 gives, got kl=4\.0\."):
        win_rate_at_kl(Identity(), 4.0, BestOf(2), K, draws=100)


STEEP = Chain(NormalQuantile(), Exponential(9.0))
REFUSED = [
    (lambda: inspect.unwrap(values)(Identity(), 0), r"K >= 1, got K=0\."),
    (lambda: inspect.unwrap(values)(Identity(), 2.5), r"K >= 1, got K=2\.5\."),
    (lambda: inspect.unwrap(values)(Identity(), 2, "plugin"), r"posterior, .*, got estimator='plugin'\."),
    (lambda: values(Opaque(lambda u: np.full(np.shape(u), np.nan)), 3), r"finite inside \(0, 1\), got Opaque"),
    (lambda: values(STEEP, 8, "posterior"), r"too steep near 0 or 1"),
    (lambda: bias(Identity(), 3, "empirical", [0.1, 1.2]), r"c in \[0, 1\], got c=array\(\[0\.1, 1\.2\]\)"),
    (lambda: log_partition(Identity(), 0.0, 3), r"beta > 0, got beta=0\.0\."),
    (lambda: references_needed(Identity(), -1.0), r"error > 0, got error=-1\.0\."),
    (lambda: references_needed(Identity(), 1e-5), r"no K <= 1000000 with an error of 1e-05 for Identity\(\)\."),
    (lambda: references_needed(Power(0.5), 1e-3, "unbiased"), r"no K <= 1000 with an error of 0\.001 for Power"),
    (lambda: references_needed(Log(), 0.1, delta=0.1), r"finite on \[0, 1\], got Log\(\)\."),
    (lambda: references_needed(Identity(), 0.1, delta=2.0), r"0 < delta < 1, got delta=2\.0\."),
    (
        lambda: randomised(2, 2, 3, np.random.default_rng()),
        r"below \+ equal <= K=3, got array\(2\.\) and array\(2\.\)\.",
    ),
    (lambda: win_rate_at_k(Identity(), -0.1, BestOf(2), 3), r"beta > 0, got beta=-0\.1\."),
    (lambda: win_rate_at_k(Identity(), 0.1, BestOf(2), 3, draws=1), r"draws >= 2, got draws=1\."),
    (
        lambda: win_rate_at_kl(Identity(), 0.0, BestOf(2), 3),
        r"a KL > 0 and < 1\.\d+, the most K=3 gives, got kl=0\.0\.",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refuses_what_it_cannot_do(wrong, message):
    """Each error names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        wrong()
