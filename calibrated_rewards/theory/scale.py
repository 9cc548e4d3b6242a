"""Scale of a transform: its range, its moments under the reference, and the transform mapped to a fixed scale.

Scale and shift of Phi are the unit in which beta is measured: they change no family of optimal policies, only which
beta gives which of them. Raw e^{10u} reaches 22026, and with the paper's beta of .01 to .09 its optimum is an argmax.
`scaled` makes beta comparable.

>>> scaled(Exponential(10.0), "unit")([0.0, 0.5, 1.0]).round(4)
array([0.    , 0.0067, 1.    ])
>>> scaled(Log(), "standard")
Chain(Log(), Affine(scale=1.0, shift=1.0))
"""

from functools import partial
from math import exp, expm1, inf, isfinite, sinh, sqrt
from typing import Literal, TypeAlias

import numpy as np

from calibrated_rewards.theory.quadrature import Array, Law, resolve
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Transform,
    at_logit,
    knots,
)

Scale: TypeAlias = Literal["unit", "standard", "raw"]
"""The name of a scale: the range onto [0, 1], variance 1 under the reference, or the transform as it is."""


def scaled(transform: Transform, scale: Scale) -> Transform:
    """Return the transform at a fixed scale.

    "unit" maps a bounded transform's range onto [0, 1] and leaves an unbounded one (Log, NormalQuantile) as it is;
    "standard" gives mean 0 and variance 1 under the reference; "raw" is Phi as printed.
    """
    match scale:
        case "raw":
            return transform
        case "unit":
            low, high = span(transform)
            return _affine(transform, 1 / (high - low), -low / (high - low)) if isfinite(high - low) else transform
        case "standard":
            mean, spread = moments(transform)
            if not 0 < spread < inf:
                raise ValueError(f"A transform needs a finite spread > 0 under the reference, got {transform!r}.")
            return _affine(transform, 1 / spread, -mean / spread)
    raise ValueError(f'scale must be "unit", "standard" or "raw", got scale={scale!r}.')


def _affine(transform: Transform, scale: float, shift: float) -> Transform:
    return transform if (scale, shift) == (1.0, 0.0) else Chain(transform, Affine(scale, shift))


def span(transform: Transform) -> tuple[float, float]:
    """Return Phi(0) and Phi(1); a constant transform, which rewards nothing, is refused.

    >>> span(Identity())
    (0.0, 1.0)
    """
    low, high = (float(x) for x in np.asarray(transform(np.array([0.0, 1.0]))))
    if not low < high:
        raise ValueError(f"A transform must rise from u = 0 to u = 1, got {transform!r} from {low!r} to {high!r}.")
    return low, high


def moments(transform: Transform) -> tuple[float, float]:
    """Return mean and standard deviation under the reference, u ~ Unif[0, 1]: in closed form, or by quadrature.

    >>> moments(Log())
    (-1.0, 1.0)
    """
    match transform:
        case Identity():
            return 0.5, sqrt(1 / 12)
        case Log():
            return -1.0, 1.0
        case NormalQuantile():
            return 0.0, 1.0
        case Power(p=p):
            return 1 / (p + 1), p / (p + 1) / sqrt(2 * p + 1)
        case Exponential(t=t):
            return _exponential_moments(t)
        case Chain(parts=(*head, Affine(scale=scale, shift=shift))) if head:
            mean, spread = moments(head[0] if len(head) == 1 else Chain(*head))
            return scale * mean + shift, scale * spread
        case Affine(scale=scale, shift=shift):
            return shift + scale / 2, scale * sqrt(1 / 12)
    return _integrated_moments(transform)


def _exponential_moments(t: float) -> tuple[float, float]:
    """Mean (e^t - 1)/|t|; variance e^t (sinh x / x) (cosh x - sinh x / x) with x = t/2, as a series where that cancels.

    Written with e^{-|x|} taken out of sinh and cosh, so that nothing overflows before the result does.
    """
    x = abs(t) / 2
    shrunk_sinh, shrunk_cosh = -expm1(-2 * x) / 2, (1 + exp(-2 * x)) / 2
    if x < 0.5:
        term, terms = 1.0, []
        for k in range(1, 12):
            term *= x * x / (2 * k * (2 * k + 1))
            terms.append(term * 2 * k)
        variance = exp(-2 * x) * sinh(x) / x * sum(terms)
    else:
        variance = shrunk_sinh / x * (shrunk_cosh - shrunk_sinh / x)
    top = exp(max(t, 0.0))
    mean = top * shrunk_sinh / x
    return (mean if t > 0 else -mean), top * sqrt(variance)


def _integrated_moments(transform: Transform) -> tuple[float, float]:
    law = resolve(np.zeros_like, knots(transform), watch=partial(_deviation, transform))
    above_median = _above_median(transform, law.grid.s)
    mean = float(law.mass @ above_median)
    return float(transform(0.5)) + mean, sqrt(float(law.mass @ (above_median - mean) ** 2))


def _above_median(transform: Transform, s: Array) -> Array:
    values = np.asarray(at_logit(transform, np.append(s, 0.0)), np.float64)
    return np.asarray(values[:-1] - values[-1])


def _deviation(transform: Transform, law: Law) -> Array:
    return np.abs(_above_median(transform, law.grid.s)) * law.per_logit
