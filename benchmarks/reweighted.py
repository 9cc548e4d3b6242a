"""How far off is the frontier without training? `reweighted` on K rollouts of a prompt against the exact truth.

The reward model's score x and the judge's are normals with correlation .6, in every prompt, so that the truth is an
integral: x's own optimum has the law of NormalQuantile. Writes benchmarks/results/reweighted.json: the error of each
win rate, its noise, and the effective number of rollouts that it was flagged by.

    python benchmarks/reweighted.py
"""

from functools import cache

import numpy as np
from environment import save
from scipy.special import expit, ndtr, ndtri

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.objectives import OBJECTIVES, OptimumAtKL
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.quadrature import reference_law
from calibrated_rewards.theory.tilted_policy import beta_for_kl, policy_law
from calibrated_rewards.theory.transforms import Exponential, Identity, NormalQuantile

CORRELATION = 0.6
ROLLOUTS, KLS = (16, 32, 64, 100, 250, 1000), (0.25, 0.5, 1.0, 2.0)
DRAWN = 400_000  # rollouts of all prompts together, at each K
SLOPES = {"reward": 1e9, "judge": CORRELATION / np.sqrt(2 * (1 - CORRELATION**2))}
PROCEDURES = (Standard(), BestOf(4), WorstOf(4))
BINS = ((0, 1.5), (1.5, 3), (3, 5), (5, 8), (8, 12), (12, 20), (20, 50), (50, 1e9))
TRANSFORMS = {"raw": NormalQuantile(), "identity": Identity(), "exp:10": Exponential(10.0)}
OPTIMA = {"best-of:4": OptimumAtKL(BestOf(4)), "worst-of:4": OptimumAtKL(WorstOf(4))}


def truth(name, kl, procedure, slope):
    """P(the policy's output beats the reference's), where the chance at a gap d in x is Phi(slope d)."""
    transform = TRANSFORMS[name] if name in TRANSFORMS else OPTIMA[name].at(kl).transform
    law = policy_law(transform, beta_for_kl(transform, kl), procedure)
    uniform = reference_law(law.grid)
    ours, theirs = (each.mass * procedure.tilt(each) for each in (law, uniform))
    s = law.grid.s
    x = np.where(s < 0, ndtri(expit(s)), -ndtri(expit(-s)))
    beats = ndtr(slope * (x[:, None] - x))
    return float(ours @ beats @ theirs / (ours.sum() * theirs.sum()))


def measured(rng, rollouts):
    """All arms on fresh rollouts."""
    x = rng.normal(size=(DRAWN // rollouts, rollouts))
    judge = CORRELATION * x + np.sqrt(1 - CORRELATION**2) * rng.normal(size=x.shape)
    arms = {name: OBJECTIVES[name] for name in TRANSFORMS} | OPTIMA
    return estimate_frontier(Samples(x, judge), arms, KLS, PROCEDURES)


def compared(found, exact):
    """A row for each arm, KL, judge and procedure: the error of the win rate, and of the gain over raw."""
    for point in found.points:
        raw = next(each for each in found.points if each.arm == "raw" and each.kl == point.kl)
        for judge, slope in SLOPES.items():
            for procedure in PROCEDURES:
                key = repr(procedure)
                true, base = (exact(each.arm, each.kl, procedure, slope) for each in (point, raw))
                rate, gain = point.win_rates[judge][key], point.gains[judge][key]
                yield {
                    "K": found.rollouts,
                    "arm": point.arm,
                    "kl": point.kl,
                    "judge": judge,
                    "procedure": key,
                    "truth": round(true, 5),
                    "error": round(rate.value - true, 5),
                    "error_of_gain": round(gain.value - (true - base), 5),
                    "standard_error": round(rate.standard_error, 5),
                    "ess": round(point.ess_of[key], 2),
                    "ess_of_gain": round(min(point.ess_of[key], raw.ess_of[key]), 2),
                }


def by_ess(rows, error, ess):
    """How large errors are where the effective number of rollouts is what it is."""
    for low, high in BINS:
        own = [abs(row[error]) for row in rows if low <= row[ess] < high]
        yield {"from": low, "to": high, "win_rates": len(own), "largest": max(own), "mean": round(np.mean(own), 5)}


def main():
    """Measure at each K, and keep it."""
    exact = cache(truth)
    seeds = ((np.random.default_rng(rollouts), rollouts) for rollouts in ROLLOUTS)
    rows = [row for rng, rollouts in seeds for row in compared(measured(rng, rollouts), exact)]
    others = [row for row in rows if row["arm"] != "raw"]
    tables = {"errors": [*by_ess(rows, "error", "ess")]}
    tables["errors_of_gains"] = [*by_ess(others, "error_of_gain", "ess_of_gain")]
    for name, table in tables.items():
        print(name, *table, sep="\n  ")
    save("reweighted", {"correlation": CORRELATION, "rollouts_drawn": DRAWN, **tables, "rows": rows})


if __name__ == "__main__":
    main()
