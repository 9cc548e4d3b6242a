"""Theory by agreement of routes: closed forms, 30-digit and adaptive quadrature, simulation."""

import math
from functools import partial

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq
from strategies import betas, procedures, transforms

from calibrated_rewards.theory.procedures import BestOf, Calibrated, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.quadrature import resolve
from calibrated_rewards.theory.scale import scaled, span
from calibrated_rewards.theory.tilted_policy import (
    beta_for_kl,
    bin_masses,
    frontier,
    kl,
    kl_of,
    kl_range,
    mean_tries,
    policy_law,
    win_rate,
    win_rate_of,
)
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Tabulated,
)

BETAS = [1e-3, 0.02, 0.3, 1.0, 30.0, 1e3]
SIZES = [1, 2, 4, 32, 128]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("n", SIZES)
def test_log_in_closed_form(beta, n):
    """Phi = log u makes F = u^{1+1/beta}: W_BoN = 1 - beta/(1 + 2 beta) whatever N is."""
    assert win_rate(Log(), beta, BestOf(n)) == pytest.approx(1 - beta / (1 + 2 * beta), abs=1e-12)
    assert kl(Log(), beta) == pytest.approx(math.log1p(1 / beta) - 1 / (1 + beta), abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("n", [1, 4, 128])
def test_identity_against_thirty_digits(beta, n):
    """F = (e^{u/beta} - 1)/(e^{1/beta} - 1), Eqs. 8-10 as printed, by mpmath's own quadrature."""
    with mpmath.workdps(30):
        b = mpmath.mpf(beta)
        points = [0, *(1 - mpmath.mpf(10) ** -k for k in range(1, 7)), 1]

        def cdf(u):
            return mpmath.expm1(u / b) / mpmath.expm1(1 / b)

        best = 1 - n * mpmath.quad(lambda u: cdf(u) ** n * u ** (n - 1), points)
        worst = n * mpmath.quad(
            lambda u: (1 - cdf(u)) ** n * (1 - u) ** (n - 1), [*points[:1], mpmath.mpf("0.01"), *points[1:]]
        )
        z = b * mpmath.expm1(1 / b)
        divergence = (mpmath.exp(1 / b) * (1 - b) + b) / z - mpmath.log(z)

    assert win_rate(Identity(), beta, BestOf(n)) == pytest.approx(float(best), abs=1e-11)
    assert win_rate(Identity(), beta, WorstOf(n)) == pytest.approx(float(worst), abs=1e-11)
    assert kl(Identity(), beta) == pytest.approx(float(divergence), abs=1e-11)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 2.0, 1e3])
def test_the_normal_quantile_in_closed_form(beta):
    """u = Phi(z): the policy is N(1/beta, 1) over z, so KL = 1/(2 beta^2) and W = Phi(1/(beta sqrt 2))."""
    expected = 0.5 * math.erfc(-1 / (2 * beta))

    assert kl(NormalQuantile(), beta) == pytest.approx(0.5 / beta**2, rel=1e-10)
    assert win_rate(NormalQuantile(), beta, Standard()) == pytest.approx(expected, abs=1e-12)


def reference_integrals(transform, beta, policy_g, base_g):
    """Theorem 4 by adaptive Gauss-Kronrod in u, with nested integrals: slow, and nothing in common with the panels."""
    top = float(np.asarray(transform(1.0)))

    def weight(u):
        return math.exp((float(np.asarray(transform(u))) - top) / beta)

    integrate = partial(quad, epsabs=1e-12, epsrel=1e-12, limit=400)
    z = integrate(weight, 0, 1)[0]
    grid = np.polynomial.legendre.leggauss(400)
    u, w = (grid[0] + 1) / 2, grid[1] / 2
    cdf = np.array([integrate(weight, 0, x)[0] / z for x in u])
    base = np.array([integrate(base_g, 0, x)[0] for x in u])
    density = np.array([weight(x) for x in u]) * np.array([policy_g(c) for c in cdf]) * w
    return float(density @ base / density.sum() / integrate(base_g, 0, 1)[0])


@pytest.mark.parametrize("transform", [Identity(), Exponential(5.0), Exponential(-5.0), Power(2.0)], ids=repr)
@pytest.mark.parametrize("sides", [(1, 1), (4, 4), (4, 1), (2, 5)])
def test_theorem_4_with_different_sizes_on_each_side(transform, sides):
    """Best-of-N policy against best-of-M base: the theorem's integrals, computed another way."""
    n, m = sides
    beta = 0.3 * (span(transform)[1] - span(transform)[0])
    expected = reference_integrals(transform, beta, lambda c: c ** (n - 1), lambda c: c ** (m - 1))

    assert win_rate(transform, beta, BestOf(n), BestOf(m)) == pytest.approx(expected, abs=1e-9)


def test_any_calibrated_procedure_in_theorem_4():
    """A g that is none of ours, (1 + c)^2, on both sides."""
    expected = reference_integrals(Exponential(3.0), 5.0, lambda c: (1 + c) ** 2, lambda c: (1 + c) ** 2)

    assert win_rate(Exponential(3.0), 5.0, Calibrated(lambda c: (1 + c) ** 2)) == pytest.approx(expected, abs=1e-9)


def sample_policy(transform, beta, shape, rng):
    """Quantiles of the tilted policy by rejection from the uniform: no quadrature at all."""
    top = float(np.asarray(transform(1.0)))
    kept = np.empty(0)
    while kept.size < np.prod(shape):
        u = rng.random(4_000_000)
        kept = np.concatenate([kept, u[rng.random(u.size) < np.exp((np.asarray(transform(u)) - top) / beta)]])
    return kept[: np.prod(shape)].reshape(shape)


@pytest.mark.parametrize(
    "procedure",
    [Standard(), BestOf(4), WorstOf(3), SoftBestOf(3, 0.1), RewindAndRepeat(0.85, 8), RewindAndRepeat(0.4, 2)],
    ids=repr,
)
def test_win_rates_against_simulation(procedure):
    """Draw, choose, compare: 100,000 duels, five standard errors."""
    rng, duels = np.random.default_rng(7), 100_000
    transform, beta = Exponential(3.0), 8.0
    ours = sample_policy(transform, beta, (duels, procedure.draws), rng)
    theirs = rng.random((duels, procedure.draws))
    chosen = [np.take_along_axis(x, procedure.choose(x, rng)[:, None], 1)[:, 0] for x in (ours, theirs)]

    assert win_rate(transform, beta, procedure) == pytest.approx(
        np.mean(chosen[0] > chosen[1]), abs=5 * 0.5 / duels**0.5
    )


@settings(max_examples=60)
@given(transforms, betas, procedures)
def test_win_rates_are_rates_and_beat_one_half(transform, beta, procedure):
    """1/2 <= W <= 1 and KL >= 0 for every rising transform: the policy dominates the reference."""
    rate = win_rate(transform, beta, procedure)

    assert 0.5 - 1e-9 <= rate <= 1 + 1e-9
    assert kl(transform, beta) >= 0


@given(transforms, procedures)
def test_infinite_beta_is_the_reference(transform, procedure):
    """beta -> infinity: W = 1/2 and KL = 0, for every procedure."""
    standard = scaled(transform, "standard")

    assert win_rate(standard, 1e9, procedure) == pytest.approx(0.5, abs=1e-7)
    assert kl(standard, 1e9) == pytest.approx(0, abs=1e-15)


@settings(max_examples=40)
@given(transforms, betas, st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_moves_beta_and_nothing_else(transform, beta, scale, shift):
    """(a Phi + b, a beta) is the same policy as (Phi, beta)."""
    stretched = Chain(transform, Affine(scale, shift))

    assert kl(stretched, scale * beta) == pytest.approx(kl(transform, beta), rel=1e-9, abs=1e-13)
    assert win_rate(stretched, scale * beta, BestOf(3)) == pytest.approx(
        win_rate(transform, beta, BestOf(3)), abs=1e-10
    )


@settings(max_examples=60)
@given(transforms, st.floats(-6.0, 1.0))
def test_beta_for_kl_inverts_kl(transform, log_kl):
    """kl(beta_for_kl(k)) = k, over seven decades."""
    target = 10**log_kl
    assume(target < 0.9 * kl_range(transform)[1])

    assert kl(transform, beta_for_kl(transform, target)) == pytest.approx(target, rel=1e-9)


@given(st.floats(0.05, 0.9))
def test_kl_range_of_a_plateau(top):
    """A transform flat above u0 cannot get further than -log(1 - u0) from the reference."""
    plateau = Tabulated([0.0, top, 1.0], [0.0, 1.0, 1.0])

    assert kl_range(plateau)[1] == pytest.approx(-math.log1p(-top), rel=1e-6)
    with pytest.raises(ValueError, match="reaches a KL between 0 and"):
        beta_for_kl(plateau, -math.log1p(-top) * 1.01)


def test_raw_exponentials_need_a_scaled_beta():
    """At the paper's beta .01 / .05 / .09: e^{10u} on [0, 1] has KL 5.9 / 4.2 / 3.5, the identity 3.6 / 2.0 / 1.4."""
    unit = scaled(Exponential(10.0), "unit")

    assert [round(kl(unit, beta), 1) for beta in (0.01, 0.05, 0.09)] == [5.9, 4.2, 3.5]
    assert [round(kl(Identity(), beta), 1) for beta in (0.01, 0.05, 0.09)] == [3.6, 2.0, 1.4]


ANCHORS = {
    (BestOf(4), 0.25): {Identity(): 0.7304, Log(): 0.6902, Exponential(5.0): 0.7856, Exponential(10.0): 0.7966},
    (BestOf(4), 0.5): {Identity(): 0.7998, Log(): 0.7682, Exponential(5.0): 0.8566, Exponential(10.0): 0.8715},
    (BestOf(4), 1.0): {Identity(): 0.8770, Log(): 0.8631, Exponential(5.0): 0.9192, Exponential(10.0): 0.9351},
    (WorstOf(4), 0.5): {Identity(): 0.8860, Log(): 0.9270, Exponential(-5.0): 0.9439, Exponential(-10.0): 0.9476},
}


@pytest.mark.parametrize("setting", ANCHORS, ids=str)
def test_the_published_anchor_points(setting):
    """Win rates at matched KL that were computed independently, to the printed digits."""
    procedure, budget = setting
    rates = {phi: round(win_rate(phi, beta_for_kl(phi, budget), procedure), 4) for phi in ANCHORS[setting]}

    assert rates == ANCHORS[setting]


def test_concentration_within_a_millionth_and_overflow():
    """e^{Phi/beta} = e^{2e7} on 1e-9 of the interval: F = 1 - e^{-v/c} there, so W_Bo1 = 1 - c and KL = -log c - 1."""
    beta = 1e-3
    c = beta / (10 * math.exp(10))

    assert 1 - win_rate(Exponential(10.0), beta, Standard()) == pytest.approx(c, rel=1e-6)
    assert kl(Exponential(10.0), beta) == pytest.approx(-math.log(c) - 1, abs=1e-7)
    assert math.isfinite(win_rate(Exponential(700.0), 1e-3, BestOf(128)))


@given(st.integers(1, 60))
def test_bin_masses_add_up_and_match_the_cdf(bins):
    """Log with BestOf(3): the output's CDF is u^{3(1 + 1/beta)}."""
    edges = np.arange(bins + 1) / bins

    assert bin_masses(Log(), 0.5, BestOf(3), bins) == pytest.approx(np.diff(edges**9.0), abs=1e-12)


def test_mean_tries_of_rewind_and_repeat():
    """(1 - q^N)/(1 - q), q = F(0.85) in closed form for the identity."""
    q = math.expm1(0.85 / 0.2) / math.expm1(1 / 0.2)

    assert mean_tries(Identity(), 0.2, RewindAndRepeat(0.85, 32)) == pytest.approx((1 - q**32) / (1 - q), abs=1e-12)


def test_frontier_is_one_call_for_many():
    """Each point equals the single-point functions; Bo4 and Wo4 rates differ, KL falls with beta."""
    curve = frontier(Exponential(5.0), [Standard(), BestOf(4), WorstOf(4)], [1.0, 10.0, 100.0])

    for i, beta in enumerate(curve.betas):
        assert curve.kl[i] == pytest.approx(kl(Exponential(5.0), beta), rel=1e-10)
        for j, procedure in enumerate(curve.procedures):
            assert curve.win_rates[j, i] == pytest.approx(win_rate(Exponential(5.0), beta, procedure), abs=1e-11)
    assert np.all(np.diff(curve.kl) < 0)


def test_kl_of_a_law_is_kl():
    """A law built by hand: f = 2u has KL = log 2 - 1/2, and beats a uniform draw 2/3 of the time."""
    law = resolve(lambda s: -np.logaddexp(0, -s))

    assert kl_of(law) == pytest.approx(math.log(2) - 0.5, abs=1e-13)
    assert win_rate_of(law, Standard()) == pytest.approx(2 / 3, abs=1e-13)


def test_closed_form_and_root_finder_of_another_kind():
    """beta_for_kl for the identity, by brentq on the textbook formula."""

    def divergence(b):
        z = b * math.expm1(1 / b)
        return (math.exp(1 / b) * (1 - b) + b) / z - math.log(z) - 0.5

    assert beta_for_kl(Identity(), 0.5) == pytest.approx(brentq(divergence, 0.05, 5, xtol=1e-14), rel=1e-10)


def test_infinite_beta_is_exactly_the_reference():
    """So that bin_masses gives the base's own masses."""
    assert kl(Log(), math.inf) == pytest.approx(0, abs=1e-30)
    assert bin_masses(Log(), math.inf, BestOf(3), 4) == pytest.approx(np.diff(np.array([0, 0.25, 0.5, 0.75, 1]) ** 3))


def test_chains_into_an_unbounded_transform():
    """NormalQuantile of u^2: the density ~ e^{z/beta} with z = Phi^-1(u^2), by adaptive quadrature in z."""
    chain = Chain(Power(2.0), NormalQuantile())
    weight = partial(_chain_weight, 0.5)
    total = quad(weight, -10, 12, epsabs=1e-13)[0]
    mean = quad(lambda z: z * weight(z), -10, 12, epsabs=1e-13)[0] / total

    assert kl(chain, 0.5) == pytest.approx(mean / 0.5 - math.log(total), abs=1e-9)


def _chain_weight(beta, z):
    """e^{z/beta} du with u = sqrt(Phi(z))."""
    return math.exp(z / beta) * stats.norm.pdf(z) / (2 * math.sqrt(stats.norm.cdf(z)))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_bad_beta_is_named(beta):
    """beta must be positive, in every function."""
    for call in (
        partial(kl, Identity(), beta),
        partial(policy_law, Log(), beta),
        partial(win_rate, Log(), beta, BestOf(2)),
    ):
        with pytest.raises(ValueError, match=f"beta must be > 0, got beta={beta}"):
            call()


@pytest.mark.parametrize("target", [0.0, -0.1, math.nan, math.inf])
def test_a_bad_kl_is_named(target):
    """So must a KL target."""
    with pytest.raises(ValueError, match=f"got kl={target}"):
        beta_for_kl(Identity(), target)
