"""Mixtures of best-of-k: density, draws, pools and win rates one k at a time, and their optimum by other solvers."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.integrate import cumulative_trapezoid, quad, solve_bvp
from strategies import mixtures

from calibrated_rewards.testing.suites import check_picklable, check_procedure, check_transform
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.optimum import Optimal, optimal_transform, optimum, tune
from calibrated_rewards.theory.procedures import BestOf, Standard
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity

scores = st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.5, 0.9, 0.95]), min_size=1, max_size=6).map(np.array)
SKEWED = BestOfUpTo(3, (0.0, 1.0, 3.0))


def chances_of(mixture):
    """Each k's share in the mixture, in whole numbers or from the weights as they are."""
    weights = [Fraction(1, k) for k in range(1, mixture.n + 1)] if mixture.weights is None else mixture.weights
    return [float(weight / sum(weights)) for weight in weights]


@settings(max_examples=25)
@given(mixtures)
def test_a_mixture_passes_the_public_suite(mixture):
    """Runs, tilts and pool weights agree; it comes back from pickle, and is a key of a dictionary."""
    check_procedure(mixture, runs=4000)
    check_picklable(mixture)
    assert {mixture: 1}[type(mixture)(mixture.n, mixture.weights)] == 1


@given(mixtures, st.floats(0, 1))
def test_its_density_is_the_mean_of_the_densities_of_best_of_k(mixture, c):
    """Float and array alike; it integrates to 1, by scipy."""
    expected = sum(p * k * c ** (k - 1) for k, p in enumerate(chances_of(mixture), start=1))

    assert mixture.density(c, 1 - c) == pytest.approx(expected, rel=1e-12)
    assert mixture.density(np.array([c]), np.array([1 - c])) == pytest.approx(expected, rel=1e-12)
    assert quad(lambda x: mixture.density(x, 1 - x), 0, 1, epsabs=1e-12)[0] == pytest.approx(1, abs=1e-11)


@given(st.integers(1, 128), st.floats(0, 0.99))
def test_harmonic_weights_make_a_geometric_series(n, c):
    """g(C) = (1 - C^n) / (1 - C) over the n-th harmonic number: TailRL's sum of C^{k-1}."""
    harmonic = float(sum(Fraction(1, k) for k in range(1, n + 1)))

    assert BestOfUpTo(n).density(c, 1 - c) == pytest.approx((1 - c**n) / (1 - c) / harmonic, rel=1e-11)


@given(mixtures, scores)
def test_its_pool_weights_by_enumeration(mixture, pool):
    """Every k-subset for every k, one by one; ties shared."""
    n = min(mixture.n, len(pool))
    weights = mixture.weights and mixture.weights[:n]
    mixture = BestOfUpTo(n, weights if weights and any(weights) else None)
    expected = np.zeros(len(pool))
    for k, chance in enumerate(chances_of(mixture), start=1):
        subsets = list(combinations(range(len(pool)), k))
        for subset in map(list, subsets):
            best = pool[subset] == pool[subset].max()
            expected[subset] += chance * best / best.sum() / len(subsets)

    assert mixture.pool_weights(pool) == pytest.approx(expected)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3))
def test_a_mixture_of_one_k_is_best_of_k(n, k, weight):
    """In its density and its pool weights, whatever the one weight is; up to 1 it is one draw."""
    k = min(k, n)
    one = BestOfUpTo(n, [weight * (each == k) for each in range(1, n + 1)])
    c, pool = np.linspace(0, 1, 33), np.random.default_rng(n).random(20)

    assert one.density(c, 1 - c) == pytest.approx(BestOf(k).density(c, 1 - c), rel=1e-12)
    assert one.pool_weights(pool) == pytest.approx(BestOf(k).pool_weights(pool), abs=1e-15)
    assert BestOfUpTo(1).density(c, 1 - c) == pytest.approx(Standard().density(c, 1 - c))


def test_it_draws_a_k_for_each_row():
    """P(chosen <= c) = sum of p_k c^k by simulation, from more scores than it needs too; any batch shape."""
    rng = np.random.default_rng(3)
    rows = rng.random((2, 100_000, 5))
    picks = SKEWED.choose(rows, rng)
    chosen = np.take_along_axis(rows, picks[..., None], -1)

    assert picks.shape == (2, 100_000)
    assert picks.max() == 2
    for c in (0.3, 0.6, 0.9):
        share = float((chosen <= c).mean())
        assert share == pytest.approx(0.25 * c**2 + 0.75 * c**3, abs=5 * 0.5 / 200_000**0.5)
    assert SKEWED.choose([0.1, 0.4, 0.2], rng).shape == ()


@pytest.mark.parametrize("mixture", [BestOfUpTo(4), BestOfUpTo(16), SKEWED], ids=repr)
def test_its_win_rate_is_that_of_every_pair_of_k(mixture):
    """Both sides draw their k apart: a double sum over best of j against best of k; and Thm 4 by quadrature."""
    beta, p = 0.3, chances_of(mixture)
    pairs = sum(
        p[j - 1] * p[k - 1] * win_rate(Identity(), beta, BestOf(j), BestOf(k))
        for j in range(1, mixture.n + 1)
        for k in range(1, mixture.n + 1)
    )

    def integrand(u):
        cdf, density = np.expm1(u / beta) / np.expm1(1 / beta), np.exp(u / beta) / beta / np.expm1(1 / beta)
        below = sum(chance * u**k for k, chance in enumerate(p, start=1))
        return density * below * sum(chance * k * cdf ** (k - 1) for k, chance in enumerate(p, start=1))

    rate = win_rate(Identity(), beta, mixture)
    assert rate == pytest.approx(pairs, abs=1e-10)
    assert rate == pytest.approx(quad(integrand, 0, 1, epsabs=1e-13)[0], abs=1e-10)


@pytest.mark.parametrize("beta", [0.2, 2.0])
def test_over_a_single_draw_it_is_the_objective_of_tailrl(beta):
    """int log P(U > t) dt, by scipy, is the limit of H_n (W - 1); what is cut is below sum_{k>n} 1/k^2 / f(1)."""
    n, harmonic = 128, sum(1 / k for k in range(1, 129))
    objective = quad(lambda t: np.log(-np.expm1((t - 1) / beta) / -np.expm1(-1 / beta)), 0, 1, epsabs=1e-12)[0]
    cut = harmonic * (win_rate(Identity(), beta, BestOfUpTo(n), Standard()) - 1) - objective

    assert 0 < cut < beta * -np.expm1(-1 / beta) / n


def test_its_win_rate_by_simulated_duels():
    """The optimum at KL 1, sampled by inverting its CDF, against the reference; both run `choose`."""
    mixture, rng, duels = BestOfUpTo(6), np.random.default_rng(5), 100_000
    choice = optimum(mixture, kl=1.0)
    u = np.linspace(0, 1, 200_001)
    cdf = cumulative_trapezoid(np.exp(np.asarray(choice.transform(u)) / choice.beta), u, initial=0)
    drawn = rng.random((2, duels, 6))
    drawn[0] = np.interp(drawn[0], cdf / cdf[-1], u)
    ours, theirs = (np.take_along_axis(side, mixture.choose(side, rng)[:, None], -1)[:, 0] for side in drawn)

    assert (ours > theirs).mean() == pytest.approx(choice.win_rate, abs=5 * 0.5 / duels**0.5)


@pytest.mark.parametrize("beta", [1e-2, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("mixture", [BestOfUpTo(2), BestOfUpTo(16), BestOfUpTo(128), SKEWED], ids=repr)
def test_its_optimum_solves_the_fixed_point_and_the_ode(mixture, beta):
    """Both residuals are as small as for best-of-N; the curve is a transform."""
    optimal = Optimal(mixture, beta)

    assert optimal.residuals[0] < 1e-10
    assert optimal.residuals[1] < 1e-8
    check_transform(optimal)


def test_its_optimum_against_a_library_boundary_value_solver():
    """scipy.integrate.solve_bvp on (log f, F) with g(C) = (1 + C + C^2 + C^3) / H_4: collocation, not shooting."""
    beta, mesh, u = 0.126, np.linspace(0, 1, 400), np.linspace(0, 1, 57)

    def g(c):
        return np.polynomial.polynomial.polyval(c, np.ones(4)) * 12 / 25

    solved = solve_bvp(
        lambda x, y: np.vstack([g(y[1]) * g(x) / beta, np.exp(y[0])]),
        lambda left, right: np.array([left[1], right[1] - 1]),
        mesh,
        np.vstack([Exponential(5.0)(mesh) / 60, mesh]),
        tol=1e-9,
        max_nodes=50_000,
    )

    assert solved.success
    assert Optimal(BestOfUpTo(4), beta)(u) == pytest.approx(beta * (solved.sol(u)[0] - solved.sol(1.0)[0]), abs=1e-7)


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_no_other_reward_of_the_same_kl_beats_its_optimum(budget):
    """Neither the optimum for one N nor the best exponential does, and under that N the mixture's does no better."""
    mixture = BestOfUpTo(8)
    best = optimum(mixture, kl=budget)

    for n in (1, 2, 4, 8):
        own = optimum(BestOf(n), kl=budget)
        assert win_rate(own.transform, own.beta, mixture) < best.win_rate
        assert win_rate(best.transform, best.beta, BestOf(n)) < own.win_rate
    tuned = tune(mixture, kl=budget)
    assert best.win_rate - 0.01 < tuned.win_rate < best.win_rate
    assert tuned.win_rate >= max(
        win_rate(phi, beta_for_kl(phi, budget), mixture) for phi in map(Exponential, (2.0, 5.0, 8.0, 12.0, 20.0))
    )


def test_no_single_n_has_a_smaller_largest_loss():
    """Under N = 1, 2, 4, 8, 16 at KL 1 the mixture's largest loss is below that of every single N in place of it."""
    optima = {n: optimal_transform(BestOf(n), kl=1.0) for n in (1, 2, 4, 8, 16)}
    own = {n: win_rate(phi, phi.beta, BestOf(n)) for n, phi in optima.items()}

    def largest_loss(phi):
        return max(own[n] - win_rate(phi, phi.beta, BestOf(n)) for n in own)

    mixture = largest_loss(optimal_transform(BestOfUpTo(16), kl=1.0))
    assert all(mixture < largest_loss(phi) for phi in optima.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOfUpTo(0), "BestOfUpTo needs a whole n >= 1, got n=0"),
        (lambda: BestOfUpTo(2, (1.0,)), r"BestOfUpTo needs weights for k = 1..2, .* got \(1.0,\)"),
        (lambda: BestOfUpTo(2, (2.0, -1.0)), r">= 0 and not all 0, got \(2.0, -1.0\)"),
        (lambda: BestOfUpTo(2, (0, 0)), r"not all 0, got \(0, 0\)"),
        (lambda: BestOfUpTo(2, (np.nan, 1)), "finite, >= 0"),
        (lambda: BestOfUpTo(2, (np.inf, 1)), "finite, >= 0"),
        (lambda: BestOfUpTo(3).pool_weights([1, 2]), r"BestOfUpTo\(3\) needs a pool of at least 3 scores"),
    ],
)
def test_bad_parameters_are_named(make, message):
    """The error says which rule, and the value it got."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("n", [65, 1000])
def test_a_long_harmonic_mixture_is_its_polynomial(n):
    """Past 64 terms the sum of a geometric series, as exact near 0 and 1 as adding the terms up is."""
    above = np.concatenate([np.logspace(-17, -0.5, 30), [0.0, 0.7, 1.0]])
    terms = np.exp(np.outer(np.arange(n), np.log1p(-np.minimum(above, 1 - 1e-16))))
    expected = terms.sum(axis=0) / sum(1 / k for k in range(1, n + 1))
    assert BestOfUpTo(n).density(1 - above, above) == pytest.approx(expected, rel=1e-12)
    assert BestOfUpTo(n).density(1.0, 0.0) == pytest.approx(expected[30], rel=1e-12)


def test_a_mixture_of_millions_costs_no_more_than_one_of_hundreds():
    """Its g is read at once; where the weights alone do not fit into memory the number is refused."""
    assert BestOfUpTo(3_000_000).density(0.5, 0.5) == pytest.approx(2 / (np.log(3e6) + np.euler_gamma), rel=1e-6)
    with pytest.raises(ValueError, match="n <= 10,000,000, got n=30000000"):
        BestOfUpTo(30_000_000)
