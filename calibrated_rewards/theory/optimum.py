"""The transform to train with for a procedure: the optimum (Corollary 2), or the best exponential at a KL (Eq. 11).

>>> from calibrated_rewards.theory.procedures import BestOf
>>> best, tuned = optimum(BestOf(4), kl=1.0), tune(BestOf(4), kl=1.0)
>>> print(f"{best.win_rate:.4f} {tuned.win_rate:.4f} {tuned.transform.parts[0].t:.1f}")
0.9411 0.9399 17.3

For calibrated procedures the win rate's derivative with respect to the policy's density at u is, up to a constant,
Phi(u) = -int_u^1 g_policy(F(v)) g_base(v) dv, and the optimum has f ~ e^{Phi/beta} with this very Phi:

    beta f'/f = g_policy(F(u)) g_base(u),    F(0) = 0,  F(1) = 1

which is beta f'/f = N^2 F^{N-1} u^{N-1} for best-of-N. We shoot backwards from u = 1 on log f(1) until F(0) = 0, and
polish the result to rounding error. Where g_policy rises, as for best-of-N, the win rate is concave in the policy and
there is one solution; else there may be several, and we take the best of them. The paper iterates Phi -> f -> Phi;
undamped, that ends in a cycle of two functions in nearly every best-of-N case. `Optimal.iterate` shows it and, damped,
is our cross-check.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import asinh, exp, expm1, inf, isfinite, log, log1p, sinh
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from calibrated_rewards.theory.procedures import CalibratedProcedure, Procedure, Rank
from calibrated_rewards.theory.quadrature import WINDOW, Array, Grid, Law, normalised, reference_law
from calibrated_rewards.theory.scale import scaled, span
from calibrated_rewards.theory.shared_results import share_results
from calibrated_rewards.theory.tilted_policy import beta_for_kl, kl_of, win_rate, win_rate_of
from calibrated_rewards.theory.transforms import Exponential, Identity, Transform, Values

SMALLEST_BETA, LARGEST_BETA = 1e-4, 1e6
LARGEST_T = 600.0
# The shots go from this logit to minus it, in steps of this at most.
TOP, LARGEST_STEP = 45.0, 1.5


@dataclass(frozen=True)
class Iteration:
    """The paper's fixed-point iteration after some rounds: Phi at the quantiles u, and how far each round moved it."""

    u: Array
    values: Array
    changes: Array


@dataclass(frozen=True)
class Optimal:
    """The transform that maximises win rate - beta KL (Def. 5) for calibrated procedures; Phi(1) = 0.

    It holds a question in three small fields; the curve is solved for when first needed, once for all equal objects.

    >>> from calibrated_rewards.theory.procedures import Standard
    >>> Optimal(Standard(), beta=0.1)([0.0, 0.5, 1.0]).round(6)  # Corollary 1: the identity
    array([-1. , -0.5,  0. ])
    """

    procedure: CalibratedProcedure
    beta: float
    base: CalibratedProcedure | None = None

    def __post_init__(self) -> None:
        for side in (self.procedure, self.base or self.procedure):
            if not isinstance(side, CalibratedProcedure):
                raise ValueError(
                    "Optimal needs calibrated procedures (Standard, BestOf, BestOfUpTo, WorstOf, Calibrated); "
                    f"tune() takes any, got {side!r}."
                )
        if not (isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be finite and > 0, got beta={self.beta!r}.")

    def __getstate__(self) -> dict[str, object]:
        return {"procedure": self.procedure, "beta": self.beta, "base": self.base}

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return Phi(u), which is 0 at u = 1 and negative below."""
        u = np.asarray(u, np.float64)
        if not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"Optimal is defined for u in [0, 1], got {u[~((u >= 0) & (u <= 1))].ravel()[0]}.")
        with np.errstate(divide="ignore"):
            return self.at_logit(logit(u))

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return Phi at the logits s, where Phi(1) = 0."""
        s = np.asarray(s, np.float64)
        grid, curve = self._solved
        return np.asarray(self.beta * grid.interpolate(curve, s.ravel())).reshape(s.shape)[()]

    @property
    def law(self) -> Law:
        """The law of u under the optimal policy, f ~ e^{Phi/beta}."""
        return normalised(*self._solved)

    @property
    def residuals(self) -> tuple[float, float]:
        """The largest misses of the fixed point, over Phi's range, and of the ODE, over its largest logit slope."""
        grid, curve = self._solved
        image, slope = self._step(grid, curve)
        fixed_point = np.abs(image - curve).max() / np.abs(curve).max()
        return float(fixed_point), float(np.abs(grid.derivative(curve) - slope).max() / slope.max())

    def iterate(self, rounds: int, damping: float = 0.1) -> Iteration:
        """Iterate Phi <- (1 - damping) Phi + damping step(Phi) from Phi = 0, as the paper does with damping = 1.

        `changes` are the largest differences between Phi and its image, over the range of the image.
        """
        grid = Grid(np.linspace(-45.0, 45.0, 241))
        curve, changes = np.zeros_like(grid.s), []
        for _ in range(rounds):
            image, _ = self._step(grid, curve)
            changes.append(np.abs(image - curve).max() / np.abs(image).max())
            curve = (1 - damping) * curve + damping * image
        return Iteration(grid.u, self.beta * curve, np.array(changes))

    @cached_property
    @share_results
    def _solved(self) -> tuple[Grid, Array]:
        """Phi/beta on a grid that resolves it: the best of the stationary points that could be solved for."""
        solutions = []
        for start in self._starts():
            with suppress(ArithmeticError):
                solutions.append(self._solve_from(start))
        if not solutions:
            raise ArithmeticError(
                f"{self!r} was not solved to 1e-9: beta is too small, or g too rough. tune() needs no such solution."
            )
        best = max(solutions, key=self._objective)
        self._check_best(self._objective(best))
        return best

    def _check_best(self, objective: float) -> None:
        """Refuse a solution that the reference, or one of a few exponential transforms, does better than."""
        least = max(self._value(law) for law in self._rivals())
        if not objective >= least - 1e-5 * (not self._rises) - 1e-9:
            raise ArithmeticError(
                f"{self!r} was solved to a win rate - beta KL of {objective:.6g}, below {least:.6g}, which the "
                "reference or an exponential has: its best stationary point was not found. tune() needs none."
            )

    def _rivals(self) -> Iterator[Law]:
        """Yield laws to beat: the reference; if the stationary point need not be the optimum, exponentials' too."""
        grid = Grid(np.linspace(-45.0, 45.0, 181))
        yield reference_law(grid)
        if not self._rises:
            for t in (-100.0, -20.0, -5.0, -1.0, 1.0, 5.0, 20.0, 100.0):
                unit = np.asarray(Exponential(t)(grid.u)) / abs(expm1(t))
                yield from (normalised(grid, unit / beta) for beta in (0.03, 0.3))

    def _solve_from(self, start: float) -> tuple[Grid, Array]:
        """Shoot from log f(1) = start on panels fine enough for it, and polish by Newton's method."""
        grid = Grid(WINDOW)
        for _ in range(40):
            curve = self._shoot(start, grid.s[::-1])[::-1, 0] - start
            law = normalised(grid, curve)
            coarse = grid.unresolved(law.per_logit, 1e-12) | grid.unresolved(self._step(grid, curve)[1], 1e-12)
            coarse &= grid.widths > 1e-6
            if not coarse.any():
                break
            grid = grid.split(coarse)
        return grid, self._polish(grid, curve)

    def _objective(self, solution: tuple[Grid, Array]) -> float:
        return self._value(normalised(*solution))

    def _value(self, law: Law) -> float:
        """Return the objective, win rate - beta KL."""
        return win_rate_of(law, self.procedure, self.base) - self.beta * kl_of(law)

    def _rate(self, rank: Rank, below_one: Rank, u: Rank, v: Rank) -> Rank:
        """Return the slope d log f / du of the log density."""
        base = self.base or self.procedure
        return self.procedure.density(rank, below_one) * base.density(u, v) / self.beta

    def _slope_at(self, state: Array, s: float) -> tuple[float, float]:
        """Return the derivatives of (log f, 1 - F) by the logit s of u; a shot far past F = 0 goes straight on."""
        log_density, below_one = state.tolist()
        u, v = float(expit(s)), float(expit(-s))
        growth = -exp(min(log_density, 700.0)) * u * v
        if below_one > 1.5:
            return 0.0, growth
        below_one = min(max(below_one, 0.0), 1.0)
        return self._rate(1 - below_one, below_one, u, v) * u * v, growth

    def _shoot(self, start: float, s: Array, tolerance: float = 1e-9) -> Array:
        """Return (log f, 1 - F) at descending logits from log f(1) = start; LARGEST_STEP steps over no layer.

        Whatever acts at a distance of 1/N from an end has a width of about 1 in the logit, however large N is.
        """
        from scipy.integrate import odeint

        first = [start, exp(start) * float(expit(-TOP))]
        limits: Any = {"rtol": tolerance, "atol": tolerance / 1000, "mxstep": 20000, "hmax": LARGEST_STEP}
        return np.asarray(odeint(self._slope_at, first, np.concatenate([[TOP], s]), **limits)[1:])

    def _miss(self, start: float, tolerance: float = 1e-9) -> float:
        """Return F(0) when log f(1) = start."""
        return float(1 - self._shoot(start, np.array([-30.0]), tolerance)[-1, 1])

    @property
    def _rises(self) -> bool:
        """True if g_policy rises: the win rate is then concave in the policy, with one stationary point."""
        u = np.linspace(0.0, 1.0, 1025)
        return bool((np.diff(self.procedure.density(u, 1 - u)) >= 0).all())

    def _starts(self) -> list[float]:
        """Find every log f(1) that leads to F(0) = 0."""
        u = np.linspace(0.0, 1.0, 1025)
        # df/dF <= max(g_base) g_policy(F) / beta, and f(0) <= 1 because f rises: f(1) <= 1 + max(g_base) / beta.
        largest = float((self.base or self.procedure).density(u, 1 - u).max())
        top = log1p(1.01 * largest / self.beta) + 1e-6
        ends = (
            np.array([0.0, top])
            if self._rises
            else np.concatenate([[0.0], np.geomspace(1e-9 * top, top / 60, 20)[:-1], np.linspace(top / 60, top, 60)])
        )
        # From log f(1) = 0, F(0) is at least 0; so little above it, sometimes, that only the sign is known.
        above = [True, *(self._miss(end, 1e-7) > 0 for end in ends[1:].tolist())]
        crossed = [
            pair for pair, signs in zip(pairwise(ends.tolist()), pairwise(above), strict=True) if signs[0] != signs[1]
        ]
        return [self._crossing(*pair) for pair in crossed]

    def _crossing(self, low: float, high: float) -> float:
        from scipy.optimize import brentq

        if self._miss(low) * self._miss(high) >= 0:
            return low
        return float(brentq(self._miss, low, high, xtol=1e-14, rtol=1e-14))

    def _step(self, grid: Grid, curve: Array) -> tuple[Array, Array]:
        """One round of the paper's iteration: Phi/beta -> F -> Phi/beta; and the slope of the result in the logit."""
        law = normalised(grid, curve)
        slope = self._rate(law.cdf, law.survival, grid.u, np.asarray(expit(-grid.s))) * np.exp(grid.log_slope)
        return -grid.running(slope)[1], slope

    def _polish(self, grid: Grid, curve: Array) -> Array:
        """Newton's method on Phi = step(Phi). The step's derivative is compact, so GMRES needs a few dozen products."""
        from scipy.sparse.linalg import LinearOperator, gmres

        for _ in range(20):
            miss = self._step(grid, curve)[0] - curve
            if np.abs(miss).max() <= 1e-13 * np.abs(curve).max():
                break
            product = partial(self._derivative, grid, curve)
            operator = LinearOperator((len(curve), len(curve)), matvec=product, dtype=np.float64)
            curve = self._advanced(grid, curve, gmres(operator, miss, rtol=1e-6, restart=80, maxiter=1)[0])
        miss = self._step(grid, curve)[0] - curve
        if not np.abs(miss).max() <= 1e-9 * np.abs(curve).max():
            raise ArithmeticError("Newton's method did not converge to 1e-9.")
        return curve

    def _advanced(self, grid: Grid, curve: Array, step: Array) -> Array:
        """The curve a Newton step further, or half of it, or a quarter ... until it misses by less."""
        before = np.abs(self._step(grid, curve)[0] - curve).max()
        for halvings in range(12):
            ahead: Array = curve + step * 0.5**halvings
            if np.abs(self._step(grid, ahead)[0] - ahead).max() < before:
                return ahead
        return curve

    def _derivative(self, grid: Grid, curve: Array, direction: Array) -> Array:
        """Return (I - step') direction, by a central difference."""
        size = float(np.abs(direction).max())
        if size == 0:
            return direction
        h = 1e-6 / size
        ahead, behind = (self._step(grid, curve + sign * h * direction)[0] for sign in (1, -1))
        return np.asarray(direction - (ahead - behind) / (2 * h))


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
    """Return the Phi of Corollary 2 at the beta of Def. 5, or at the beta where its policy has the given KL.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> print(f"{optimal_transform(BestOf(4), kl=1.0).beta:.4f}")
    0.0830
    """
    if (beta is None) == (kl is None):
        raise ValueError(f"optimal_transform needs either beta or kl, got beta={beta!r}, kl={kl!r}.")
    if beta is not None:
        return Optimal(procedure, float(beta), base)
    return Optimal(procedure, _beta_of_optimum(procedure, base, float(kl or 0)), base)


@share_results
def _beta_of_optimum(procedure: CalibratedProcedure, base: CalibratedProcedure | None, kl: float) -> float:
    """Find the beta for a KL by secant steps on log KL against log beta, kept within betas that bracket it."""
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
    """Raise ValueError if even the smallest beta leaves the optimum at a smaller KL, before a long search."""
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
    """Return the optimal transform ready to train with: no other policy does better at win rate - beta KL.

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
    """Return the best exponential transform (Eq. 11) for a procedure at a KL; the identity where t would be 0."""
    from scipy.optimize import minimize_scalar

    if not (isfinite(kl) and kl > 0):
        raise ValueError(f"kl must be finite and > 0, got kl={kl!r}.")
    loss = partial(_loss, procedure, base, kl)
    trials = np.linspace(-asinh(LARGEST_T), asinh(LARGEST_T), 27)
    best = int(np.argmin([loss(x) for x in trials.tolist()]))
    around = trials[max(best - 1, 0)], trials[min(best + 1, len(trials) - 1)]
    nearest = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-7})
    chosen = _exponential(float(nearest.x))
    return Choice(chosen, beta_for_kl(chosen, kl), kl, -float(nearest.fun))


def _exponential(x: float) -> Transform:
    """Return e^{tu} on [0, 1] with t = sinh x: a family that passes smoothly through the identity at x = 0."""
    return Identity() if abs(x) < 1e-6 else scaled(Exponential(sinh(x)), "unit")


def _loss(procedure: Procedure, base: Procedure | None, kl: float, x: float) -> float:
    transform = _exponential(x)
    try:
        beta = beta_for_kl(transform, kl)
    except ValueError:  # too far from the reference for this t
        return inf
    return -win_rate(transform, beta, procedure, base)
