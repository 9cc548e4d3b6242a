"""One curve with tails, against numpy's quantiles, scipy's exponential and the definition of an inverse."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from calibrated_rewards.calibration.prediction.conditional import Curve, fit_curve

values = st.lists(st.floats(-100, 100).map(lambda x: round(x, 1)), min_size=3, max_size=30)
LEVELS = (np.arange(10) + 0.5) / 10


def of(sample: list[float]) -> Curve:
    return fit_curve(np.array(sample), np.ones(len(sample)), LEVELS)


@given(values)
def test_quantiles_are_numpys(sample: list[float]) -> None:
    """With equal weights the curve goes through Hazen's quantiles."""
    np.testing.assert_allclose(of(sample).values, np.quantile(sample, LEVELS, method="hazen"), atol=1e-9)


@given(values, st.lists(st.floats(-1000, 1000), min_size=2, max_size=20))
def test_the_cdf_is_one(sample: list[float], asked: list[float]) -> None:
    """It stays within [0, 1], never falls, and goes up from below all scores to above them."""
    u = of(sample).cdf(np.sort(asked))
    assert (u >= 0).all()
    assert (u <= 1).all()
    assert (np.diff(u) >= 0).all()
    low, high = of(sample).cdf(np.array([min(sample) - 1.0, max(sample) + 1.0]))
    assert low < high


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=20, unique_by=lambda x: round(x, 2)))
def test_the_inverse_is_one(sample: list[float]) -> None:
    """The cdf of a quantile is its level, in the tails too."""
    levels = np.array([1e-6, 0.01, 0.05, 0.31, 0.5, 0.95, 0.999, 1 - 1e-6])
    np.testing.assert_allclose(of(sample).cdf(of(sample).icdf(levels)), levels, atol=1e-6)


def test_ties_are_at_their_middle() -> None:
    """A value that takes a third of the sample in its middle has the quantile one half, and so on."""
    tied = fit_curve(np.repeat([0.0, 1.0, 2.0], 100), np.ones(300), (np.arange(300) + 0.5) / 300)
    np.testing.assert_allclose(tied.cdf(np.array([0.0, 1.0, 2.0])), [1 / 6, 1 / 2, 5 / 6], atol=0.005)


def test_weights_count() -> None:
    """A score of weight 3 is three scores."""
    rng = np.random.default_rng(0)
    sample, weights = rng.normal(size=4000), rng.integers(1, 4, 4000)
    heavy, many = (
        fit_curve(sample, weights.astype(float), LEVELS),
        fit_curve(np.repeat(sample, weights), np.ones(weights.sum()), LEVELS),
    )
    np.testing.assert_allclose(heavy.values, many.values, atol=0.01)
    assert np.abs(heavy.values - of(sample.tolist()).values).max() < 0.1


def test_tails_are_exponential() -> None:
    """Of an exponential distribution the upper tail has its scale, so quantiles far out are right as well."""
    sample = np.random.default_rng(1).exponential(2.0, 20_000)
    curve = fit_curve(sample, np.ones(len(sample)), LEVELS)
    far = curve.icdf(np.array([0.99, 0.999]))
    np.testing.assert_allclose(far, -2 * np.log([0.01, 0.001]), rtol=0.05)


def test_levels_are_inside() -> None:
    """There is no quantile at 0 or 1: tails have no end."""
    with pytest.raises(ValueError, match=r"a level in \(0, 1\), got levels from 0.0 to 0.5"):
        of([1.0, 2.0, 3.0]).icdf(np.array([0.0, 0.5]))
