"""pass@k, best@k and worst@k: against all subsets, scipy's hypergeometric law, exact fractions and simulation."""

from fractions import Fraction
from itertools import combinations, product
from math import comb

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from calibrated_rewards import evaluation
from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples
from calibrated_rewards.evaluation.pass_at_k import best_at_k, chance_to_pass, pass_at_k, worst_at_k
from calibrated_rewards.evaluation.win_rate import WeightedPools, win_rate
from calibrated_rewards.theory.procedures import BestOf, Standard

SCORES = st.lists(st.integers(-3, 3).map(lambda x: x / 4), min_size=1, max_size=7)


@given(SCORES, st.data())
def test_best_and_worst_are_means_over_all_subsets(scores: list[float], data: st.DataObject) -> None:
    """Every k-subset is enumerated; with replacement, every k-tuple."""
    k = data.draw(st.integers(1, len(scores)))
    row = Samples([scores])
    subsets = [*combinations(scores, k)]
    assert float(best_at_k(row, k)) == pytest.approx(np.mean([max(x) for x in subsets]))
    assert float(worst_at_k(row, k)) == pytest.approx(np.mean([min(x) for x in subsets]))
    if len(scores) <= 5:
        tuples = [*product(scores, repeat=k)]
        assert float(best_at_k(row, k, replacement=True)) == pytest.approx(np.mean([max(x) for x in tuples]))
        assert float(worst_at_k(row, k, replacement=True)) == pytest.approx(np.mean([min(x) for x in tuples]))


def test_a_judge_scores_what_another_score_selects() -> None:
    """Ties of the selecting score are broken at random: enumerated over subsets, with the mean of the tied."""
    select, judge = [0.0, 2.0, 2.0, 1.0, 2.0], [5.0, -1.0, 3.0, 2.0, 0.5]

    def picked(subset: tuple[int, ...]) -> float:
        top = max(select[i] for i in subset)
        return float(np.mean([judge[i] for i in subset if select[i] == top]))

    for k in range(1, 6):
        expected = np.mean([picked(subset) for subset in combinations(range(5), k)])
        assert float(best_at_k(Samples([select], [judge]), k)) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 3), (100, 64), (2000, 1000)])
def test_pass_at_k_is_the_hypergeometric_law(n: int, k: int) -> None:
    """The chance that k of n without replacement hold no pass, for every number of passes, by scipy."""
    passed = np.arange(n + 1)
    none = np.array([stats.hypergeom(n, c, k).pmf(0) for c in passed[:: max(1, n // 50)]])
    found = chance_to_pass(np.full(len(none), n), passed[:: max(1, n // 50)], k)
    assert found == pytest.approx(1 - none, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(10**6, 1, 5), (10**5, 3, 1000), (10**4, 9_990, 4), (500, 499, 2), (50, 7, 44)]
)
def test_pass_at_k_of_many_samples_keeps_its_digits(n: int, c: int, k: int) -> None:
    """Exact fractions of whole binomials: no digits are lost where n is large or the chance is small."""
    exact = 1 - Fraction(comb(n - c, k), comb(n, k))
    assert float(chance_to_pass(n, c, k)) == pytest.approx(float(exact), rel=1e-12)


@given(st.lists(SCORES.filter(lambda row: len(row) >= 3), min_size=1, max_size=4))
def test_invariants(rows: list[list[float]]) -> None:
    """k = 1 is the mean, k = n the maximum, and best@k rises with k; worst@k mirrors it; a bootstrap is never above."""
    samples = Samples(rows)
    mirrored = Samples([[-x for x in row] for row in rows])
    best = [best_at_k(samples, k).per_prompt for k in range(1, samples.sizes.min() + 1)]
    assert best[0] == pytest.approx([np.mean(row) for row in rows])
    assert (np.diff(best, axis=0) >= -1e-12).all()
    for k, at in enumerate(best, 1):
        assert worst_at_k(mirrored, k).per_prompt == pytest.approx(-at)
        assert (best_at_k(samples, k, replacement=True).per_prompt <= at + 1e-12).all()
    for row in rows:
        assert float(best_at_k(Samples([row]), len(row))) == pytest.approx(max(row))


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=9), min_size=1, max_size=4), st.integers(1, 4))
def test_best_of_n_with_a_verifier_is_pass_at_n(rows: list[list[bool]], k: int) -> None:
    """Four routes: pass@k, best@k of 0/1, `pool_weights`, and the win rate over a response worth one half."""
    solved = Samples([np.array(row, float) for row in rows])
    half = Samples([[0.5]] * len(rows))
    passed = pass_at_k(solved, k).per_prompt
    assert best_at_k(solved, k).per_prompt == pytest.approx(passed)
    assert [BestOf(k).pool_weights(row) @ row for row in solved.select] == pytest.approx(passed.tolist())
    assert win_rate(solved, half, BestOf(k), Standard()).per_prompt == pytest.approx(passed)


def test_weighted_rollouts_draw_with_replacement() -> None:
    """`WeightedPools` has the law of independent draws from the pool: 1 - (1 - c / n)^N, the bootstrap's limit."""
    solved = Samples([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    pools = WeightedPools(solved)
    passed = (pools.output(pools.uniform, BestOf(4)) * np.array(solved.select)).sum(axis=1)
    assert passed == pytest.approx([1 - 0.75**4, 1 - 0.5**4])
    assert best_at_k(solved, 4, replacement=True).per_prompt == pytest.approx(passed)


def test_fresh_samples_are_met_on_average() -> None:
    """Unbiased: over 40,000 simulated pools of 6, best@4 has the mean of the best of 4 fresh draws; a bootstrap not."""
    rng = np.random.default_rng(0)
    pools = rng.exponential(size=(40_000, 6))
    fresh = stats.expon.expect(lambda x: x * 4 * stats.expon.cdf(x) ** 3)  # 1 + 1/2 + 1/3 + 1/4
    estimate = best_at_k(Samples(pools), 4)
    assert estimate.value == pytest.approx(fresh, abs=4 * estimate.standard_error)
    assert best_at_k(Samples(pools), 4, replacement=True).value < fresh - 20 * estimate.standard_error


def test_errors_are_over_prompts() -> None:
    """The standard error is the spread between prompts; the interval covers the truth of a simulation."""
    rng, covered = np.random.default_rng(1), 0
    truth = 1 - stats.beta(2, 3).expect(lambda p: (1 - p) ** 4)
    for _ in range(200):
        solved = rng.random((60, 8)) < rng.beta(2, 3, (60, 1))
        estimate = IntervalEstimate.of(evaluation.pass_at_k(Samples(solved.astype(float)), 4))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    assert stats.binomtest(covered, 200, 0.95).pvalue > 0.001


def test_a_threshold_makes_a_pass() -> None:
    """Scores at the threshold pass; any other scores give the counts that they are compared to."""
    samples = Samples([[0.2, 0.5, 0.9, 0.4], [0.1, 0.2, 0.3, 0.4]])
    assert pass_at_k(samples, 2, threshold=0.5).per_prompt == pytest.approx([1 - 1 / 6, 0.0])
    assert pass_at_k(samples, 1, threshold=0.4).per_prompt == pytest.approx([0.75, 0.25])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few samples, a k that is no count, passes that cannot be: the error names the prompt or the number."""
    samples = Samples([[0.0, 1.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="best_at_k needs k=3 samples or more of each prompt, got 2 of prompt 1"):
        best_at_k(samples, 3)
    with pytest.raises(ValueError, match="worst_at_k needs a whole k >= 1, got k=0"):
        worst_at_k(samples, 0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for threshold in (float("nan"), None, "1"):
        with pytest.raises(ValueError, match=f"finite threshold, got threshold={threshold!r}"):
            pass_at_k(samples, 1, threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 <= passed <= n"):
        chance_to_pass(4, 5, 2)
