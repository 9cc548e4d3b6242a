"""Bands by independent routes: Steck's determinant, scipy's Kolmogorov-Smirnov law, closed forms, simulation."""

import inspect
from fractions import Fraction
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.integrate import quad

from calibrated_rewards.theory.bands import band, coverage, dkw

KINDS = ("dkw", "pointwise", "simultaneous")
levels = st.floats(1e-6, 0.9)


def determinant(matrix: list[list[Fraction]]) -> Fraction:
    """By Laplace's expansion: slow and exact."""
    if not matrix:
        return Fraction(1)
    minors = ([row[:k] + row[k + 1 :] for row in matrix[1:]] for k in range(len(matrix)))
    return sum(((-1) ** k * matrix[0][k] * determinant(minor) for k, minor in enumerate(minors)), Fraction(0))


def steck(lower: list[float], upper: list[float]) -> Fraction:
    """P(lower_i <= U_(i) <= upper_i) = K! det[(upper_i - lower_j)_+^(j-i+1) / (j-i+1)!], for ends that do not fall."""
    ends = [[Fraction(x) for x in side] for side in (lower, upper)]
    size = len(lower)

    def entry(i: int, j: int) -> Fraction:
        return max(ends[1][i] - ends[0][j], Fraction(0)) ** (j - i + 1) / factorial(j - i + 1) if j - i >= -1 else 0

    return factorial(size) * determinant([[Fraction(entry(i, j)) for j in range(size)] for i in range(size)])


@given(st.integers(1, 6).flatmap(lambda size: st.lists(st.floats(0, 1), min_size=2 * size, max_size=2 * size)))
def test_coverage_is_stecks_determinant(numbers):
    """Any boxes with sorted ends, overlapping or not, for K up to 6, in rational arithmetic."""
    size = len(numbers) // 2
    lower, upper = sorted(numbers[:size]), sorted(numbers[size:])
    exact = steck(lower, upper) if all(low <= high for low, high in zip(lower, upper, strict=True)) else 0
    assert coverage(lower, upper) == pytest.approx(float(exact), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("lower", "upper"), [([0.2], [0.7]), ([0.0], [1.0]), ([0.7], [0.2]), ([-3.0], [0.4])])
def test_coverage_of_one_uniform_is_a_length(lower, upper):
    """K = 1, ends outside [0, 1] and the wrong way round included."""
    assert coverage(lower, upper) == pytest.approx(max(0.0, upper[0] - max(0.0, lower[0])), abs=1e-15)


def test_coverage_of_two_uniforms_is_an_area():
    """K = 2 against scipy's integral over the second uniform of the room left to the first, doubled for the order."""
    a, b, c, d = 0.1, 0.6, 0.3, 0.8
    area = 2 * quad(lambda y: max(0.0, min(b, y) - a), c, d, points=[b])[0]
    assert coverage([a, c], [b, d]) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("K", [1, 2, 7, 50, 400])
def test_coverage_of_a_line_from_below(K):
    """Daniels: all U_(i) >= x i / K with probability 1 - x, for every K."""
    for x in (0.05, 0.5, 0.99):
        assert coverage(x * np.arange(1, K + 1) / K, np.ones(K)) == pytest.approx(1 - x, abs=1e-11)


@pytest.mark.parametrize("K", [1, 2, 5, 32, 100, 1000])
@pytest.mark.parametrize("delta", [1e-4, 0.05, 0.5])
def test_lemma_6_holds_and_coverage_is_scipys_kolmogorov_smirnov(K, delta):
    """The DKW band's exact coverage is P(KS statistic <= width), and at least 1 - delta.

    scipy's own law is exact up to K = 140 and a series good to 1e-7 (Pelz and Good) beyond.
    """
    width, i = dkw(K, delta), np.arange(1, K + 1)
    exact = coverage(i / K - width, (i - 1) / K + width)
    assert exact == pytest.approx(stats.kstwo.cdf(width, K), abs=1e-10 if K <= 140 else 1e-7)
    assert exact >= 1 - delta
    assert 2 * np.exp(-2 * K * width**2) == pytest.approx(delta)


def test_lemma_6_by_simulation():
    """sup |C^ - C| over 20,000 draws of 30 references stays within the width at least as often as promised."""
    K, delta, rng = 30, 0.2, np.random.default_rng(0)
    u = np.sort(rng.random((20_000, K)), axis=1)
    i = np.arange(1, K + 1)
    worst = np.maximum(np.abs(i / K - u), np.abs((i - 1) / K - u)).max(axis=1)
    held = (worst <= dkw(K, delta)).mean()
    assert held > 1 - delta - 4 * np.sqrt(delta * (1 - delta) / 20_000)


def test_coverage_of_unsorted_boxes_by_simulation():
    """Ends that are out of order bind through their neighbours."""
    lower, upper = np.array([0.1, 0.0, 0.35, 0.2]), np.array([0.7, 0.5, 1.0, 0.9])
    u = np.sort(np.random.default_rng(1).random((200_000, 4)), axis=1)
    held = ((u >= lower) & (u <= upper)).all(axis=1).mean()
    exact = coverage(lower, upper)
    assert abs(held - exact) < 4 * np.sqrt(exact * (1 - exact) / 200_000)


def test_coverage_of_what_hardly_ever_happens():
    """K uniforms, each in its own bin of width 1/K: K! / K^K, 1e-129 at K = 300, and 0 where it is below any float."""
    for K in (3, 300, 1000):
        edges = np.arange(K + 1) / K
        exact = np.prod(np.arange(1, K + 1) / K)
        assert coverage(edges[:-1], edges[1:]) == pytest.approx(exact, rel=1e-9, abs=0)
    assert coverage(edges[:-1], edges[:-1]) == 0.0


@pytest.mark.parametrize("K", [1, 2, 3, 10, 100, 700])
@pytest.mark.parametrize("delta", [1e-6, 0.05, 0.6])
def test_simultaneous_band_covers_exactly(K, delta):
    """All order statistics inside at once with probability 1 - delta, neither more nor less."""
    lower, upper = band(K, delta, "simultaneous")
    assert coverage(lower[2::2], upper[:-1:2]) == pytest.approx(1 - delta, abs=1e-10)


@pytest.mark.parametrize("K", [3, 25])
def test_simultaneous_band_by_simulation(K):
    """Every response at once: the extreme ones, just below and just above each reference, are inside or none is not."""
    delta, draws = 0.1, 20_000
    lower, upper = band(K, delta)
    u = np.sort(np.random.default_rng(2).random((draws, K)), axis=1)
    fence = np.hstack([np.zeros((draws, 1)), u, np.ones((draws, 1))])
    held = ((fence[:, :-1] >= lower[::2]) & (fence[:, 1:] <= upper[::2])).all(axis=1).mean()
    assert abs(held - (1 - delta)) < 4 * np.sqrt(delta * (1 - delta) / draws)


@pytest.mark.parametrize("K", [1, 4, 60])
def test_equal_chances_to_leave(K):
    """Each order statistic leaves its own box, to either side, with one and the same probability."""
    lower, upper = band(K, 0.05)
    law = stats.beta(np.arange(1, K + 1), np.arange(K, 0, -1))
    leaving = np.array([law.cdf(lower[2::2]), law.sf(upper[:-1:2])])
    assert leaving == pytest.approx(leaving[0, 0], rel=1e-9)


@pytest.mark.parametrize("K", [1, 2, 9, 40])
def test_pointwise_band_is_clopper_pearson(K):
    """scipy's exact interval for `below` successes in K; one tie takes the lower end of one and the upper of two."""
    lower, upper = band(K, 0.1, "pointwise")
    for j in range(K + 1):
        exact = stats.binomtest(j, K).proportion_ci(0.9, method="exact")
        assert (lower[2 * j], upper[2 * j]) == pytest.approx((exact.low, exact.high), abs=1e-10)
    assert lower[1::2] == pytest.approx(lower[:-1:2])
    assert upper[1::2] == pytest.approx(upper[2::2])


def test_pointwise_band_holds_for_every_quantile():
    """The exact binomial chance that the interval holds C is at least 1 - delta, for C all over [0, 1]."""
    K, delta = 12, 0.1
    lower, upper = band(K, delta, "pointwise")
    for c in np.linspace(0, 1, 401):
        chance = stats.binom.pmf(np.arange(K + 1), K, c)
        assert chance[(lower[::2] <= c) & (c <= upper[::2])].sum() >= 1 - delta


@pytest.mark.parametrize("kind", KINDS)
def test_bands_hold_where_scores_tie(kind):
    """Five scores only: the mid-rank C lies in [lower[2 below], upper[2 (below + equal)]] as often as promised."""
    chances, K, delta, draws = np.array([0.1, 0.3, 0.05, 0.35, 0.2]), 15, 0.2, 20_000
    lower, upper = band(K, delta, kind)
    counts = np.random.default_rng(3).multinomial(K, chances, draws)
    through = np.cumsum(counts, axis=1)
    true = np.cumsum(chances) - chances / 2
    inside = (lower[2 * (through - counts)] <= true) & (true <= upper[2 * through])
    held = inside.mean(axis=0).min() if kind == "pointwise" else inside.all(axis=1).mean()
    assert held > 1 - delta - 4 * np.sqrt(delta * (1 - delta) / draws)


@pytest.mark.parametrize("K", [10, 100, 1000])
def test_simultaneous_is_narrower_than_dkw_in_the_tails(K):
    """Where best-of-N and worst-of-N look; and, once K is large, not in the middle, where DKW is hard to beat."""
    (low, high), (dkw_low, dkw_high) = band(K, 0.05, "simultaneous"), band(K, 0.05, "dkw")
    tail = 1 + 2 * (K // 50)
    assert ((high - low)[:tail] < (dkw_high - dkw_low)[:tail]).all()
    assert ((high - low)[-tail:] < (dkw_high - dkw_low)[-tail:]).all()
    assert ((high - low)[K] > (dkw_high - dkw_low)[K]) == (K > 10)


@given(st.integers(1, 60), levels, st.sampled_from(KINDS))
def test_bands_are_ordered_symmetric_and_hold_the_empirical_quantile(K, delta, kind):
    """0 <= lower <= i / 2K <= upper <= 1 at usual levels, both rise, and turning the scores round mirrors the band."""
    lower, upper = band(K, min(delta, 0.3), kind)
    middle = np.arange(2 * K + 1) / (2 * K)
    assert ((lower >= 0) & (lower <= middle) & (middle <= upper) & (upper <= 1)).all()
    assert (np.diff(lower) >= 0).all()
    assert (np.diff(upper) >= 0).all()
    assert lower == pytest.approx(1 - upper[::-1], abs=1e-12)


@settings(max_examples=40)
@given(st.integers(1, 20), levels)
def test_holding_for_all_costs_more_than_for_one(K, delta):
    """The simultaneous band contains the pointwise one, and a smaller delta a wider band."""
    (low, high), (one_low, one_high) = band(K, delta), band(K, delta, "pointwise")
    assert (low <= one_low + 1e-12).all()
    assert (high >= one_high - 1e-12).all()
    assert (band(K, delta / 2)[0] <= low + 1e-12).all()


REFUSED = [
    (lambda: inspect.unwrap(dkw)(0, 0.1), r"K >= 1, got K=0\."),
    (lambda: inspect.unwrap(dkw)(2.5, 0.1), r"K >= 1, got K=2\.5\."),
    (lambda: dkw(5, 0.0), r"0 < delta < 1, got delta=0\.0\."),
    (lambda: band(5, 1.0), r"0 < delta < 1, got delta=1\.0\."),
    (lambda: inspect.unwrap(band)(5, 0.1, "exact"), r"\"simultaneous\", got kind='exact'\."),
    (lambda: coverage([], []), r"one length K >= 1, got lower=\[\]"),
    (lambda: coverage([0.1], [0.2, 0.3]), r"got lower=\[0\.1\], upper=\[0\.2, 0\.3\]\."),
    (lambda: coverage([0.1], [np.nan]), r"upper=\[nan\]\."),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refuses_what_it_cannot_do(wrong, message):
    """Each error names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        wrong()
