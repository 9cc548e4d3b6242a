"""Which transform to train with, for a procedure and a KL budget: the optimum, or the best exponential.

>>> from calibrated_rewards.procedures import BestOf
>>> best, tuned = optimum(BestOf(4), kl=1.0), tune(BestOf(4), kl=1.0)
>>> print(f"{best.win_rate:.4f} {tuned.win_rate:.4f} {tuned.transform.parts[0].t:.1f}")
0.9411 0.9399 17.3
"""

from dataclasses import dataclass
from functools import partial
from math import asinh, exp, inf, isfinite, log, sinh

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
    if (beta is None) == (kl is None):
        raise ValueError(f"optimal_transform needs either beta or kl, got beta={beta!r}, kl={kl!r}.")
    if beta is not None:
        return Optimal(procedure, float(beta), base)
    return Optimal(procedure, _beta_of_optimum(procedure, base, float(kl or 0)), base)


def _beta_of_optimum(procedure: CalibratedProcedure, base: CalibratedProcedure | None, kl: float) -> float:
    """Secant steps on log KL against log beta, between betas known to be too small and too large."""
    if not (isfinite(kl) and kl > 0):
        raise ValueError(f"kl must be finite and > 0, got kl={kl!r}.")
    excess = partial(_excess_kl, procedure, base, kl)
    low, high, x, step = log(SMALLEST_BETA), log(LARGEST_BETA), log(0.3), -1.0
    value = excess(x)
    if value < 0:
        _check_reach(procedure, base, kl)
    for _ in range(80):
        low, high = (x, high) if value > 0 else (low, x)
        if abs(value) < 1e-12:
            return exp(x)
        if high - low < 1e-9:
            break
        ahead = x + min(max(step, -3.0), 3.0)
        ahead = ahead if low < ahead < high else (low + high) / 2
        moved = excess(ahead)
        step = -moved * (ahead - x) / (moved - value) if moved != value else 0.0
        x, value = ahead, moved
    raise ValueError(
        f"The optimum for {procedure!r} has no kl={kl!r}: its KL jumps over it; the nearest that was found is "
        f"{kl * exp(value):.3g}. An exponential transform, as tune() finds, reaches it."
    )


def _check_reach(procedure: CalibratedProcedure, base: CalibratedProcedure | None, kl: float) -> None:
    """ValueError if even the smallest beta leaves the optimum at a smaller KL: at once, and not after a long search."""
    try:
        law = Optimal(procedure, SMALLEST_BETA, base).law
    except ArithmeticError:  # not known, so searched for
        return
    most = kl_of(law)
    if most < kl:
        rate = win_rate_of(law, procedure, base)
        raise ValueError(
            f"The optimum for {procedure!r} has a KL of {most:.3g} at most, and wins {rate:.6g} there, got kl={kl!r}: "
            "more gains nothing. Ask for less, or use an exponential transform, as tune() finds."
        )


def _excess_kl(procedure: CalibratedProcedure, base: CalibratedProcedure | None, kl: float, log_beta: float) -> float:
    return log(max(kl_of(Optimal(procedure, exp(log_beta), base).law), 1e-300) / kl)


def optimum(
    procedure: CalibratedProcedure,
    *,
    beta: float | None = None,
    kl: float | None = None,
    base: CalibratedProcedure | None = None,
) -> Choice:
    """The optimal transform, ready to train with: no other policy does better at win rate - beta KL.

    `beta` is the price of KL in that objective (Def. 5), where a win rate counts as it is; the Choice carries another,
    the one to train the transform with now that it is scaled to [0, 1].
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

    if not (isfinite(kl) and kl > 0):
        raise ValueError(f"kl must be finite and > 0, got kl={kl!r}.")
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
    try:
        beta = beta_for_kl(transform, kl)
    except ValueError:  # too far from the reference for this t
        return inf
    return -win_rate(transform, beta, procedure, base)
