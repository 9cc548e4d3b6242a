"""Procedures: three faces of one definition, against enumeration, scipy's order statistics and the paper's lemma."""

from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from strategies import calibrated_procedures, procedures

from calibrated_rewards.testing.suites import check_picklable, check_procedure
from calibrated_rewards.theory.procedures import (
    BestOf,
    Calibrated,
    RewindAndRepeat,
    SoftBestOf,
    Standard,
    WorstOf,
    best_of_subset,
)
from calibrated_rewards.theory.quadrature import reference_law, resolve

scores = st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.5, 0.9, 0.95]), min_size=1, max_size=6).map(np.array)


@settings(max_examples=40)
@given(procedures)
def test_every_procedure_passes_the_public_suite(procedure):
    """Runs, tilts and pool weights agree; pickle round trip."""
    check_procedure(procedure, runs=4000)
    check_picklable(procedure)


@given(st.integers(1, 40), st.integers(1, 40))
def test_best_of_subset_in_whole_numbers(m, n):
    """binom(i-1, n-1) / binom(m, n) in exact arithmetic."""
    if n > m:
        return
    exact = [comb(i - 1, n - 1) / comb(m, n) for i in range(1, m + 1)]

    assert best_of_subset(m, n) == pytest.approx(exact, rel=1e-11, abs=1e-300)


def test_best_of_subset_stays_exact_for_large_pools():
    """m = 5000, n = 128: against exact integers."""
    exact = np.array([comb(i - 1, 127) / comb(5000, 128) for i in range(1, 5001)])

    assert best_of_subset(5000, 128) == pytest.approx(exact, rel=1e-9, abs=1e-300)


def enumerate_outcomes(pool, draws, outcome):
    """Mean of `outcome(subset of indices) -> probabilities` over all subsets: pool weights by brute force."""
    weights = np.zeros(len(pool))
    subsets = list(combinations(range(len(pool)), draws))
    for subset in subsets:
        weights[list(subset)] += outcome(pool[list(subset)]) / len(subsets)
    return weights


def share_of_largest(values):
    """Ties at random."""
    return (values == values.max()) / np.sum(values == values.max())


@given(scores, st.integers(1, 6))
def test_pool_weights_of_best_and_worst_by_enumeration(pool, n):
    """All n-subsets, one by one, ties shared."""
    n = min(n, len(pool))

    assert BestOf(n).pool_weights(pool) == pytest.approx(enumerate_outcomes(pool, n, share_of_largest))
    assert WorstOf(n).pool_weights(pool) == pytest.approx(
        enumerate_outcomes(pool, n, lambda values: share_of_largest(-values))
    )


@given(scores, st.integers(1, 6), st.floats(0.05, 3.0))
def test_pool_weights_of_soft_best_by_enumeration(pool, n, temperature):
    """The softmax of every n-subset, against one integral over symmetric polynomials."""
    n = min(n, len(pool))
    expected = enumerate_outcomes(
        pool, n, lambda values: np.exp(values / temperature) / np.exp(values / temperature).sum()
    )

    assert SoftBestOf(n, temperature).pool_weights(pool) == pytest.approx(expected, abs=1e-11)


@settings(max_examples=30)
@given(scores, st.integers(1, 6))
def test_pool_weights_of_rewind_and_repeat_by_enumeration(pool, tries):
    """Every order of the pool, played out."""
    tries = min(tries, len(pool))
    procedure, weights = RewindAndRepeat(0.5, tries), np.zeros(len(pool))
    orders = list(permutations(range(len(pool))))
    for order in orders:
        passed = [i for i in order[:tries] if pool[i] >= 0.5]
        weights[passed[0] if passed else order[tries - 1]] += 1 / len(orders)

    assert procedure.pool_weights(pool) == pytest.approx(weights)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 128])
def test_lemma_5_is_scipys_order_statistic(n):
    """BestOf(n) of Unif[0, 1] is Beta(n, 1), WorstOf(n) is Beta(1, n): density, and mean N/(N+1)."""
    law = reference_law(resolve(np.zeros_like).grid)
    uniform = stats.make_distribution(stats.uniform)()
    best, worst = stats.order_statistic(uniform, r=n, n=n), stats.order_statistic(uniform, r=1, n=n)

    assert BestOf(n).tilt(law) == pytest.approx(best.pdf(law.u), rel=1e-9, abs=1e-12)
    assert law.mass @ (law.u * BestOf(n).tilt(law)) == pytest.approx(best.mean(), abs=1e-13)
    assert law.mass @ (law.u * WorstOf(n).tilt(law)) == pytest.approx(worst.mean(), abs=1e-13)


@given(calibrated_procedures)
def test_calibrated_reproduces_the_named_procedures(procedure):
    """Def. 6 with g known only as a function: the same tilt as the closed form."""
    law = resolve(lambda s: 2.0 / (1.0 + np.exp(-np.clip(s, -60, 60))))
    general = Calibrated(lambda c: procedure.density(c, 1 - c))

    assert general.tilt(law) == pytest.approx(procedure.tilt(law), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_soft_best_of_interpolates_between_one_draw_and_the_best(n):
    """Temperature to infinity is Standard, to zero BestOf."""
    law = reference_law(resolve(np.zeros_like).grid)

    assert SoftBestOf(n, 1e7).tilt(law) == pytest.approx(1.0, abs=1e-6)
    assert law.mass @ np.abs(SoftBestOf(n, 1e-3).tilt(law) - BestOf(n).tilt(law)) < 2e-3 * n


def test_rewind_and_repeat_counts_its_tries():
    """Mean tries by simulation: geometric, cut at max_tries."""
    procedure, rng = RewindAndRepeat(0.85, 8), np.random.default_rng(1)
    passed = rng.random((200_000, 8)) >= 0.85
    tries = np.where(passed.any(axis=1), passed.argmax(axis=1) + 1, 8)
    law = reference_law(resolve(np.zeros_like, procedure.breaks).grid)

    assert procedure.mean_tries(law) == pytest.approx((1 - 0.85**8) / 0.15, abs=1e-12)
    assert procedure.mean_tries(law) == pytest.approx(tries.mean(), abs=5 * tries.std() / 200_000**0.5)


def test_choose_takes_any_batch_shape_and_breaks_ties_evenly():
    """(2, 3, N) scores give (2, 3) indices; three equal scores are chosen a third of the time each."""
    rng = np.random.default_rng(0)
    assert BestOf(4).choose(rng.random((2, 3, 4)), rng).shape == (2, 3)

    counts = np.bincount(BestOf(3).choose(np.ones((30_000, 3)), rng)) / 30_000
    assert counts == pytest.approx(1 / 3, abs=0.015)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOf(0), "BestOf needs a whole n >= 1, got n=0"),
        (lambda: WorstOf(-3), "WorstOf needs a whole n >= 1, got n=-3"),
        (lambda: RewindAndRepeat(1.0), r"threshold in \(0, 1\), got threshold=1.0"),
        (lambda: RewindAndRepeat(0.5, 0), "whole max_tries >= 1, got max_tries=0"),
        (lambda: SoftBestOf(2, 0.0), "temperature >= 0.001 .* got temperature=0.0"),
        (lambda: Calibrated(np.negative), "finite values >= 0"),
        (lambda: Calibrated(np.zeros_like), "not all 0"),
        (lambda: BestOf(4).pool_weights([1, 2, 3]), r"BestOf\(4\) needs a pool of at least 4 scores .* shape \(3,\)"),
        (lambda: Standard().pool_weights([np.nan]), "Standard needs finite scores, got nan"),
    ],
)
def test_bad_parameters_are_named(make, message):
    """The error says which rule, and the value it got."""
    with pytest.raises(ValueError, match=message):
        make()
