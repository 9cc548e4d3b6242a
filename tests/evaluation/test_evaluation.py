"""Win rates from samples: against enumeration, enumerable worlds, brute-force jackknives and simulated coverage."""

from itertools import combinations, permutations
from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom, t as student

from calibrated_rewards.evaluation.estimates import Estimate, Influence, Samples, difference, estimate_columns
from calibrated_rewards.evaluation.win_rate import Prediction, predict, win_rate
from calibrated_rewards.theory.procedures import BestOf, Calibrated, RewindAndRepeat, SoftBestOf, Standard, WorstOf

BY_RANK = [Standard(), BestOf(1), BestOf(2), BestOf(3), WorstOf(2), WorstOf(3), Calibrated(np.square, draws=2)]
BY_SCORE = [SoftBestOf(2, 0.3), SoftBestOf(3, 0.05), RewindAndRepeat(0.5, 2), RewindAndRepeat(0.7, 3)]
ENUMERABLE = [procedure for procedure in BY_RANK + BY_SCORE if not isinstance(procedure, Calibrated)]

# Multiples of 1/8 in [0, 1]: many ties, and calibrated as far as a procedure can tell.
POOL = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=4, max_size=6)


def samples(*pools):
    return Samples([[s / 8 for s, _ in pool] for pool in pools], [[float(j) for _, j in pool] for pool in pools])


def chosen(procedure, scores):
    """Chance of each of the drawn responses, in the order of their drawing."""
    scores = np.array(scores)
    match procedure:
        case Standard():
            return np.eye(len(scores))[0]
        case BestOf():
            return (scores == scores.max()) / (scores == scores.max()).sum()
        case WorstOf():
            return (scores == scores.min()) / (scores == scores.min()).sum()
        case SoftBestOf(temperature=temperature):
            return np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        case RewindAndRepeat(threshold=threshold):
            first = next((i for i, score in enumerate(scores) if score >= threshold), len(scores) - 1)
            return np.eye(len(scores))[first]


def law(procedure, scores):
    """Chance of each response of the pool, every ordered draw without replacement enumerated."""
    draws = list(permutations(range(len(scores)), procedure.draws))
    chance = np.zeros(len(scores))
    for draw in draws:
        chance[list(draw)] += chosen(procedure, [scores[i] for i in draw]) / len(draws)
    return chance


def beats(a, b):
    return (a > b) + (a == b) / 2


def double_sum(a, b, procedure, base):
    p, q = law(procedure, a.select[0]), law(base, b.select[0])
    return sum(
        p[i] * q[j] * beats(a.judge[0][i], b.judge[0][j]) for i in range(len(p)) for j in range(len(q)) if p[i] * q[j]
    )


def drop(pool, prompt, i):
    """The same samples without response i of a prompt."""

    def cut(rows):
        return [np.delete(row, i) if p == prompt else row for p, row in enumerate(rows)]

    return Samples(cut(pool.select), cut(pool.judge))


def jackknife_variance(estimates):
    m = len(estimates)
    return (m - 1) / m * sum((e - np.mean(estimates)) ** 2 for e in estimates)


def normal_pools(rng, prompts, m, shift=0.0, correlation=0.6):
    select = rng.normal(size=(prompts, m)) + shift
    judge = correlation * select + sqrt(1 - correlation**2) * rng.normal(size=(prompts, m))
    return Samples(select, judge)


@pytest.mark.parametrize("procedure", ENUMERABLE, ids=repr)
@settings(max_examples=15, deadline=None)
@given(policy=POOL, reference=POOL, base=st.sampled_from(ENUMERABLE))
def test_is_the_average_over_every_draw_on_both_sides(procedure, policy, reference, base):
    """The U-statistic by definition: all draws of N enumerated, ties split, all pairs of outputs judged."""
    a, b = samples(policy), samples(reference)
    expected = double_sum(a, b, procedure, base)

    assert win_rate(a, b, procedure, base, jackknife=False).value == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(policy=POOL, reference=POOL)
def test_best_of_is_the_average_over_subsets(policy, reference):
    """The same for the default base through unordered subsets, the textbook form of a U-statistic of degree (3, 3)."""
    a, b = samples(policy), samples(reference)
    kernel = [
        np.mean([[beats(i, j) for j in best_judges(b, right)] for i in best_judges(a, left)])
        for left in combinations(range(len(policy)), 3)
        for right in combinations(range(len(reference)), 3)
    ]

    assert win_rate(a, b, BestOf(3)).value == pytest.approx(np.mean(kernel), abs=1e-12)


def best_judges(pool, subset):
    top = max(pool.select[0][i] for i in subset)
    return [pool.judge[0][i] for i in subset if pool.select[0][i] == top]


@pytest.mark.parametrize(("n", "base_n"), [(1, 1), (4, 4), (4, 1), (2, 5)])
def test_is_unbiased_in_an_enumerated_world(n, base_n):
    """A finite Y tied in proxy and judge: truth from P_BoN(y) = (F(y-) + p)^N - F(y-)^N, shared within a level."""
    rng = np.random.default_rng(n * 10 + base_n)
    reward = np.array([0.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0])
    judge = np.array([0.0, 2.0, 0.0, 1.0, 1.0, 3.0, 2.0])
    ours, theirs = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(7))
    outputs = [best_of_law(ours, reward, n), best_of_law(theirs, reward, base_n)]
    truth = sum(outputs[0][y] * outputs[1][z] * beats(judge[y], judge[z]) for y in range(7) for z in range(7))
    draws = [rng.choice(7, size=(1000, 6), p=p) for p in (ours, theirs)]
    a, b = (Samples(reward[y], judge[y]) for y in draws)
    estimate = win_rate(a, b, BestOf(n), BestOf(base_n), jackknife=False)

    assert abs(estimate.value - truth) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.02


def best_of_law(p, reward, n):
    below = np.array([p[reward < r].sum() for r in reward])
    level = np.array([p[reward == r].sum() for r in reward])
    return ((below + level) ** n - below**n) * p / level


def test_calibrated_is_biased_as_it_says():
    """Self-normalised g = 3 C^2 on m = 4 uniforms gives sum_i w_i i / (m + 1) = .690, not the limit .75."""
    rng = np.random.default_rng(4)
    a, b = Samples(rng.random((1500, 4))), Samples(rng.random((1500, 4)))
    estimate = win_rate(a, b, Calibrated(np.square), Standard(), jackknife=False)
    expected = np.dot([1, 9, 25, 49], [1, 2, 3, 4]) / 84 / 5

    assert abs(estimate.value - expected) < 4 * estimate.standard_error < 0.75 - expected


@pytest.mark.parametrize("procedure", BY_RANK + BY_SCORE, ids=repr)
@settings(max_examples=10, deadline=None)
@given(policy=POOL, reference=POOL, base=st.sampled_from(BY_RANK + BY_SCORE))
def test_two_sides_sum_to_one(procedure, policy, reference, base):
    """W(a beats b) + W(b beats a) = 1, since ties weigh one half."""
    a, b = samples(policy), samples(reference)
    there, back = win_rate(a, b, procedure, base), win_rate(b, a, base, procedure)

    assert there.value + back.value == pytest.approx(1, abs=1e-14)
    assert there.sampling_error == pytest.approx(back.sampling_error, abs=1e-12, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(policy=POOL, reference=POOL, procedure=st.sampled_from(BY_RANK))
def test_only_the_order_of_scores_counts(policy, reference, procedure):
    """Strictly increasing maps of the selecting scores (per side) and of the judging ones (both) change nothing."""
    a, b = samples(policy), samples(reference)
    mapped = Samples([np.exp(9 * row) for row in a.select], [row**3 - 5 for row in a.judge])
    other = Samples([row - 100 for row in b.select], [row**3 - 5 for row in b.judge])
    before, after = win_rate(a, b, procedure), win_rate(mapped, other, procedure)

    assert before.value == after.value
    assert before.sampling_error == pytest.approx(after.sampling_error, abs=1e-15, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), policy=POOL, reference=POOL, procedure=st.sampled_from(BY_RANK + BY_SCORE))
def test_order_of_arrival_does_not_count(data, policy, reference, procedure):
    """The responses of a pool have no order."""
    shuffled = data.draw(st.permutations(policy))
    before = win_rate(samples(policy), samples(reference), procedure)
    after = win_rate(samples(shuffled), samples(reference), procedure)

    assert before.value == pytest.approx(after.value, abs=1e-14)
    assert before.sampling_error == pytest.approx(after.sampling_error, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("procedure", BY_RANK + BY_SCORE, ids=repr)
def test_judge_that_sees_no_difference_gives_a_half(procedure):
    """Ties everywhere: exactly one half, without error."""
    rng = np.random.default_rng(0)
    a, b = (Samples(rng.random((3, 5)), np.ones((3, 5))) for _ in range(2))
    estimate = win_rate(a, b, procedure)

    assert estimate.value == pytest.approx(0.5, abs=1e-12)
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)
    assert estimate.sampling_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("procedure", BY_RANK + BY_SCORE, ids=repr)
@settings(max_examples=6, deadline=None)
@given(policies=st.tuples(POOL, POOL), references=st.tuples(POOL, POOL), base=st.sampled_from(BY_RANK + BY_SCORE))
def test_jackknife_is_recomputation_without_each_response(procedure, policies, references, base):
    """Every response of ragged, tied pools really deleted, and the whole estimate made anew from scratch."""
    a, b = samples(*policies), samples(*references)
    variance = 0.0
    for prompt in range(2):
        for pool, remake in (
            (a, lambda s: win_rate(s, b, procedure, base)),
            (b, lambda s: win_rate(a, s, procedure, base)),
        ):
            variance += jackknife_variance([remake(drop(pool, prompt, i)).value for i in range(pool.sizes[prompt])])

    assert win_rate(a, b, procedure, base).sampling_error == pytest.approx(sqrt(variance), abs=1e-9)


def test_jackknife_of_single_draws_is_the_two_sample_formula():
    """N = 1: var(c)/m + var(d)/n with c, d each response's share of wins (DeLong's error of an AUC)."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 30).astype(float), rng.integers(0, 9, 12).astype(float)
    table = beats(a[:, None], b[None, :])
    expected = sqrt(table.mean(1).var(ddof=1) / 30 + table.mean(0).var(ddof=1) / 12)

    assert win_rate(Samples([a]), Samples([b]), Standard()).sampling_error == pytest.approx(expected, rel=1e-12)
    assert win_rate(Samples([a]), Samples([b]), BestOf(1)).sampling_error == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("procedure", [Standard(), BestOf(3), WorstOf(2), RewindAndRepeat(0.6, 3)], ids=repr)
def test_sampling_error_is_the_spread_over_repetitions(procedure):
    """500 prompts of one law: their spread is nothing but sampling, so both errors estimate the same number."""
    rng = np.random.default_rng(2)
    a, b = (Samples(rng.beta(shape, 1, size=(500, 8))) for shape in (2, 1))
    estimate = win_rate(a, b, procedure)
    ratio = estimate.sampling_error**2 / estimate.standard_error**2

    # A variance of 500 values is known to some 7 %; the jackknife of a degree-3 statistic on 8 lies up to 30 % above.
    assert 1 - 3 * 0.07 < ratio < 1.3 + 3 * 0.07


def test_intervals_cover_the_mean_over_prompts():
    """Prompts of unequal difficulty: nominal 90 % intervals hold the population's win rate 90 % of the time."""
    rng = np.random.default_rng(3)
    correlation, spread, repetitions, prompts = 0.6, 0.7, 150, 30
    # One draw a side: the judge's difference is normal with variance 2 + (correlation x spread)^2.
    truth = ndtr(correlation * 0.5 / sqrt(2 + (correlation * spread) ** 2))
    shift = 0.5 + spread * rng.normal(size=(repetitions * prompts, 1))
    pools = normal_pools(rng, len(shift), 4, shift, correlation), normal_pools(rng, len(shift), 4)
    runs = win_rate(*pools, Standard(), jackknife=False).per_prompt.reshape(repetitions, prompts)
    for method in ("normal", "bootstrap"):
        intervals = [Estimate(run).interval(0.9, method, seed) for seed, run in enumerate(runs)]
        covered = np.mean([low <= truth <= high for low, high in intervals])

        assert abs(covered - 0.9) < 3.5 * sqrt(0.9 * 0.1 / repetitions)


NUMBERS_OF_PROMPTS = (5, 12, 20, 24, 30, 50, 100)


@pytest.mark.parametrize("prompts", NUMBERS_OF_PROMPTS)
def test_of_normal_values_the_bootstrap_is_students_interval(prompts):
    """On the mean as wide as scipy's t has it, at each number of prompts: no step from a few to many."""
    values = np.random.default_rng(prompts).normal(size=(prompts, 300))
    widths = np.array([each.high - each.low for each in estimate_columns(values)])
    half = student.ppf(0.975, prompts - 1) * values.std(axis=0, ddof=1) / sqrt(prompts)

    assert np.mean(widths) == pytest.approx(2 * half.mean(), rel=0.035)


@pytest.mark.parametrize("prompts", NUMBERS_OF_PROMPTS)
def test_intervals_cover_means_of_skewed_values_and_of_zeros_and_ones(prompts):
    """Of 0 and 1 exactly, over all numbers of ones; of win rates near 1 and of near 0 or 1, from seeded draws."""
    ones, rng = np.arange(prompts + 1), np.random.default_rng(prompts)
    of_ones = [(each.low, each.high) for each in estimate_columns((np.arange(prompts)[:, None] < ones).astype(float))]
    low, high = np.array(of_ones).T
    exact = binom.pmf(ones, prompts, 0.5) @ ((low <= 0.5) & (high >= 0.5))
    covered = {}
    for mean, (a, b) in {0.8: (2, 0.5), 0.5: (0.3, 0.3)}.items():
        found = estimate_columns(rng.beta(a, b, size=(prompts, 600)))
        covered[mean] = np.mean([each.low <= mean <= each.high for each in found])

    # Less than nominal where values are few, and skewed; benchmarks/intervals.py has the figures. 3 standard errors.
    assert 0.935 <= exact <= 0.97
    assert abs(covered[0.5] - 0.95) < 3 * sqrt(0.05 * 0.95 / 600) + 0.02 * (prompts < 12)
    assert abs(covered[0.8] - 0.95) < 3 * sqrt(0.05 * 0.95 / 600) + {5: 0.07, 12: 0.03}.get(prompts, 0.005)


def test_bootstrap_agrees_with_the_normal_interval_and_repeats_itself():
    """At 400 prompts the two differ by Monte-Carlo noise only; a seed fixes it."""
    values = np.random.default_rng(5).beta(4, 2, size=400)
    estimate = Estimate(values)
    normal, bootstrap = estimate.interval(method="normal"), estimate.interval(seed=1)

    assert bootstrap == pytest.approx(normal, abs=0.1 * estimate.standard_error)
    assert estimate.interval(seed=1) == bootstrap != estimate.interval(seed=2)
    assert estimate.interval(0.5)[0] > estimate.interval(0.99)[0]


def test_standard_error_is_that_of_a_mean():
    """The textbook formula, and Student's quantile by hand: t_{.975, 3} = 3.182446."""
    estimate = Estimate(np.array([0.2, 0.4, 0.9, 0.5]))
    error = sqrt(sum((x - 0.5) ** 2 for x in (0.2, 0.4, 0.9, 0.5)) / 3 / 4)

    assert float(estimate) == estimate.value == pytest.approx(0.5)
    assert estimate.standard_error == pytest.approx(error)
    assert estimate.interval(method="normal") == pytest.approx(
        (0.5 - 3.182446 * error, 0.5 + 3.182446 * error), rel=1e-5
    )


@pytest.mark.parametrize("procedure", [BestOf(2), SoftBestOf(2, 0.3), RewindAndRepeat(0.5, 2)], ids=repr)
def test_difference_with_itself_is_exactly_nothing(procedure):
    """Shared prompts and shared responses cancel, in the value and in both errors."""
    rng = np.random.default_rng(6)
    estimate = win_rate(Samples(rng.random((5, 4))), Samples(rng.random((5, 4))), procedure)
    nothing = difference(estimate, estimate)

    assert (nothing.value, nothing.standard_error, nothing.sampling_error) == (0, 0, 0)
    assert nothing.interval() == nothing.interval(method="normal") == (0, 0)


def test_difference_leaves_shared_references_out_of_both():
    """Its jackknife against deletion by hand: each policy alone, the common references from both terms at once."""
    rng = np.random.default_rng(7)
    one, two, reference = (normal_pools(rng, 1, 7, shift) for shift in (0.5, 0.2, 0.0))

    def gain(a, b, r):
        return win_rate(a, r, BestOf(2)).value - win_rate(b, r, BestOf(2), Standard()).value

    by_hand = (
        jackknife_variance([gain(drop(one, 0, i), two, reference) for i in range(7)])
        + jackknife_variance([gain(one, drop(two, 0, i), reference) for i in range(7)])
        + jackknife_variance([gain(one, two, drop(reference, 0, i)) for i in range(7)])
    )
    estimates = win_rate(one, reference, BestOf(2)), win_rate(two, reference, BestOf(2), Standard())

    assert difference(*estimates).value == pytest.approx(gain(one, two, reference), abs=1e-14)
    assert difference(*estimates).sampling_error == pytest.approx(sqrt(by_hand), rel=1e-10)
    assert difference(*estimates[::-1]).sampling_error == pytest.approx(sqrt(by_hand), rel=1e-10)


def test_difference_takes_separate_objects_as_independent():
    """The same numbers in two Samples objects: variances add."""
    rng = np.random.default_rng(8)
    scores = rng.random((2, 4, 6))
    first, second = (win_rate(Samples(scores[0]), Samples(scores[1]), BestOf(2)) for _ in range(2))

    assert difference(first, second).sampling_error == pytest.approx(sqrt(2) * first.sampling_error)
    assert difference(first, second).standard_error == 0


def test_difference_is_paired():
    """Hard and easy prompts make each win rate uncertain, not the gain of one policy over another."""
    rng = np.random.default_rng(9)
    hardness = rng.normal(size=(100, 1))
    reference = normal_pools(rng, 100, 16)
    one, two = (win_rate(normal_pools(rng, 100, 16, hardness + gain), reference, BestOf(2)) for gain in (0.3, 0.0))
    gain = difference(one, two)

    assert gain.standard_error < 0.6 * sqrt(one.standard_error**2 + two.standard_error**2)
    assert gain.interval()[0] > 0
    assert np.array_equal(gain.per_prompt, one.per_prompt - two.per_prompt)


def test_policy_against_its_own_samples_is_a_half_without_noise():
    """A pool on both sides is left out of both at once: W = 1/2 whatever the responses."""
    pool = normal_pools(np.random.default_rng(10), 4, 6)
    estimate = win_rate(pool, pool, BestOf(2))

    assert estimate.value == pytest.approx(0.5, abs=1e-14)
    assert estimate.sampling_error == pytest.approx(0, abs=1e-14)


def test_what_the_data_cannot_tell_is_not_told():
    """One prompt has no spread, pools of N no jackknife; the value is there all the same."""
    single = win_rate(Samples([[0.1, 0.9, 0.4]]), Samples([[0.2, 0.3, 0.5]]), BestOf(2))
    tight = win_rate(Samples([[0.1, 0.9]] * 3), Samples([[0.2, 0.3]] * 3), BestOf(2))
    without = win_rate(Samples([[0.1, 0.9, 0.4]]), Samples([[0.2, 0.3, 0.5]]), BestOf(2), jackknife=False)

    assert isnan(single.standard_error)
    assert single.sampling_error > 0
    assert isnan(tight.sampling_error)
    assert tight.value == 1
    assert isnan(without.sampling_error)
    assert isnan(difference(single, without).sampling_error)
    assert repr(single) == f"Estimate(0.778 over 1 prompt, ± {single.sampling_error:.3f} from sampling)"
    assert repr(tight) == "Estimate(1.000 ± 0.000 over 3 prompts)"
    with pytest.raises(ValueError, match=r"interval needs 2 prompts or more, .*, got 1\."):
        single.interval()


FINE = Samples([[0.1, 0.2, 0.3], [0.3, 0.4]])
REFUSED = [
    (lambda: Samples([]), "Samples needs at least one prompt, got select without rows."),
    (lambda: Samples([[0.1], []]), r"one axis of scores a prompt, got shape \(0,\) in select\[1\]"),
    (lambda: Samples([0.1, 0.2]), r"one axis of scores a prompt, got shape \(\) in select\[0\]"),
    (lambda: Samples([[0.1, np.nan]]), r"finite scores, got nan in select\[0\]\[1\]"),
    (lambda: Samples([[0.1], [0.2]], [[0.1], [-np.inf]]), r"finite scores, got -inf in judge\[1\]\[0\]"),
    (lambda: Samples([[0.1], [0.2]], [[0.1]]), "a judge for each prompt, got 2 and 1 rows"),
    (lambda: Samples([[0.1], [0.2]], [[0.1], [0.2, 0.3]]), "a judge for each score, got 1 and 2 in row 1"),
    (lambda: win_rate(FINE, Samples([[0.1]]), Standard()), "same prompts on both sides, got 2 of the policy and 1 of"),
    (lambda: win_rate(FINE, FINE, BestOf(3)), r"BestOf\(3\) needs .* 3 scores .*\(2,\)\. \(Prompt 1 of the policy\.\)"),
    (lambda: win_rate(FINE, FINE, Standard(), WorstOf(3)), r"WorstOf\(3\) .* \(Prompt 1 of the reference\.\)"),
    (
        lambda: win_rate(FINE, Samples([[0.1], [1.5, -2.0]]), Standard(), SoftBestOf(1, 0.1)),
        r"SoftBestOf\(n=1, temperature=0.1\) needs calibrated .* \[0, 1\], got -2 for prompt 1 of the reference",
    ),
    (lambda: win_rate(Samples([[-0.5, 0.5]]), Samples([[0.5]]), SoftBestOf(1, 0.1)), "got -0.5 for prompt 0 of the"),
    (lambda: win_rate(Samples([[7.0]]), Samples([[0.5]]), RewindAndRepeat(0.5, 1)), "got 7 for prompt 0 of the policy"),
    (lambda: Estimate(np.zeros(2)).interval(method="bca"), 'method "bootstrap" or "normal", got method=\'bca\''),
    (lambda: Estimate(np.array([0.1, 0.2])).interval(1.0), r"level in \(0, 1\), got level=1.0"),
    (
        lambda: difference(Estimate(np.zeros(2)), Estimate(np.zeros(3))),
        "difference needs the same prompts, got 2 and 3",
    ),
    (lambda: predict(FINE, [0.5, 0.5], [0.5, 0.5]), "K masses for K references, got 2 and 2 for the 3 of prompt 0"),
    (lambda: predict(FINE, [0.5, 0.6], [0.5, 0.5]), r"policy_mass of K numbers >= 0 that sum to 1, got \[0.5, 0.6\]"),
    (lambda: predict(FINE, [0.5, 0.5], [1.5, -0.5]), "base_mass of K numbers >= 0 that sum to 1"),
    (lambda: predict(FINE, [0.5, np.nan], [0.5, 0.5]), "policy_mass of K numbers"),
    (lambda: predict(Samples([[1.0, 2.0]]), [0, 1], [0, 1]), "two bins or more, got all of both sides in one of 2"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refuses_what_it_cannot_do(wrong, message):
    """Each error names the thing, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        wrong()


def test_samples_are_a_copy_and_show_their_size():
    """Later changes of the caller's arrays do not reach them."""
    scores = np.ones((2, 3))
    pool = Samples(scores)
    scores[:] = np.nan

    assert pool.judge is pool.select
    assert np.isfinite(pool.select).all()
    assert repr(pool) == "Samples(P=2, m=3)"
    assert len(pool) == 2


def test_influences_of_a_mean():
    """An estimate put together by hand: the mean of 4 numbers has the jackknife variance s^2 / 4."""
    numbers = np.array([1.0, 5.0, 2.0, 4.0])
    without = (numbers.sum() - numbers) / 3
    estimate = Estimate(np.array([3.0]), (Influence(Samples([numbers]), without),))

    assert estimate.sampling_error == pytest.approx(numbers.std(ddof=1) / 2)


def mass(law_of_u, k):
    """Mass in each of k bins of a distribution on [0, 1] given by its CDF."""
    return np.diff(law_of_u(np.arange(k + 1) / k))


@settings(max_examples=30, deadline=None)
@given(pool=POOL, weights=st.lists(st.integers(1, 9), min_size=12, max_size=12))
def test_prediction_is_the_double_sum_over_unequal_pairs(pool, weights):
    """Straight from the formula, ties sharing the mass of their bins by averaging over every order of them."""
    k = len(pool)
    a, b = (np.array(w) / sum(w) for w in (weights[:k], weights[-k:]))
    order = sorted(range(k), key=lambda i: pool[i][0])
    shared = [
        {i: np.mean([w[r] for r in range(k) if pool[order[r]][0] == pool[i][0]]) for i in range(k)} for w in (a, b)
    ]
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    total = sum(shared[0][i] * shared[1][j] for i, j in pairs)
    expected = sum(shared[0][i] * shared[1][j] * beats(pool[i][1], pool[j][1]) for i, j in pairs) / total

    assert predict(samples(pool), a, b).win_rate.value == pytest.approx(expected, abs=1e-12)
    assert predict(samples(pool), a, b).ess == pytest.approx(min(1 / sum(a**2), 1 / sum(b**2)))


@settings(max_examples=30, deadline=None)
@given(pool=POOL, weights=st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_prediction_for_equal_sides_is_a_half(pool, weights):
    """A = B, uniform or not: no side can be ahead."""
    share = np.array(weights[: len(pool)]) / sum(weights[: len(pool)])

    assert predict(samples(pool), share, share).win_rate.value == pytest.approx(0.5, abs=1e-12)


def test_prediction_under_the_proxy_tends_to_theory():
    """Judge = proxy, Bo4 of the policy F = u^2 against Bo4 of the reference: W = 8/12."""
    pool = Samples(np.random.default_rng(11).normal(size=(1, 4096)))
    prediction = predict(pool, mass(lambda u: u**8, 4096), mass(lambda u: u**4, 4096))

    assert prediction.win_rate.value == pytest.approx(8 / 12, abs=1e-3)
    assert prediction.reliable


def judged(output, correlation):
    """The true win rate against a single reference draw, for an output mass on 400 bins of u and a normal judge."""
    z = ndtri((np.arange(400) + 0.5) / 400)
    return output @ ndtr(correlation * (z[:, None] - z) / sqrt(2 - 2 * correlation**2)).mean(1)


@pytest.mark.parametrize("power", [2, 6, 12])
@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
def test_prediction_finds_the_judge_s_win_rate_where_it_calls_itself_reliable(power, correlation):
    """Judge = a correlated normal: the truth is an integral over both outputs; off by .01 at most, beyond its noise."""
    rng = np.random.default_rng(power)
    truth = judged(mass(lambda u: u**power, 400), correlation)
    for k in (8, 24, 96):
        pools = normal_pools(rng, 12_000 // k, k, 0.0, correlation)
        prediction = predict(pools, mass(lambda u: u**power, k), np.full(k, 1 / k))
        error = abs(prediction.win_rate.value - truth) - 4 * prediction.win_rate.standard_error
        assert error < (0.01 if prediction.reliable else 0.15)
    assert prediction.reliable
    assert error < 0.001


def test_prediction_flags_a_policy_that_leaves_its_references():
    """All but all mass in the top bin of 8: it falls short by more than .03 and says so, as it does below 5."""
    pools = normal_pools(np.random.default_rng(12), 2000, 8, 0.0, 0.9)
    far, flat = mass(lambda u: u**64, 8), np.full(8, 1 / 8)
    prediction = predict(pools, far, flat)
    short = judged(mass(lambda u: u**64, 400), 0.9) - prediction.win_rate.value

    assert short - 4 * prediction.win_rate.standard_error > 0.03
    assert prediction.ess == predict(pools, flat, far).ess < 1.1
    assert predict(pools, flat, flat).ess == pytest.approx(8)
    assert [Prediction(prediction.win_rate, ess).reliable for ess in (prediction.ess, 4.99, 5.0)] == [
        False,
        False,
        True,
    ]
