"""Transforms: values, precision near the ends, composition, refusals."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from scipy.interpolate import PchipInterpolator
from scipy.special import expit
from strategies import transforms

from calibrated_rewards.testing.suites import check_picklable, check_transform
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Tabulated,
    at_logit,
    knots,
)

NAMED = [Identity(), Log(), Exponential(5), Exponential(-10.0), NormalQuantile(), Power(3.0), Power(0.5), Affine(2, -1)]


@given(transforms)
def test_every_transform_passes_the_public_suite(transform):
    """Monotone, finite inside, batch = loop, at_logit = Phi + constant; and a pickle and repr round trip."""
    check_transform(transform)
    check_picklable(transform)


@given(transforms)
def test_repr_is_the_call_that_makes_it(transform):
    """eval(repr(x)) == x, so that a log line can be pasted back."""
    assert eval(repr(transform)) == transform


@pytest.mark.parametrize("u", [0.0, 1e-9, 0.25, 0.5, 0.9, 1.0])
def test_values_against_the_standard_library(u):
    """Each formula as the paper prints it, by math instead of numpy."""
    assert Identity()(u) == u
    assert Log()(u) == (math.log(u) if u else -math.inf)
    assert Exponential(7.0)(u) == pytest.approx(math.exp(7.0 * u), rel=1e-14)
    assert Exponential(-7.0)(u) == pytest.approx(-math.exp(-7.0 * u), rel=1e-14)
    assert NormalQuantile()(u) == pytest.approx(stats.norm.ppf(u), rel=1e-13)
    assert Power(2.5)(u) == pytest.approx(u**2.5, rel=1e-14)


@pytest.mark.parametrize("transform", NAMED, ids=repr)
@pytest.mark.parametrize("s", [-200.0, -40.0, -3.0, 0.0, 1.5, 20.0, 45.0, 200.0])
def test_at_logit_keeps_every_digit_near_the_ends(transform, s):
    """Phi(u) - Phi(1), or Phi(u) if Phi(1) is infinite, to 150 digits, though u itself rounds to 0 or 1."""
    with mpmath.workdps(150):
        u = 1 / (1 + mpmath.exp(-mpmath.mpf(s)))
        exact = {
            Identity: lambda u: u,
            Log: mpmath.log,
            Exponential: lambda u: math.copysign(1, transform.t) * mpmath.exp(transform.t * u),
            NormalQuantile: lambda u: mpmath.sqrt(2) * mpmath.erfinv(2 * u - 1),
            Power: lambda u: u ** mpmath.mpf(transform.p),
            Affine: lambda u: transform.scale * u + transform.shift,
        }[type(transform)]
        # The constant is Phi(1) where that is finite, and 0 otherwise.
        constant = exact(mpmath.mpf(1)) if type(transform) is not NormalQuantile else mpmath.mpf(0)
        expected = float(exact(u) - constant)

    assert float(transform.at_logit(s)) == pytest.approx(expected, rel=1e-11, abs=1e-300)


def test_a_plain_function_is_a_transform_too():
    """at_logit falls back on calling it at expit(s), less Phi(1) as for those that have at_logit."""
    s = np.array([-2.0, 0.0, 2.0])

    assert at_logit(np.square, s) == pytest.approx(expit(s) ** 2 - 1)


@pytest.mark.parametrize("s", [-30.0, -2.0, 0.0, 3.0, 30.0, 60.0])
def test_chains_keep_every_digit_near_one_too(s):
    """Exponential of a power of u, and affine of that, at 60 digits."""
    chain = Chain(Power(2.5), Exponential(9.0), Affine(0.5, 3.0))
    with mpmath.workdps(80):
        u = 1 / (1 + mpmath.exp(-mpmath.mpf(s)))
        expected = float((mpmath.exp(9 * u ** mpmath.mpf(2.5)) - mpmath.exp(9)) / 2)

    assert float(chain.at_logit(s)) == pytest.approx(expected, rel=1e-11)


@given(st.lists(st.just(0.0) | st.floats(1e-3, 3.0), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_tabulated_is_scipys_pchip(increments, u):
    """Same curve as scipy's own monotone interpolator, and no overshoot."""
    knot, value = np.linspace(0, 1, len(increments) + 1), np.concatenate([[0.0], np.cumsum(increments)])
    table = Tabulated(knot, value)

    assert float(table(u)) == pytest.approx(float(PchipInterpolator(knot, value)(u)), abs=1e-12)
    assert -1e-12 <= float(table(u)) <= value[-1] * (1 + 1e-12) + 1e-12


def test_tabulated_survives_a_file_to_the_last_bit(tmp_path):
    """save, load: equal, not close."""
    table = Tabulated(np.sort(np.r_[0.0, np.random.default_rng(0).random(20), 1.0]), np.arange(22) / 7)
    table.save(tmp_path / "phi.csv")

    assert Tabulated.load(tmp_path / "phi.csv") == table


@given(transforms, st.floats(0.1, 10.0), st.floats(-3.0, 3.0), st.floats(0.01, 0.99))
def test_chain_is_application_by_hand(transform, scale, shift, u):
    """Chain(f, g)(u) = g(f(u)), nested chains are flat, and a chain of one is that one."""
    by_hand = scale * float(np.asarray(transform(u))) + shift

    assert float(Chain(transform, Affine(scale, shift))(u)) == pytest.approx(by_hand, rel=1e-12, abs=1e-12)
    assert Chain(Chain(transform), Affine(scale, shift)) == Chain(transform, Affine(scale, shift))
    assert float(Chain(transform)(u)) == float(np.asarray(transform(u)))


def test_composed_values_are_the_known_functions():
    """e^{p log u} = u^p: two routes to one transform, and a chain's knots are those of its first part."""
    u = np.linspace(0, 1, 101)

    assert Chain(Log(), Exponential(3.0))(u) == pytest.approx(u**3, abs=1e-15)
    assert knots(Chain(Tabulated([0, 0.25, 1], [0, 1, 2]), Affine(3))) == (0.25,)
    assert knots(Identity()) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0.0), r"Exponential needs 1e-9 <= \|t\| <= 700, got t=0.0"),
        (lambda: Exponential(math.nan), "got t=nan"),
        (lambda: Exponential(701), "got t=701"),
        (lambda: Power(0.0), "Power needs a finite p > 0, got p=0.0"),
        (lambda: Power(math.inf), "got p=inf"),
        (lambda: Affine(-1.0), r"scale > 0 and a finite shift, got Affine\(scale=-1.0"),
        (lambda: Tabulated([0, 1], [1, 0]), r"non-decreasing values, got \[1.0, 0.0\]"),
        (lambda: Tabulated([0, 0.5], [0, 1]), "rise strictly from 0 to 1"),
        (lambda: Tabulated([0, 1, 1], [0, 1, 2]), "rise strictly from 0 to 1"),
        (lambda: Tabulated([0], [0]), "two or more knots"),
        (lambda: Tabulated([0, 1], [0, math.inf]), "finite, non-decreasing"),
        (Chain, "at least one transform"),
        (lambda: Chain(Affine(1.0, -2.0), Power(0.5)), "the next one is defined"),
    ],
)
def test_bad_parameters_are_named(make, message):
    """The error says which rule, and the value it got."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "bad", [lambda u: -np.asarray(u), lambda u: np.log(1 - np.asarray(u) + 1e-3), lambda u: 0 * np.asarray(u) + np.nan]
)
def test_the_public_suite_can_fail(bad):
    """check_transform refuses a falling function and one that is nan."""
    with pytest.raises(AssertionError):
        check_transform(bad)


class Shifted(Power):
    """A transform whose at_logit has another constant than Phi(1)."""

    def at_logit(self, s):
        """u^p, not less 1."""
        return super().at_logit(s) + 1


def test_the_constant_of_at_logit_is_checked():
    """A chain takes 1 - Phi(u) from at_logit, and would be wrong by the constant."""
    with pytest.raises(AssertionError, match=r"at_logit is not Phi\(u\) - Phi\(1\), which a Chain relies on"):
        check_transform(Shifted(2.0))
    assert "that constant is Phi(1)" in check_transform(Power(2.0)).checks


@pytest.mark.parametrize("part", [Tabulated([0, 0.5, 1], [0, 0.1, 0.5]), Tabulated([0, 1], [-1, -0.5])])
def test_a_part_without_at_logit_in_a_chain(part):
    """A transform after a rescaled table, which ends at 1: at logits as at quantiles."""
    chain = Chain(part, Affine(2.0, 0.0 if part.values[0] == 0 else 2.0), Exponential(3.0))
    s = np.linspace(-5, 5, 21)
    np.testing.assert_allclose(chain.at_logit(s), chain(expit(s)) - math.exp(3.0), rtol=1e-9)
    check_transform(chain)
