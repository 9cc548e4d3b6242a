"""Win rates and KL of the policy that is optimal for a transform, known before any training (Thms 2-4).

For a continuous model the policy that maximises E[Phi(C)] - beta KL has, whatever the prompt, the reward model and the
reference, the density f(u) ~ e^{Phi(u)/beta} over the calibrated reward u. Everything here is an integral over that.

beta means something only together with the scale of Phi, which `transforms.scaled` fixes. Functions here take Phi and
beta as they are given.

>>> from calibrated_rewards.theory.procedures import BestOf
>>> from calibrated_rewards.theory.transforms import Exponential, Identity
>>> for transform in Identity(), Exponential(10.0):
...     beta = beta_for_kl(transform, 0.5)
...     print(f"{win_rate(transform, beta, BestOf(4)):.4f}")
0.7998
0.8715
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, inf, log, nan

import numpy as np
import numpy.typing as npt

from calibrated_rewards.theory.procedures import Procedure, RewindAndRepeat
from calibrated_rewards.theory.quadrature import Array, Law, reference_law, resolve
from calibrated_rewards.theory.transforms import Transform, at_logit, knots


def _log_weight(transform: Transform, beta: float, s: Array) -> Array:
    return np.asarray(at_logit(transform, s), np.float64) / beta if beta < inf else np.zeros_like(s)


def policy_law(transform: Transform, beta: float, *procedures: Procedure, breaks: Iterable[float] = ()) -> Law:
    """Return the law of u under the optimal policy, on panels fine enough for it and for the procedures' outputs.

    beta = infinity stands for the reference itself.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got beta={beta!r}.")
    bends = [*breaks, *knots(transform), *(jump for procedure in procedures for jump in procedure.breaks)]
    watch = partial(_outputs, procedures) if procedures else None
    return resolve(partial(_log_weight, transform, beta), bends, watch=watch)


def _outputs(procedures: Sequence[Procedure], law: Law) -> Array:
    """Sum the outputs' densities in the logit: whatever one of them leaves unresolved shows in the sum."""
    return law.per_logit * sum(procedure.tilt(law) for procedure in procedures)


def kl(transform: Transform, beta: float) -> float:
    """Return KL(pi || pi_ref) of the optimal policy (Eq. 10).

    >>> from calibrated_rewards.theory.transforms import Exponential
    >>> round(kl(Exponential(10.0), 22025.0 * 0.05), 1)
    4.2
    """
    return kl_of(policy_law(transform, beta))


def kl_of(law: Law) -> float:
    """Return the KL of a law from the reference, as a sum of terms >= 0: no cancellation at large beta."""
    terms = law.mass * law.log_density - reference_law(law.grid).mass * np.expm1(np.minimum(law.log_density, 700.0))
    return float(terms.sum()) if law.log_density.max() < 700.0 else float(law.mass @ law.log_density)


def win_rate(transform: Transform, beta: float, procedure: Procedure, base: Procedure | None = None) -> float:
    """Return the inference-time win rate of the optimal policy over the reference (Eqs. 8 and 9, Thm 4).

    `procedure` is how the policy is decoded and `base` how the reference is; the same, unless given.
    """
    base = procedure if base is None else base
    return win_rate_of(policy_law(transform, beta, procedure, *_uneven(base)), procedure, base)


def _uneven(base: Procedure) -> list[Procedure]:
    # The reference's own output is smooth on the logit's window but for its jumps, which need panel edges.
    return [base] if base.breaks else []


def win_rate_of(law: Law, procedure: Procedure, base: Procedure | None = None) -> float:
    """Return P(u > u') for u from the procedure on `law` and u' from the base procedure on the reference."""
    uniform = reference_law(law.grid)
    against = (base or procedure).tilt(uniform) * uniform.per_logit
    beaten, _ = law.grid.running(against)
    output = law.mass * procedure.tilt(law)
    return min(1.0, float(output @ beaten / (output.sum() * (law.grid.weights @ against))))


def mean_tries(transform: Transform, beta: float, procedure: RewindAndRepeat) -> float:
    """Return the mean number of draws that rewind-and-repeat makes from the optimal policy (App. G).

    >>> from calibrated_rewards.theory.transforms import Identity
    >>> round(mean_tries(Identity(), 1e9, RewindAndRepeat(threshold=0.85, max_tries=1000)), 3)  # the reference: 1/.15
    6.667
    """
    return procedure.mean_tries(policy_law(transform, beta, procedure))


def bin_masses(transform: Transform, beta: float, procedure: Procedure, bins: int) -> Array:
    """Return the mass that the procedure on the optimal policy puts on each of `bins` equal bins of u.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> from calibrated_rewards.theory.transforms import Identity
    >>> bin_masses(Identity(), inf, BestOf(2), 4)  # the reference's own best of two
    array([0.0625, 0.1875, 0.3125, 0.4375])
    """
    if bins < 1:
        raise ValueError(f"bin_masses needs bins >= 1, got bins={bins!r}.")
    edges = np.arange(1, bins) / bins
    law = policy_law(transform, beta, procedure, breaks=edges)
    output = law.mass * procedure.tilt(law)
    return np.asarray(np.bincount(np.searchsorted(edges, law.u), output, bins) / output.sum())


def kl_range(transform: Transform) -> tuple[float, float]:
    """Return the range of KL that beta can reach: 0, and minus the log of the share of u at Phi's maximum.

    A plain function is known at floats alone, the last of which before 1 leaves a share of e^-36.7.

    >>> from calibrated_rewards.theory.transforms import Tabulated
    >>> kl_range(Tabulated([0.0, 0.75, 1.0], [0.0, 1.0, 1.0]))  # flat over the top quarter
    (0.0, 1.386294361119...)
    """
    low, high = -700.0, 700.0
    top = at_logit(transform, np.array(high))
    if at_logit(transform, np.array(low)) >= top:
        return 0.0, 0.0
    while high - low > 1e-13 * max(1.0, abs(high)):
        middle = (low + high) / 2
        low, high = (low, middle) if at_logit(transform, np.array(middle)) >= top else (middle, high)
    return 0.0, float(np.logaddexp(0.0, high)) if high < 700.0 else inf


def beta_for_kl(transform: Transform, kl: float) -> float:
    """Solve for the beta at which the optimal policy's KL is `kl`: KL falls strictly as beta rises.

    >>> from calibrated_rewards.theory.transforms import NormalQuantile
    >>> beta_for_kl(NormalQuantile(), 0.5)  # its KL is 1 / (2 beta^2)
    1.0
    """
    _, most = kl_range(transform)
    beta = exp(_solve_log_beta(transform, kl)) if 0 < kl < most else nan
    if not (beta > 0 and abs(kl_of(policy_law(transform, beta)) - kl) < 1e-6 * kl):
        raise ValueError(
            f"{transform!r} reaches a KL between 0 and {min(most, 690.0):.6g} with a beta that floats can hold, "
            f"got kl={kl!r}."
        )
    return beta


def _solve_log_beta(transform: Transform, target: float) -> float:
    """Newton on log KL against log beta, kept between the betas already seen to be too small and too large."""
    low, high, x = -700.0, 700.0, 0.0
    for _ in range(200):
        law = policy_law(transform, exp(x))
        value = max(kl_of(law), 1e-300)
        # dKL / d log(beta) = -Var(Phi / beta) under the policy.
        spread = np.maximum(law.log_density - law.mass @ law.log_density, -1e100)
        step = value * log(value / target) / max(float(law.mass @ spread**2), 1e-300)
        if abs(step) <= 1e-14 * max(1.0, abs(x)):
            break
        low, high = (x, high) if value > target else (low, x)
        guess = x + float(np.clip(step, -10.0, 10.0))
        x = guess if low < guess < high else (low + high) / 2
        if high - low <= 1e-15 * max(1.0, abs(x)):
            break
    return x


@dataclass(frozen=True)
class Frontier:
    """Win rate against KL of one transform over a grid of beta: one row of `win_rates` for each procedure."""

    transform: Transform
    procedures: tuple[Procedure, ...]
    betas: Array
    kl: Array
    win_rates: Array


def frontier(
    transform: Transform, procedures: Sequence[Procedure], betas: npt.ArrayLike, base: Procedure | None = None
) -> Frontier:
    """Compute the whole alignment curve (Figs. 2 and 11): KL and each procedure's win rate at every beta."""
    grid = np.atleast_1d(np.asarray(betas, np.float64))
    watched = [*procedures, *_uneven(base or procedures[0])]
    laws = [policy_law(transform, beta, *watched) for beta in grid.tolist()]
    rates = [[win_rate_of(law, procedure, base) for law in laws] for procedure in procedures]
    return Frontier(transform, tuple(procedures), grid, np.array([kl_of(law) for law in laws]), np.array(rates))
