"""Scaling: closed-form moments against quadrature of another kind, and what each scale promises."""

import math
from dataclasses import dataclass
from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given
from scipy.integrate import quad
from strategies import bounded, transforms

from calibrated_rewards.theory.scale import moments, scaled, span
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Tabulated,
    Transform,
)


@dataclass(frozen=True)
class Opaque:
    """A transform of unknown kind."""

    inner: Transform

    def __call__(self, u):
        """Phi(u)."""
        return self.inner(u)


def integrate(function, points=()):
    """Adaptive Gauss-Kronrod on [0, 1]: not the panels that the library uses."""
    return quad(function, 0, 1, points=list(points) or None, epsabs=1e-13, epsrel=1e-13, limit=500)[0]


@pytest.mark.parametrize(
    "transform",
    [
        Identity(), Log(), Power(0.5), Power(4.0), Exponential(1e-6), Exponential(0.9), Exponential(1.1),
        Exponential(30.0), Exponential(-0.3), Exponential(-30.0), Chain(Power(2.0), Exponential(3.0)),
        Chain(Log(), Affine(2.0, 5.0)), Affine(3.0, -1.0), Tabulated([0, 0.3, 0.31, 1], [0, 0.1, 2, 3]),
    ],
    ids=repr,
)  # fmt: skip
def test_moments_against_gauss_kronrod(transform):
    """Mean and standard deviation under u ~ Unif[0, 1]."""
    points = transform.u[1:-1] if isinstance(transform, Tabulated) else ()
    mean = integrate(transform, points)
    spread = math.sqrt(integrate(lambda u: (transform(u) - mean) ** 2, points))

    assert moments(transform) == pytest.approx((mean, spread), rel=2e-8)


def test_moments_of_the_normal_quantile_and_of_steep_exponentials():
    """N(0, 1) by definition; at t = 600, where e^{2t} overflows, 1/(2t) of e^{2t} is the second moment."""
    mean, spread = moments(Exponential(600.0))

    assert moments(NormalQuantile()) == (0.0, 1.0)
    assert math.log(mean) == pytest.approx(600 - math.log(600), abs=1e-12)
    assert math.log(spread) == pytest.approx(600 + 0.5 * math.log(1 / 1200 - 1 / 600**2), abs=1e-12)


@given(bounded)
def test_unit_scale_is_the_range_zero_to_one(transform):
    """Bounded transforms map onto [0, 1], a second scaling changes nothing, the order of policies is kept."""
    unit = scaled(transform, "unit")

    assert span(unit) == pytest.approx((0.0, 1.0), abs=1e-12)
    assert span(scaled(unit, "unit")) == pytest.approx((0.0, 1.0), abs=1e-12)
    low, high = span(transform)
    u = np.linspace(0, 1, 11)
    assert unit(u) * (high - low) + low == pytest.approx(np.asarray(transform(u)), rel=1e-9, abs=1e-9)


def test_unit_scale_leaves_the_identity_and_the_unbounded_as_they_are():
    """The contract: Identity is unchanged to the bit, and Log stays Log."""
    assert scaled(Identity(), "unit") is not None
    assert scaled(Identity(), "unit") == Identity()
    assert scaled(Log(), "unit") == Log()
    assert scaled(NormalQuantile(), "unit") == NormalQuantile()
    assert scaled(Exponential(3.0), "raw") == Exponential(3.0)


@given(transforms)
def test_standard_scale_has_mean_zero_and_variance_one(transform):
    """By quadrature: a wrapper hides what transform it is, so that no closed form is used."""
    assert moments(Opaque(scaled(transform, "standard"))) == pytest.approx((0.0, 1.0), abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unwrap(scaled)(Identity(), "units"), 'must be "unit", "standard" or "raw", got scale=\'units\''),
        (lambda: scaled(Tabulated([0, 1], [1, 1]), "unit"), "must rise from u = 0 to u = 1"),
    ],
)
def test_refusals(call, message):
    """An unknown scale, and a constant transform, which would divide by zero."""
    with pytest.raises(ValueError, match=message):
        call()
