"""Transforms: monotone maps Phi of a calibrated reward u in [0, 1] (sections 4.2 and 4.3 of the paper).

A transform is any callable `u -> value` that never falls. The ones here are frozen dataclasses: they compare, hash and
pickle by value, their repr is the call that makes them, and `Chain` composes them.

>>> Chain(Exponential(5.0), Affine(scale=2.0))
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))
>>> Exponential(-10.0)([0.0, 0.5, 1.0]).round(4)
array([-1.    , -0.0067, -0.    ])
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import copysign, exp, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, ndtri, ndtri_exp

from calibrated_rewards.theory.quadrature import Array

if TYPE_CHECKING:
    from scipy.interpolate import PPoly

Values: TypeAlias = Array | np.float64


@runtime_checkable
class Transform(Protocol):
    """A non-decreasing map of [0, 1]; finite inside, and infinite at most at u = 0 (downwards) or u = 1 (upwards).

    Flat parts are allowed. One that is flat everywhere rewards nothing: `scale.span`, and so training for it, refuses
    it. Raw scores outside [0, 1] are no arguments for it. Arrays come back as numpy's.
    """

    def __call__(self, u: npt.ArrayLike, /) -> Values:
        """Evaluate Phi(u), element by element."""


@runtime_checkable
class PreciseTransform(Transform, Protocol):
    """A transform that can also be evaluated where u differs from 0 or 1 by less than a float can show."""

    def at_logit(self, s: npt.ArrayLike, /) -> Values:
        """Evaluate Phi(u) - Phi(1) at u = 1 / (1 + e^-s) without cancellation; Phi(u) itself where Phi(1) is infinite.

        The constant counts: a `Chain` reads 1 - Phi(u) from a part with Phi(1) = 1. All other callers read differences.
        """


def at_logit(transform: Transform, s: npt.ArrayLike) -> Values:
    """Evaluate `transform.at_logit(s)`, for a transform without it from Phi at expit(s), kept off 0 and 1."""
    if isinstance(transform, PreciseTransform):
        return transform.at_logit(s)
    u = np.clip(expit(np.asarray(s, np.float64)), np.finfo(np.float64).tiny, 1 - 2.0**-53)
    return _below_one(transform, transform(u))


def _below_one(transform: Transform, values: Values) -> Values:
    """Return values of a transform less Phi(1), where that is finite."""
    with np.errstate(all="ignore"):
        end = transform(1.0)
    return values - end if isfinite(float(end)) else values


@dataclass(frozen=True)
class Identity:
    """Phi(u) = u: optimal for the standard win rate (Corollary 1, IPO)."""

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return u itself."""
        return np.asarray(u, np.float64)[()]

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return u - 1."""
        return -expit(-np.asarray(s, np.float64))


@dataclass(frozen=True)
class Log:
    """Phi(u) = log u: best-of-N distillation (BOND, vBoN). Minus infinity at 0; `finite_k` gives it a floor."""

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return log u."""
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(u, np.float64))

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return log u without forming u."""
        return log_expit(np.asarray(s, np.float64))


@dataclass(frozen=True)
class Exponential:
    """Phi_t(u) = sign(t) e^{tu} (Eq. 11): t > 0 stresses the top quantiles (best-of-N), t < 0 the bottom (worst-of-N).

    >>> Exponential(0.0)
    Traceback (most recent call last):
    ValueError: Exponential needs 1e-9 <= |t| <= 700, got t=0.0.
    """

    t: float

    def __post_init__(self) -> None:
        if not 1e-9 <= abs(self.t) <= 700:
            raise ValueError(f"Exponential needs 1e-9 <= |t| <= 700, got t={self.t!r}.")
        object.__setattr__(self, "t", float(self.t))

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return sign(t) e^{tu}."""
        return copysign(1.0, self.t) * np.exp(self.t * np.asarray(u, np.float64))

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return Phi(u) - Phi(1) = sign(t) e^t (e^{-t(1-u)} - 1)."""
        below_one = expit(-np.asarray(s, np.float64))
        return copysign(exp(self.t), self.t) * np.expm1(-self.t * below_one)


@dataclass(frozen=True)
class NormalQuantile:
    """Phi(u) = the standard normal quantile (one of QRPO's): makes the reference's rewards exactly N(0, 1)."""

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return the normal quantile of u, infinite at 0 and 1."""
        return ndtri(np.asarray(u, np.float64))

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return the normal quantile of expit(s), from the logarithm of the smaller tail."""
        s = np.asarray(s, np.float64)
        return np.asarray(-np.sign(s) * ndtri_exp(log_expit(-np.abs(s))), np.float64)[()]


@dataclass(frozen=True)
class Power:
    """Phi(u) = u^p with p > 0: the best of p + 1 draws has this density, up to a factor (Lemma 5)."""

    p: float

    def __post_init__(self) -> None:
        if not (isfinite(self.p) and self.p > 0):
            raise ValueError(f"Power needs a finite p > 0, got p={self.p!r}.")
        object.__setattr__(self, "p", float(self.p))

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return u^p."""
        return np.asarray(np.asarray(u, np.float64) ** self.p)[()]

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return u^p - 1."""
        return np.expm1(self.p * log_expit(np.asarray(s, np.float64)))


@dataclass(frozen=True)
class Affine:
    """x -> scale x + shift with scale > 0: changes the meaning of beta, never the family of optimal policies."""

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (isfinite(self.scale) and self.scale > 0 and isfinite(self.shift)):
            raise ValueError(f"Affine needs a finite scale > 0 and a finite shift, got {self!r}.")

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return scale u + shift."""
        return self.scale * np.asarray(u, np.float64) + self.shift

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Return scale (u - 1)."""
        return -self.scale * expit(-np.asarray(s, np.float64))


@dataclass(frozen=True, init=False)
class Tabulated:
    """A transform given at knots from u = 0 to u = 1, joined monotonically (PCHIP: no overshoot, continuous slope).

    >>> Tabulated([0.0, 0.5, 1.0], [0.0, 0.2, 1.0])([0.0, 0.5, 0.75])
    array([0.    , 0.2   , 0.5025])
    """

    u: tuple[float, ...]
    values: tuple[float, ...]

    def __init__(self, u: Iterable[float], values: Iterable[float]) -> None:
        knots, heights = np.array(list(u), np.float64), np.array(list(values), np.float64)
        if knots.ndim != 1 or len(knots) < 2 or knots.shape != heights.shape:
            raise ValueError(
                f"Tabulated needs two or more knots and as many values, got shapes {knots.shape}, {heights.shape}."
            )
        if not (knots[0] == 0 and knots[-1] == 1 and np.all(np.diff(knots) > 0)):
            raise ValueError(f"Tabulated needs knots that rise strictly from 0 to 1, got u={knots.tolist()!r:.80}.")
        if not (np.all(np.isfinite(heights)) and np.all(heights[1:] >= heights[:-1])):
            raise ValueError(f"Tabulated needs finite, non-decreasing values, got {heights.tolist()!r:.80}.")
        object.__setattr__(self, "u", tuple(knots.tolist()))
        object.__setattr__(self, "values", tuple(heights.tolist()))
        with np.errstate(all="ignore"):
            if not np.isfinite(self([0.0, *(knots[1:] + knots[:-1]) / 2, 1.0])).all():
                raise ValueError(f"Tabulated needs knots and values that floats can join, got u={self.u!r:.80}.")

    @cached_property
    def _curve(self) -> "PPoly":
        from scipy.interpolate import PchipInterpolator

        # Slopes of nearly flat cells overflow in its harmonic means, to the right limit of 0.
        with np.errstate(over="ignore", divide="ignore"):
            return PchipInterpolator(self.u, self.values)

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return the interpolated value."""
        u = np.asarray(u, np.float64)
        if not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"Tabulated is defined for u in [0, 1], got {u[~((u >= 0) & (u <= 1))].ravel()[0]}.")
        return np.asarray(self._curve(u), np.float64)[()]

    def save(self, path: str | Path) -> None:
        """Write the knots as two columns of text, `u,value`, to the last bit."""
        np.savetxt(path, np.column_stack([self.u, self.values]), fmt="%.17g", delimiter=",", header="u,value")

    @classmethod
    def load(cls, path: str | Path) -> "Tabulated":
        """Read two comma-separated columns of text: u and value."""
        columns = np.loadtxt(path, delimiter=",", ndmin=2)
        if columns.shape[1] != 2:
            raise ValueError(f"Tabulated.load needs two columns (u, value), got {columns.shape[1]} in {path}.")
        return cls(columns[:, 0], columns[:, 1])


@dataclass(frozen=True, init=False, repr=False)
class Chain:
    """Transforms applied one after the other, the first one to u: itself a transform.

    >>> Chain(Log(), Log())
    Traceback (most recent call last):
    ValueError: Chain needs the values of each part to lie where the next one is defined, got Chain(Log(), Log()).
    """

    parts: tuple[Transform, ...]

    def __init__(self, *parts: Transform) -> None:
        flat = [inner for part in parts for inner in (part.parts if isinstance(part, Chain) else (part,))]
        if not flat:
            raise ValueError("Chain needs at least one transform, got none.")
        object.__setattr__(self, "parts", tuple(flat))
        with np.errstate(invalid="ignore"):
            if np.isnan(self([0.0, 0.25, 0.5, 0.75, 1.0])).any():
                raise ValueError(
                    f"Chain needs the values of each part to lie where the next one is defined, got {self!r}."
                )

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.parts))})"

    def __call__(self, u: npt.ArrayLike) -> Values:
        """Return `parts[-1](... parts[0](u))`."""
        for part in self.parts:
            u = part(u)
        return np.asarray(u, np.float64)[()]

    def at_logit(self, s: npt.ArrayLike) -> Values:
        """Hand logits from part to part where a part maps onto quantiles, so that no precision near 1 is lost."""
        *head, last = self.parts
        if not head:
            return at_logit(last, s)
        before = head[0] if len(head) == 1 else Chain(*head)
        if isinstance(last, Affine):
            return last.scale * at_logit(before, s)
        quantile = np.asarray(before(expit(np.asarray(s, np.float64))))
        precise = all(isinstance(part, PreciseTransform) for part in head)
        if precise and isinstance(before, PreciseTransform) and before(0.0) >= 0 and before(1.0) == 1:
            with np.errstate(divide="ignore"):
                inner = np.log(quantile) - np.log(-np.asarray(before.at_logit(s)))
                # Where a float cannot hold the quantile, |s| > 700, its logit is as good as s.
                return at_logit(last, np.where(np.isfinite(inner), inner, s))
        return _below_one(self, last(quantile))


def knots(transform: Transform) -> tuple[float, ...]:
    """List the kinks of a transform strictly inside (0, 1), so that quadrature can put its panel edges there.

    >>> knots(Chain(Tabulated([0.0, 0.5, 1.0], [0.0, 0.2, 1.0]), Affine(2.0)))
    (0.5,)
    """
    match transform:
        case Tabulated(u=u):
            return u[1:-1]
        case Chain(parts=(first, *_)):
            return knots(first)  # those of later parts are found by bisection
        case _:
            return ()
