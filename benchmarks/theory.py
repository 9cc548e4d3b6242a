"""Accuracy and speed of the theory: each quantity by the library and by routes that share nothing with it.

    python benchmarks/theory.py

Prints a table and writes benchmarks/results/theory.json. Errors are the largest over the cases named; times are medians
of seven runs, in milliseconds on the machine that the JSON describes.
"""

import itertools
import statistics
import time
from functools import partial

import mpmath
import numpy as np
from environment import save
from scipy import stats
from scipy.integrate import quad

from calibrated_rewards import theory
from calibrated_rewards.theory.optimum import Optimal, optimum, tune
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.quadrature import reference_law, resolve
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, NormalQuantile, Power

SIZES = (1, 2, 4, 8, 16, 32, 128)
BETAS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)


def exact_rates(phi, beta, n):
    """Eqs. 8 and 10 at 30 digits by mpmath's tanh-sinh quadrature, split where the mass is."""
    with mpmath.workdps(30):
        beta = mpmath.mpf(beta)
        points = [mpmath.mpf(0), *(1 - mpmath.mpf(10) ** -k for k in range(1, 9)), mpmath.mpf(1)]
        weight = partial(_weight, phi, beta)
        pieces = [mpmath.quad(weight, [a, b]) for a, b in itertools.pairwise(points)]
        total = mpmath.fsum(pieces)
        best = mpmath.mpf(0)
        for i, (a, b) in enumerate(itertools.pairwise(points)):
            before = mpmath.fsum(pieces[:i])
            best += mpmath.quad(partial(_best, weight, a, before, total, n), [a, b], maxdegree=5)
        mean = mpmath.quad(lambda u: phi(u) * weight(u), points) / total
        shift = phi(mpmath.mpf(1)) / beta
        return float(1 - best), float(mean / beta - mpmath.log(total) - shift)


def _weight(phi, beta, u):
    return mpmath.exp((phi(u) - phi(mpmath.mpf(1))) / beta)


def _best(weight, a, before, total, n, u):
    cdf = (before + mpmath.quad(weight, [a, u], maxdegree=5)) / total
    return n * cdf**n * u ** (n - 1)


def against_thirty_digits():
    """Largest error of win rate and KL against mpmath."""
    forms = {
        Exponential(5.0): lambda u: mpmath.exp(5 * u),
        Exponential(-5.0): lambda u: -mpmath.exp(-5 * u),
        Power(2.0): lambda u: u**2,
    }
    errors = []
    for transform, phi in forms.items():
        for beta in (0.05, 1.0, 20.0):
            for n in (1, 4):
                rate, divergence = exact_rates(phi, beta, n)
                errors.append(abs(theory.win_rate(transform, beta, BestOf(n)) - rate))
                errors.append(abs(theory.kl(transform, beta) - divergence) / max(1.0, divergence))
    return max(errors)


def against_closed_forms():
    """Log and NormalQuantile have closed forms for every N and beta."""
    log = [abs(theory.win_rate(Log(), b, BestOf(n)) - (1 - b / (1 + 2 * b))) for n in SIZES for b in BETAS]
    normal = [
        abs(theory.win_rate(NormalQuantile(), b, Standard()) - stats.norm.cdf(1 / (b * np.sqrt(2)))) for b in BETAS
    ]
    divergence = [abs(theory.kl(NormalQuantile(), b) * 2 * b**2 - 1) for b in BETAS]
    return max(log + normal + divergence)


def against_order_statistics():
    """scipy.stats.order_statistic of the uniform: mean and density of best and worst of N."""
    uniform, law = stats.make_distribution(stats.uniform)(), reference_law(resolve(np.zeros_like).grid)
    errors = []
    for n in SIZES:
        best, worst = stats.order_statistic(uniform, r=n, n=n), stats.order_statistic(uniform, r=1, n=n)
        errors.append(abs(law.mass @ (law.u * BestOf(n).tilt(law)) - best.mean()))
        errors.append(abs(law.mass @ (law.u * WorstOf(n).tilt(law)) - worst.mean()))
    return max(errors)


def against_adaptive_quadrature():
    """Eqs. 8 and 9 for the identity, whose CDF is elementary, by Gauss-Kronrod on u."""
    errors = []
    for beta in (0.01, 0.1, 1.0, 100.0):
        for n in (1, 2, 4, 32, 128):
            best = 1 - n * quad(_best_integrand, 0, 1, (beta, n), epsabs=1e-13, epsrel=1e-13, limit=500)[0]
            worst = n * quad(_worst_integrand, 0, 1, (beta, n), epsabs=1e-13, epsrel=1e-13, limit=500)[0]
            errors.append(abs(theory.win_rate(Identity(), beta, BestOf(n)) - best))
            errors.append(abs(theory.win_rate(Identity(), beta, WorstOf(n)) - worst))
    return max(errors)


def _identity_cdf(u, beta):
    return (np.exp((u - 1) / beta) - np.exp(-1 / beta)) / -np.expm1(-1 / beta)


def _best_integrand(u, beta, n):
    return _identity_cdf(u, beta) ** n * u ** (n - 1)


def _worst_integrand(u, beta, n):
    return (1 - _identity_cdf(u, beta)) ** n * (1 - u) ** (n - 1)


def simulated(duels=2_000_000):
    """Best-of-4 for the identity at beta 0.2, by inversion sampling: difference in standard errors."""
    rng = np.random.default_rng(0)
    ours = 1 + 0.2 * np.log(np.exp(-5) + rng.random((duels, 4)) * -np.expm1(-5))
    rate = np.mean(ours.max(axis=1) > rng.random((duels, 4)).max(axis=1))
    exact = theory.win_rate(Identity(), 0.2, BestOf(4))
    return float((rate - exact) / np.sqrt(exact * (1 - exact) / duels))


def milliseconds(call):
    """Median of seven runs."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def solve(procedure, beta):
    """A fresh Optimal, solved."""
    return Optimal(procedure, beta)(0.5)


def main():
    """Print and save."""
    optimal = [Optimal(kind(n), beta) for kind in (BestOf, WorstOf) for n in SIZES for beta in BETAS]
    residuals = np.array([one.residuals for one in optimal])
    betas = np.geomspace(1e-3, 1e3, 100)
    results = {
        "error against 30 digits": against_thirty_digits(),
        "error against closed forms": against_closed_forms(),
        "error against scipy.stats.order_statistic": against_order_statistics(),
        "error against adaptive quadrature": against_adaptive_quadrature(),
        "simulation minus theory, in standard errors": simulated(),
        "optimal: largest fixed-point residual": float(residuals[:, 0].max()),
        "optimal: largest ODE residual": float(residuals[:, 1].max()),
        "optimal: slowest solution, ms": max(milliseconds(partial(solve, one.procedure, one.beta)) for one in optimal),
        "optimum(BestOf(4), kl=1), ms": milliseconds(partial(optimum, BestOf(4), kl=1.0)),
        "tune(BestOf(4), kl=1), ms": milliseconds(partial(tune, BestOf(4), kl=1.0)),
        "beta_for_kl(Exponential(10), 1), ms": milliseconds(partial(theory.beta_for_kl, Exponential(10.0), 1.0)),
        "frontier of 100 betas, e^{10u}, best-of-4, ms": milliseconds(
            partial(theory.frontier, Exponential(10.0), [BestOf(4)], 22025 * betas)
        ),
        "frontier of 100 betas, log, three procedures, ms": milliseconds(
            partial(theory.frontier, Log(), [Standard(), BestOf(4), WorstOf(4)], betas)
        ),
    }
    for name, value in results.items():
        print(f"{name:52} {value:10.3g}")
    print(save("theory", results))


if __name__ == "__main__":
    main()
