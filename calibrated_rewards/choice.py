"""Which transform to train with, for a procedure and a KL budget: the optimum, or the best exponential.

>>> from calibrated_rewards.procedures import BestOf
>>> best, tuned = optimum(BestOf(4), kl=1.0), tune(BestOf(4), kl=1.0)
>>> print(f"{best.win_rate:.4f} {tuned.win_rate:.4f} {tuned.transform.parts[0].t:.1f}")
0.9411 0.9399 17.3
"""

from dataclasses import dataclass
from functools import partial
from math import asinh, exp, isfinite, log, sinh

import numpy as np

from calibrated_rewards.optimal import SMALLEST_BETA, Optimal
from calibrated_rewards.procedures import CalibratedProcedure, Procedure
from calibrated_rewards.scaling import scaled, span
from calibrated_rewards.theory import beta_for_kl, kl_of, win_rate, win_rate_of
from calibrated_rewards.transforms import Exponential, Identity, Transform

LARGEST_T = 600.0
LARGEST_BETA = 1e6


@dataclass(frozen=True)
class Choice:
    """A transform with range [0, 1], the beta to train it with, and the KL and win rate that this will give."""

    transform: Transform
    beta: float
    kl: float
    win_rate: float


def optimal_transform(
    procedure: CalibratedProcedure,
    *,
    beta: float | None = None,
    kl: float | None = None,
    base: CalibratedProcedure | None = None,
) -> Optimal:
    """The Phi of Corollary 2 at the beta of Def. 5, or at the beta where its policy has the given KL.

    >>> from calibrated_rewards.procedures import BestOf
    >>> print(f"{optimal_transform(BestOf(4), kl=1.0).beta:.4f}")
    0.0830
    """
    match beta, kl:
        case float() | int(), None:
            return Optimal(procedure, beta, base)
        case None, float() | int():
            return Optimal(procedure, _beta_of_optimum(procedure, base, kl), base)
    raise ValueError(f"optimal_transform needs either beta or kl, got beta={beta!r}, kl={kl!r}.")


def _beta_of_optimum(procedure: CalibratedProcedure, base: CalibratedProcedure | None, kl: float) -> float:
    """Secant steps on log KL against log beta, which is nearly a straight line."""
    if not (isfinite(kl) and kl > 0):
        raise ValueError(f"kl must be finite and > 0, got kl={kl!r}.")
    x, step = log(0.3), -1.0
    excess = _excess_kl(procedure, base, kl, x)
    for _ in range(60):
        ahead = min(max(x + step, log(SMALLEST_BETA)), log(LARGEST_BETA))
        if ahead == x:
            break
        moved = _excess_kl(procedure, base, kl, ahead)
        x, step, excess = ahead, -moved * (ahead - x) / (moved - excess), moved
        if abs(excess) < 1e-12:
            return exp(x)
        step = min(max(step, -3.0), 3.0)
    raise ValueError(
        f"The optimum for {procedure!r} reaches a KL up to {kl * exp(excess):.3g} with beta >= {SMALLEST_BETA:g}, "
        f"got kl={kl!r}."
    )


def _excess_kl(procedure: CalibratedProcedure, base: CalibratedProcedure | None, kl: float, log_beta: float) -> float:
    return log(kl_of(Optimal(procedure, exp(log_beta), base).law) / kl)


def optimum(
    procedure: CalibratedProcedure,
    *,
    beta: float | None = None,
    kl: float | None = None,
    base: CalibratedProcedure | None = None,
) -> Choice:
    """The optimal transform, ready to train with: no other policy of its KL has a higher win rate.

    `beta` is that of Def. 5; the Choice carries the beta that goes with the transform scaled to [0, 1].
    """
    best = optimal_transform(procedure, beta=beta, kl=kl, base=base)
    low, high = span(best)
    law = best.law
    return Choice(
        scaled(best, "unit"), best.beta / (high - low), kl_of(law), win_rate_of(law, procedure, base or procedure)
    )


def tune(procedure: Procedure, *, kl: float, base: Procedure | None = None) -> Choice:
    """The best exponential transform (Eq. 11) for any procedure at a KL budget; the identity where t would be 0."""
    from scipy.optimize import minimize_scalar

    loss = partial(_loss, procedure, base, kl)
    trials = np.linspace(-asinh(LARGEST_T), asinh(LARGEST_T), 27)
    best = int(np.argmin([loss(x) for x in trials.tolist()]))
    around = trials[max(best - 1, 0)], trials[min(best + 1, len(trials) - 1)]
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-7})
    chosen = _exponential(float(found.x))
    return Choice(chosen, beta_for_kl(chosen, kl), kl, -float(found.fun))


def _exponential(x: float) -> Transform:
    """e^{tu} on [0, 1] with t = sinh x: a family that passes smoothly through the identity at x = 0."""
    return Identity() if abs(x) < 1e-6 else scaled(Exponential(sinh(x)), "unit")


def _loss(procedure: Procedure, base: Procedure | None, kl: float, x: float) -> float:
    transform = _exponential(x)
    return -win_rate(transform, beta_for_kl(transform, kl), procedure, base)
