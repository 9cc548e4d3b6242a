"""Panels in the logit: integrals, running integrals, interpolation, and refinement where it is needed."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from scipy.special import expit, log_expit

from calibrated_rewards.theory.quadrature import Grid, normalised, reference_law, resolve

FLAT = resolve(np.zeros_like)


def log_beta_weight(a, b, s):
    """Beta(a, b) against the uniform law, in the logit."""
    return (a - 1) * log_expit(s) + (b - 1) * log_expit(-s)


@given(st.floats(1.0, 200.0), st.floats(1.0, 200.0))
def test_a_beta_law_agrees_with_scipy(a, b):
    """Density, CDF, survival function and KL of Beta(a, b), whose logit density spans many scales."""
    law = resolve(partial(log_beta_weight, a, b))
    beta = stats.beta(a, b)

    assert law.mass.sum() == pytest.approx(1, abs=1e-13)
    assert law.cdf == pytest.approx(beta.cdf(law.u), abs=1e-12)
    # From the other end, and relatively: scipy's own tail of 1 - u, by symmetry.
    inside = law.survival > 1e-250
    assert law.survival[inside] == pytest.approx(stats.beta(b, a).cdf(expit(-law.grid.s[inside])), rel=1e-7)
    assert law.mass @ law.log_density == pytest.approx(-beta.entropy(), abs=1e-10)


@given(st.floats(0.0, 6.0), st.floats(0.0, 6.0))
def test_moments_of_the_reference_law(p, q):
    """int u^p (1-u)^q du is a beta function, for powers that vanish at the ends."""
    from scipy.special import beta

    law = reference_law(FLAT.grid)

    assert law.mass @ (law.u**p * expit(-law.grid.s) ** q) == pytest.approx(beta(p + 1, q + 1), rel=1e-12)


def test_a_jump_is_found_without_being_announced():
    """A density of 1 below u = 1/3 and 5 above: bisection closes in on the jump."""
    law = resolve(lambda s: np.where(s < np.log(0.5), 0.0, np.log(5.0)))

    expected = 1 / 3 / (1 / 3 + 5 * 2 / 3)
    assert law.mass[law.u < 1 / 3].sum() == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.01, 0.99))
def test_a_jump_anywhere_is_found(threshold):
    """Also between a panel's edge and its first node, where no coefficient of either panel sees it."""
    law = resolve(lambda s: np.where(expit(s) < threshold, 0.0, 3.0))

    expected = threshold / (threshold + np.exp(3.0) * (1 - threshold))
    assert law.mass[law.u < threshold].sum() == pytest.approx(expected, abs=1e-8)


def test_what_has_no_integral_is_refused():
    """e^{-log(1 - u)} = 1/(1 - u), in logits and as floats."""
    with pytest.raises(ValueError, match="no finite integral"):
        resolve(lambda s: np.logaddexp(0, s))
    with pytest.raises(ValueError, match="no digits left after rounding"):
        resolve(lambda s: expit(s) * 1e12)


def test_a_narrow_interior_peak_is_found():
    """A Gaussian of width 0.02 in the logit, far narrower than a panel, is integrated to full precision."""
    law = resolve(lambda s: -0.5 * ((s - 0.3) / 0.02) ** 2 - log_expit(s) - log_expit(-s))

    assert law.mass @ law.grid.s == pytest.approx(0.3, abs=1e-11)
    assert np.sqrt(law.mass @ (law.grid.s - 0.3) ** 2) == pytest.approx(0.02, rel=1e-9)


def test_mass_far_outside_the_window_is_followed():
    """A weight that moves all mass to s = 1e5, where 1 - u is e^-100000."""
    law = resolve(lambda s: s - 0.5 * (s - 1e5) ** 2 / 100.0)

    assert law.mass @ law.grid.s == pytest.approx(1e5, rel=1e-9)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=8, unique_by=lambda x: round(x, 3)))
def test_running_integrals_and_derivatives_of_polynomials_are_exact(edges):
    """On any panels: d/ds and its inverse for s^3, and the two running integrals add up to the whole."""
    grid = Grid(np.sort(np.array(edges)))
    before, after = grid.running(3 * grid.s**2)
    low, high = grid.edges[0], grid.edges[-1]

    assert before == pytest.approx(grid.s**3 - low**3, rel=1e-9, abs=1e-8)
    assert after == pytest.approx(high**3 - grid.s**3, rel=1e-9, abs=1e-8)
    assert grid.derivative(grid.s**3) == pytest.approx(3 * grid.s**2, rel=1e-7, abs=1e-6)


def test_interpolation_and_its_constant_continuation():
    """Between the nodes to rounding error; outside the edges the value at the edge."""
    grid = Grid(np.linspace(-3.0, 3.0, 7))
    s = np.linspace(-3, 3, 101)

    assert grid.interpolate(np.sin(grid.s), s) == pytest.approx(np.sin(s), abs=1e-12)
    assert grid.interpolate(np.sin(grid.s), np.array([-9.0, 9.0])) == pytest.approx([np.sin(-3), np.sin(3)], abs=1e-12)


def test_normalised_survives_weights_that_overflow():
    """e^{1e6} and a shift of it are the same law."""
    grid = FLAT.grid
    low, high = normalised(grid, grid.u * 3), normalised(grid, grid.u * 3 + 1e6)

    assert high.log_density == pytest.approx(low.log_density, abs=1e-9)
