"""The optimal transform: residuals, closed forms, other solvers, and that nothing beats it."""

import functools
import inspect
import math
import pickle
from unittest import mock

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.integrate import cumulative_trapezoid, solve_bvp
from scipy.optimize import minimize
from scipy.special import softmax
from strategies import transforms

from calibrated_rewards.testing.suites import check_picklable, check_transform
from calibrated_rewards.theory.optimum import Choice, Optimal, optimal_transform, optimum, tune
from calibrated_rewards.theory.procedures import BestOf, Calibrated, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.scale import span
from calibrated_rewards.theory.tilted_policy import beta_for_kl, kl, kl_of, kl_range, policy_law, win_rate, win_rate_of
from calibrated_rewards.theory.transforms import Exponential

BETAS = [1e-3, 1e-2, 0.1, 1.0, 1e3]


@pytest.mark.parametrize("kind", [BestOf, WorstOf])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 128])
@pytest.mark.parametrize("beta", BETAS)
def test_residuals_of_the_fixed_point_and_of_the_ode(kind, n, beta):
    """Both below 1e-8 for every N and beta that we promise; the curve is a transform."""
    optimal = Optimal(kind(n), beta)
    fixed_point, ode = optimal.residuals

    assert fixed_point < 1e-10
    assert ode < 1e-8
    check_transform(optimal)


@pytest.mark.parametrize("kind", [BestOf, WorstOf])
@pytest.mark.parametrize(("n", "beta"), [(2, 0.3), (4, 0.1), (8, 0.1), (32, 1.0)])
def test_the_ode_by_central_differences_in_u(kind, n, beta):
    """beta f'/f = N^2 F^{N-1} u^{N-1} on a uniform grid of u, with differences and sums and nothing of ours but Phi."""
    optimal, u = Optimal(kind(n), beta), np.linspace(0, 1, 200_001)
    phi = np.asarray(optimal(u))
    cdf = cumulative_trapezoid(np.exp(phi / beta), u, initial=0)
    cdf /= cdf[-1]
    rank = (cdf, u) if kind is BestOf else (1 - cdf, 1 - u)
    slope = n**2 * rank[0] ** (n - 1) * rank[1] ** (n - 1)

    assert np.gradient(phi, u)[1:-1] == pytest.approx(slope[1:-1], abs=2e-5 * slope.max())


@pytest.mark.parametrize("beta", BETAS)
def test_corollary_1_the_identity_is_optimal_for_the_standard_win_rate(beta):
    """N = 1: Phi(u) - Phi(1) = u - 1 to rounding error."""
    u = np.linspace(0, 1, 101)

    assert Optimal(Standard(), beta)(u) == pytest.approx(u - 1, abs=1e-11)
    assert Optimal(BestOf(1), beta)(u) == pytest.approx(u - 1, abs=1e-11)
    assert Optimal(WorstOf(1), beta)(u) == pytest.approx(u - 1, abs=1e-11)


@pytest.mark.parametrize("beta", [0.3, 0.1, 0.05])
def test_best_of_two_against_a_library_boundary_value_solver(beta):
    """scipy.integrate.solve_bvp on (log f, F): a collocation method, not shooting."""

    def slopes(u, y):
        return np.vstack([4 * y[1] * u / beta, np.exp(y[0])])

    def ends(left, right):
        return np.array([left[1], right[1] - 1])

    start = Exponential(5.0)(np.linspace(0, 1, 400)) / 60
    mesh = np.linspace(0, 1, 400)
    solved = solve_bvp(slopes, ends, mesh, np.vstack([start, mesh]), tol=1e-9, max_nodes=50_000)
    u = np.linspace(0, 1, 57)

    assert solved.success
    assert Optimal(BestOf(2), beta)(u) == pytest.approx(beta * (solved.sol(u)[0] - solved.sol(1.0)[0]), abs=1e-7)


@pytest.mark.parametrize(
    ("procedure", "beta"), [(BestOf(2), 0.05), (BestOf(4), 0.083), (BestOf(8), 0.1), (WorstOf(4), 0.2)]
)
def test_the_damped_fixed_point_agrees(procedure, beta):
    """The paper's iteration with a tenth of each step converges, to the same function."""
    damped = Optimal(procedure, beta).iterate(rounds=600, damping=0.1)

    assert damped.changes[-1] < 1e-10
    assert Optimal(procedure, beta)(damped.u) == pytest.approx(damped.values, abs=1e-8)


def test_the_undamped_fixed_point_cycles_between_two_functions():
    """Best-of-4 at KL 1: round 200 differs from round 201 but equals round 202, so it never converges."""
    optimal = Optimal(BestOf(4), 0.083)
    even, odd, even_again = (optimal.iterate(rounds, damping=1.0) for rounds in (200, 201, 202))

    assert np.abs(even.values - odd.values).max() > 0.1 * np.ptp(even.values)
    assert np.abs(even.values - even_again.values).max() < 1e-6 * np.ptp(even.values)
    assert even.changes[-1] > 0.1


cached_optimum = functools.cache(optimum)


@settings(max_examples=40)
@given(st.sampled_from([BestOf(2), BestOf(4), WorstOf(3), Standard()]), st.sampled_from([0.1, 0.7, 2.0]), transforms)
def test_no_transform_of_the_same_kl_beats_the_optimum(procedure, budget, rival):
    """The point of Corollary 2, against every transform hypothesis can think of."""
    with mock.patch.object(jaxtyping.config, "jaxtyping_disable", True):  # types take three quarters of the time here
        if budget > 0.95 * kl_range(rival)[1]:
            return
        best = cached_optimum(procedure, kl=budget).win_rate
        assert best >= win_rate(rival, beta_for_kl(rival, budget), procedure) - 1e-9


@pytest.mark.parametrize(
    ("procedure", "budget", "published"),
    [
        (BestOf(2), 0.5, 0.8156), (BestOf(2), 1.0, 0.8969), (BestOf(4), 0.25, 0.7969), (BestOf(4), 0.5, 0.8733),
        (BestOf(4), 1.0, 0.9411), (BestOf(8), 0.5, 0.9299), (WorstOf(4), 0.5, 0.9479),
        (WorstOf(4), 0.25, 0.8583),
    ],
    ids=str,
)  # fmt: skip
def test_the_published_optima(procedure, budget, published):
    """Win rates at matched KL that were computed independently, to 1e-4."""
    best = optimum(procedure, kl=budget)

    assert best.win_rate == pytest.approx(published, abs=1e-4)
    assert best.kl == pytest.approx(budget, rel=1e-9)


@pytest.mark.parametrize("procedure", [BestOf(4), WorstOf(4), BestOf(32)])
def test_a_choice_keeps_its_promises(procedure):
    """Its transform has range [0, 1], and theory on it with its beta gives its KL and win rate."""
    for choice in (optimum(procedure, kl=0.5), tune(procedure, kl=0.5), optimum(procedure, beta=0.2)):
        assert isinstance(choice, Choice)
        assert span(choice.transform) == pytest.approx((0, 1), abs=1e-12)
        assert kl(choice.transform, choice.beta) == pytest.approx(choice.kl, rel=1e-8)
        assert win_rate(choice.transform, choice.beta, procedure) == pytest.approx(choice.win_rate, abs=1e-8)


@pytest.mark.parametrize(
    ("procedure", "base"),
    [
        (BestOf(4), None),
        (WorstOf(4), None),
        (BestOf(4), Standard()),
        (RewindAndRepeat(), None),
        (SoftBestOf(3, 0.5), None),
    ],
)
def test_tune_is_the_best_of_a_scan(procedure, base):
    """No t on a grid does better, for procedures with an optimum and for those without."""
    tuned = tune(procedure, kl=0.5, base=base)
    scan = [Exponential(t) for t in (-40.0, -20.0, -10.0, -5.0, -2.0, -1.0, 1.0, 2.0, 5.0, 8.0, 12.0, 20.0, 40.0)]
    rates = [win_rate(phi, beta_for_kl(phi, 0.5), procedure, base) for phi in scan]

    assert tuned.win_rate >= max(rates) - 1e-9


def test_tune_reproduces_the_published_ts():
    """Best t at matched KL: 12.6 and 17.3 for best-of-4 at KL .5 and 1 (one decimal), 4.6 for best-of-2."""
    best_t = [tune(BestOf(n), kl=budget).transform.parts[0].t for n, budget in [(4, 0.5), (4, 1.0), (2, 0.5)]]

    assert np.round(best_t, 1).tolist() == [12.6, 17.3, 4.6]


def test_different_sizes_on_each_side():
    """Policy best-of-4 against one draw of the base: better than the symmetric optimum there, and solved as well."""
    sided = optimal_transform(BestOf(4), kl=0.5, base=Standard())
    symmetric = optimal_transform(BestOf(4), kl=0.5)

    assert max(sided.residuals) < 1e-8
    assert (
        win_rate(sided, sided.beta, BestOf(4), Standard())
        > win_rate(symmetric, symmetric.beta, BestOf(4), Standard()) + 1e-4
    )


def test_a_calibrated_procedure_of_ones_own():
    """g(c) = 4 c^3, said as a function, has the optimum of BestOf(4)."""
    u = np.linspace(0, 1, 33)

    assert Optimal(Calibrated(cubed), 0.2)(u) == pytest.approx(Optimal(BestOf(4), 0.2)(u), abs=1e-9)


def cubed(c):
    """4 c^3."""
    return 4 * c**3


def test_it_pickles_as_its_question():
    """Three fields travel, not the curve; a solved one and a fresh one are equal."""
    solved = Optimal(BestOf(4), 0.083)
    solved(0.5)

    assert len(pickle.dumps(solved)) < 500
    check_picklable(solved)
    assert eval(repr(solved)) == solved


def test_equal_questions_are_solved_once():
    """At a KL, and for an equal object that was pickled or made anew; a g without a hash is solved each time."""
    first = optimal_transform(BestOf(3), kl=0.4)
    assert optimal_transform(BestOf(3), kl=0.4)._solved is first._solved
    assert pickle.loads(pickle.dumps(first))._solved is first._solved
    assert optimal_transform(BestOf(3), kl=0.41).beta != first.beta
    odd = Calibrated(np.poly1d([4.0, 0.0, 0.0, 0.0]))
    best = optimal_transform(BestOf(4), kl=0.5)
    assert optimal_transform(odd, kl=0.5).beta == pytest.approx(best.beta, rel=1e-9)
    assert Optimal(odd, best.beta)(0.3) == pytest.approx(best(0.3), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Optimal(BestOf(4), 0.0), "beta must be finite and > 0, got beta=0.0"),
        (lambda: Optimal(BestOf(4), math.nan), "got beta=nan"),
        (lambda: optimal_transform(BestOf(4)), "either beta or kl, got beta=None, kl=None"),
        (lambda: optimal_transform(BestOf(4), beta=1.0, kl=1.0), "either beta or kl"),
        (lambda: optimum(BestOf(4), kl=-1.0), "kl must be finite and > 0, got kl=-1.0"),
        (
            lambda: optimum(BestOf(128), kl=5.0),
            "has a KL of 0.6.* at most, and wins 0.9999.*, got kl=5.0: more gains nothing",
        ),
        (lambda: optimum(WorstOf(64), kl=1.0), "has a KL of 0.194 at most, and wins 0.99999.*, got kl=1.0"),
    ],
)
def test_refusals(call, message, monkeypatch):
    """The error names the rule and the value."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types take most of the time of the last one
    with pytest.raises(ValueError, match=message):
        call()


def test_the_best_of_several_stationary_points():
    """Worst-of-4 against best-of-4 at beta .34 has three; a root-finder alone lands on a worse one."""
    optimal = Optimal(WorstOf(4), 0.34, BestOf(4))
    objective = win_rate(optimal, 0.34, WorstOf(4), BestOf(4)) - 0.34 * kl(optimal, 0.34)
    rivals = [Exponential(t) for t in (-20.0, -5.0, -1.0, 1.0, 5.0, 20.0)]
    found = [
        win_rate(phi, beta_for_kl(phi, k), WorstOf(4), BestOf(4)) - 0.34 * k
        for phi in rivals
        for k in (0.01, 0.03, 0.1, 0.5, 1.5, 2.0)
    ]

    assert objective >= max(found)
    assert objective == pytest.approx(best_step_density(0.34), abs=2e-4)


def best_step_density(beta, bins=40):
    """Largest W - beta KL for worst-of-4 against best-of-4 among densities of equal bins, by BFGS from three starts."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    inside = (nodes + 1) / 2
    u = (np.arange(bins)[:, None] + inside) / bins

    def loss(logits):
        mass = softmax(logits)
        cdf = np.cumsum(mass)[:, None] - mass[:, None] * (1 - inside)
        rate = np.sum((1 - cdf) ** 4 * 4 * u**3 * weights / 2) / bins
        return beta * mass @ np.log(mass * bins) - rate

    ramp = np.linspace(0, 1, bins)
    return max(-minimize(loss, slope * ramp, method="BFGS").fun for slope in (0.0, 2.0, 10.0))


def test_numpy_scalars_and_large_n():
    """kl may be any number; best-of-10,000 is solved too."""
    half = inspect.unwrap(optimal_transform)(BestOf(2), kl=np.float32(0.5))
    assert kl(half, half.beta) == pytest.approx(0.5)
    assert max(Optimal(BestOf(10_000), 0.1).residuals) < 1e-8


def test_what_is_beyond_the_solver_is_an_error_not_a_wrong_curve():
    """Worst-of-10,000 against one draw at beta = .01 is not solved to 1e-9, and it says so."""
    with pytest.raises(ArithmeticError, match="was not solved to 1e-9"):
        Optimal(WorstOf(10_000), 0.01, Standard())(0.5)


BASES = {"same": None, "best-of-4": BestOf(4), "one draw": Standard()}
EXTREMES = [(n, beta) for n in (64, 700, 10_000) for beta in (1e-4, 0.1, 1e3)]


@pytest.mark.parametrize("base", BASES)
def test_worst_of_many_is_never_worse_than_the_reference_or_an_exponential(base, monkeypatch):
    """N up to 10,000, beta from 1e-4 to 1e3: an objective above that of the reference and of the best e^{-tu}.

    The rivals' win rates and KLs are those of `theory`, by quadrature; a case that is beyond the solver says so, and
    against the reference's own worst-of-N there is none.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    unsolved = 0
    for n, beta in EXTREMES if base == "same" else EXTREMES[1::2]:
        procedure, other = WorstOf(n), BASES[base]
        optimal = Optimal(procedure, beta, other)
        try:
            law = optimal.law
        except ArithmeticError:
            unsolved += 1
            continue
        objective = win_rate_of(law, procedure, other) - beta * kl_of(law)
        rivals = [win_rate(Exponential(1.0), math.inf, procedure, other)]
        for t, strength in [(n / 4, 0.3), (n / 4, 0.03), (n, 0.3), (5, 0.01)]:
            rival = policy_law(Exponential(-min(t, 600.0)), strength, procedure)
            rivals.append(win_rate_of(rival, procedure, other) - beta * kl_of(rival))
        assert objective >= max(rivals) - 1e-9, (n, beta)
    assert unsolved <= (0 if base == "same" else 1)


def test_worst_of_a_thousand_is_the_best_step_density():
    """At beta .1: win rate - beta KL of step densities on bins of equal ratio, raised by BFGS, comes up to it."""
    law = Optimal(WorstOf(1000), 0.1).law
    objective = win_rate_of(law, WorstOf(1000)) - 0.1 * kl_of(law)
    edges = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, 120)])
    nodes, weights = np.polynomial.legendre.leggauss(6)
    inside, gaps = (nodes + 1) / 2, np.diff(edges)
    base = 1000 * (1 - edges[:-1, None] - gaps[:, None] * inside) ** 999 * gaps[:, None] * weights / 2

    def loss(logits):
        mass = softmax(logits + np.log(gaps))
        above = np.cumsum(mass[::-1])[::-1][:, None] - mass[:, None] * inside
        return 0.1 * mass @ (np.log(mass) - np.log(gaps)) - np.sum(above**1000 * base)

    start = np.where(edges[1:] < 3e-3, -9.0, 0.0)
    assert objective == pytest.approx(-minimize(loss, start, method="L-BFGS-B").fun, abs=2e-3)


def test_a_worse_stationary_point_is_refused(monkeypatch):
    """Were the good ones of the three overlooked, the solution would lie below the reference: an error, not a curve."""
    starts = Optimal(WorstOf(10), 0.34, BestOf(10))._starts()
    assert len(starts) == 3
    monkeypatch.setattr(Optimal, "_starts", lambda self: starts[1:])
    with pytest.raises(ArithmeticError, match="its best stationary point was not found"):
        Optimal(WorstOf(10), 0.34, BestOf(10))(0.5)
