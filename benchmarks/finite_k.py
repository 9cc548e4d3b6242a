"""How much is lost to finite K: bias and error of each estimator, widths of bands, win rates of the optimal policies.

    python benchmarks/finite_k.py

Prints four tables and writes benchmarks/results/finite_k.json. All but the win rates, which carry a standard error over
draws of references, are exact; times are medians of five runs on the machine that the JSON describes.
"""

import statistics
import time
from functools import partial

import numpy as np
from environment import save

from calibrated_rewards import theory
from calibrated_rewards.theory.bands import band, dkw
from calibrated_rewards.theory.finite_k import bias, references_needed, rmse, values
from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.procedures import BestOf, Standard
from calibrated_rewards.theory.scale import moments
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, NormalQuantile

ESTIMATORS = ("empirical", "posterior", "unbiased", "randomised")
SIZES = (4, 8, 16, 32, 100)
DRAWS = 4000
# What is trained for, how far, how it is decoded; then the same win rates from another program, whose draws of
# references are its own, common to all cases and of a number not recorded: empirical / posterior for each K, and with
# every quantile known.
WIN_RATES = [
    (
        Exponential(12.6),
        0.5,
        BestOf(4),
        [(0.779, 0.783), (0.805, 0.811), (0.826, 0.832), (0.846, 0.849), (0.862, 0.862)],
        0.873,
    ),
    (Identity(), 0.5, BestOf(4), [(0.765,), (0.778,), (0.788,), (0.794,), (0.797,)], 0.800),
    (Identity(), 0.5, Standard(), [(0.746,), (0.758,), (0.765,), (0.770,), (0.772,)], 0.774),
    (
        Exponential(17.3),
        1.0,
        BestOf(4),
        [(0.836, 0.839), (0.866, 0.872), (0.887, 0.895), (0.907, 0.912), (0.927, 0.928)],
        0.940,
    ),
    (
        Exponential(34.0),
        0.5,
        BestOf(8),
        [(0.790, 0.792), (0.821, 0.826), (0.842, 0.852), (0.865, 0.875), (0.898, 0.901)],
        0.929,
    ),
]


def estimators():
    """Bias at C = 1/2 against Phi there, and rmse against the standard deviation of Phi, by K and estimator."""
    print(f"{'':24}{'K':>5}" + "".join(f"{estimator:>22}" for estimator in ESTIMATORS))
    print(f"{'':29}" + f"{'bias at 1/2':>13}{'nRMSE':>9}" * len(ESTIMATORS))
    rows = []
    for transform in Exponential(10.0), Exponential(5.0), Exponential(-10.0), Identity(), Log(), NormalQuantile():
        unit, spread = float(np.abs(transform(0.5))) or 1.0, moments(transform)[1]
        for K in SIZES:
            row = {"transform": repr(transform), "K": K}
            for estimator in ESTIMATORS:
                off = float(bias(transform, K, estimator, 0.5)) / unit
                row[estimator] = {"bias": off, "nrmse": rmse(transform, K, estimator) / spread}
            print(
                f"{row['transform']:24}{K:5}"
                + "".join(f"{row[e]['bias']:+z13.1%}{row[e]['nrmse']:9.4f}" for e in ESTIMATORS)
            )
            rows.append(row)
    return rows


def bands():
    """Half widths at 1 - delta = 95 % for the best of all references, for one in the middle, and how long they take."""
    print(
        f"\n{'K':>6}{'dkw':>9}{'simultaneous: top':>20}{'middle':>9}"
        f"{'pointwise: top':>17}{'middle':>9}{'ms to solve':>13}"
    )
    rows = []
    for K in (8, 32, 100, 1000):
        row = {"K": K, "dkw": dkw(K, 0.05)}
        for kind in "simultaneous", "pointwise":
            lower, upper = band(K, 0.05, kind)
            row[kind] = {"top": (upper[-1] - lower[-1]) / 2, "middle": (upper[K] - lower[K]) / 2}
        # Levels are remembered, so each run asks for a new one.
        row["milliseconds"] = 1e3 * median_time(lambda run, K=K: band(K, 0.051 + run / 1000))
        rows.append(row)
        print(
            f"{K:6}{row['dkw']:9.4f}{row['simultaneous']['top']:20.4f}{row['simultaneous']['middle']:9.4f}"
            f"{row['pointwise']['top']:17.4f}{row['pointwise']['middle']:9.4f}{row['milliseconds']:13.1f}"
        )
    return rows


def median_time(call):
    """Of five runs, in seconds."""
    seconds = []
    for run in range(5):
        start = time.perf_counter()
        call(run)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def needed():
    """References for an error of one tenth of Phi's range, on the average and for all responses at once."""
    print(f"\n{'K for an error of .1 of the range':36}{'rmse':>12}{'posterior':>12}{'all, 95 %':>12}")
    rows = []
    for transform in Identity(), Exponential(5.0), Exponential(10.0), Exponential(-10.0):
        error = 0.1 * float(transform(1.0) - transform(0.0))
        sizes = [
            references_needed(transform, error),
            references_needed(transform, error, "posterior"),
            references_needed(transform, error, "posterior", delta=0.05),
        ]
        rows.append({"transform": repr(transform), "empirical": sizes[0], "posterior": sizes[1], "all": sizes[2]})
        print(f"{transform!r:36}{sizes[0]:12}{sizes[1]:12}{sizes[2]:12}")
    return rows


def win_rates():
    """True inference-time win rates of the optimal policies for K fixed references, at the same mean true KL."""
    print(f"\n{'':50}" + "".join(f"{f'K = {K}':>26}" for K in SIZES) + f"{'every quantile':>20}")
    rows = []
    for transform, kl, procedure, elsewhere, limit_elsewhere in WIN_RATES:
        limit = theory.win_rate(transform, theory.beta_for_kl(transform, kl), procedure)
        for estimator in ("empirical", "posterior")[: len(elsewhere[0])]:
            column = 0 if estimator == "empirical" else 1
            found = [win_rate_at_kl(transform, kl, procedure, K, estimator, draws=DRAWS, seed=K) for K in SIZES]
            row = {
                "transform": repr(transform),
                "kl": kl,
                "procedure": repr(procedure),
                "estimator": estimator,
                "every_quantile": limit,
                "every_quantile_elsewhere": limit_elsewhere,
                "by_K": {
                    K: {"win_rate": x.win_rate, "error": x.win_rate_error, "elsewhere": other[column]}
                    for K, x, other in zip(SIZES, found, elsewhere, strict=True)
                },
            }
            rows.append(row)
            cells = "".join(
                f"{x['win_rate']:12.4f} ± {x['error']:.4f} ({x['elsewhere']:.3f})"[-26:] for x in row["by_K"].values()
            )
            name = f"{procedure!r}, KL {kl:g}, {transform!r}, {estimator}"
            print(f"{name:50}{cells}{limit:12.4f} ({limit_elsewhere:.3f})")
    return rows


def speeds():
    """Milliseconds for a vector of values at K = 100."""
    times = {
        f"{transform!r} {estimator}": 1e3 * median_time(partial(vector, transform, estimator))
        for transform in (Exponential(10.0), NormalQuantile())
        for estimator in ESTIMATORS
    }
    print("\nms for the values at K = 100: " + ", ".join(f"{name} {spent:.2f}" for name, spent in times.items()))
    return times


def vector(transform, estimator, _run):
    """At the paper's K."""
    return values(transform, 100, estimator)


if __name__ == "__main__":
    results = {
        "estimators": estimators(),
        "bands": bands(),
        "references_needed": needed(),
        "draws_of_references": DRAWS,
        "win_rates_at_kl": win_rates(),
        "milliseconds": speeds(),
    }
    print(f"\nwrote {save('finite_k', results).name}")
