"""The check on held-out rollouts: against enumeration, brute force, and fresh draws of worlds whose truth is known."""

import json
from itertools import combinations, permutations
from typing import Any

import jaxtyping
import numpy as np
import pytest
from exact import Exact
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose

from calibrated_rewards.evaluation import (
    Estimate,
    HeldOutCheck,
    Samples,
    check_log_ratios,
    compare_log_ratios,
    realised_share,
    weighted_win_rate,
    win_rate,
)
from calibrated_rewards.evaluation.importance_weights import HeldOutPolicy, PolicyTooFarError
from calibrated_rewards.theory.procedures import BestOf, SoftBestOf, Standard, WorstOf

PROCEDURES = {"Standard()": Standard(), "BestOf(n=4)": BestOf(4), "WorstOf(n=4)": WorstOf(4)}
numbers = st.floats(-2, 2).map(lambda x: round(x, 1))


def select(scores: np.ndarray, chosen: tuple[int, ...], worst: bool) -> list[int]:
    """Those of the chosen that may be selected: the best, or the worst, all that tie."""
    extreme = (min if worst else max)(scores[list(chosen)])
    return [i for i in chosen if scores[i] == extreme]


def brute_force(d: np.ndarray, scores: np.ndarray, judge: np.ndarray, n: int, worst: bool) -> tuple[float, float]:
    """The mean over all n rollouts and n others of weight times win, ties at random, and the mean of the weight."""
    wins, weights = [], []
    for ours in combinations(range(len(d)), n):
        weight = np.exp(d[list(ours)].sum())
        weights.append(weight)
        rest = [i for i in range(len(d)) if i not in ours]
        for theirs in combinations(rest, n):
            pairs = [(i, j) for i in select(scores, ours, worst) for j in select(scores, theirs, worst)]
            won = np.mean([(judge[i] > judge[j]) + (judge[i] == judge[j]) / 2 for i, j in pairs])
            wins.append(weight * won)
    return float(np.mean(wins)), float(np.mean(weights))


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_win_rate_is_that_of_all_choices_of_rollouts(n: int, worst: bool) -> None:
    """Wins and weights add up over all n rollouts and n others of each prompt, of unlike numbers of rollouts."""
    rng = np.random.default_rng(n)
    sizes = (7, 7, 8, 6)
    d, scores, judge = ([rng.normal(size=size) for size in sizes] for _ in range(3))
    judge = [np.round(row) for row in judge]
    procedure = WorstOf(n) if worst else BestOf(n)
    sums = np.array([brute_force(*rows, n, worst) for rows in zip(d, scores, judge, strict=True)])
    samples = Samples(scores, judge)
    assert weighted_win_rate(d, samples, procedure).value == pytest.approx(sums[:, 0].mean() / sums[:, 1].mean())
    by_prompt = weighted_win_rate(d, samples, procedure, "prompt").per_prompt
    assert_allclose(by_prompt, sums[:, 0] / sums[:, 1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(numbers, st.integers(0, 1), st.integers(0, 2)), min_size=4, max_size=5), st.integers(1, 2))
def test_tied_scores_are_selected_at_random(rows: list[tuple[float, int, int]], n: int) -> None:
    """Over all orders of the rollouts, the mean over tie-breaks is the exact one."""
    d, scores, judge = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    orders = [list(order) for order in permutations(range(len(d)))]
    samples = Samples([scores[order] for order in orders], [judge[order] for order in orders])
    found = weighted_win_rate([d[order] for order in orders], samples, BestOf(n), "prompt")
    won, weight = brute_force(d, scores, judge, n, worst=False)
    assert found.value == pytest.approx(won / weight, abs=0.03)


def draw(exact: Exact, K: int, prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of the world, and rollouts of its reference."""
    rows = np.arange(prompts) % len(exact.laws)
    return rows, np.stack([rng.choice(exact.laws.shape[1], K, p=exact.laws[row]) for row in rows])


def make_world(tied: bool) -> tuple[Exact, np.ndarray, np.ndarray]:
    """A world, the laws of a policy that has learned something and much noise, and log-ratios of the optimum."""
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(3, 60))
    exact = Exact(rng.dirichlet(np.ones(60), 3), np.round(scores) if tied else scores)
    target = 2 * exact.quantiles
    policy = exact.laws * np.exp(exact.quantiles + 0.5 * rng.normal(size=exact.laws.shape))
    return exact, policy / policy.sum(1, keepdims=True), target


@pytest.mark.parametrize("tied", [False, True])
def test_estimates_are_those_of_the_enumerated_world(tied: bool) -> None:
    """KL, win rates and correlation of many rollouts are what enumeration gives, within five standard errors."""
    exact, laws, target = make_world(tied)
    rows, drawn = draw(exact, 64, 600, np.random.default_rng(1))
    d = np.take_along_axis(np.log(laws / exact.laws)[rows], drawn, 1)
    scores = np.take_along_axis(exact.scores[rows], drawn, 1)
    check = check_log_ratios(d, Samples(scores), np.take_along_axis(target[rows], drawn, 1))
    expected = exact.win_rates(laws)
    for name in PROCEDURES:
        rate = check.win_rates["select"][name]
        assert rate.standard_error is not None
        assert rate.standard_error < 0.005
        assert abs(rate.value - expected[name]) < 5 * rate.standard_error
    assert check.kl.standard_error is not None
    assert abs(check.kl.value - exact.kl(laws)) < 5 * check.kl.standard_error
    assert check.kl_normalised.value < exact.kl(laws)
    log_ratio = np.log(laws / exact.laws)
    centred = [each - (exact.laws * each).sum(1, keepdims=True) for each in (log_ratio, target)]
    covariances = [(exact.laws * a * b).sum(1) for a in centred for b in centred]
    correlation = (covariances[1] / np.sqrt(covariances[0] * covariances[3])).mean()
    assert check.correlation is not None
    assert check.correlation.value == pytest.approx(correlation, abs=0.02)
    assert check.mean_weight.low is not None
    assert check.mean_weight.high is not None
    assert check.mean_weight.low < 1 < check.mean_weight.high
    ess = 1 / (laws**2 / exact.laws).sum(1).mean() * 64
    assert check.ess == pytest.approx(ess, rel=0.03)


def test_few_rollouts_have_no_bias_where_the_weights_are_random() -> None:
    """Of 12 rollouts a prompt the mean over many prompts is the truth; weights normalised in a prompt miss it."""
    rng = np.random.default_rng(3)
    u = rng.random((20_000, 12))
    d = 2 * u - np.log(np.expm1(2) / 2) + 0.4 * rng.normal(size=u.shape) - 0.08  # F(u) = (e^{2u} - 1) / (e^2 - 1)
    grid = (np.arange(100_000) + 0.5) / 100_000
    F = np.expm1(2 * grid) / np.expm1(2)
    truth = {
        "Standard()": 1 - F.mean(),
        "BestOf(n=4)": 1 - 4 * (F**4 * grid**3).mean(),
        "WorstOf(n=4)": 4 * ((1 - F) ** 4 * (1 - grid) ** 3).mean(),
    }
    for name, procedure in PROCEDURES.items():
        rate = weighted_win_rate(d, Samples(u), procedure)
        assert rate.standard_error < 0.002
        assert abs(rate.value - truth[name]) < 4 * rate.standard_error
        low = weighted_win_rate(d, Samples(u), procedure, "prompt")
        assert abs(low.value - truth[name]) > 3 * low.standard_error


def test_a_second_scorer_judges() -> None:
    """By another score the win rate is that of fresh draws of the policy, judged by it."""
    exact, laws, _ = make_world(tied=False)
    rng = np.random.default_rng(5)
    other = exact.scores + rng.normal(size=exact.scores.shape)
    rows, drawn = draw(exact, 48, 420, rng)

    def score(completions: np.ndarray) -> Samples:
        return Samples(*(np.take_along_axis(by[rows], completions, 1) for by in (exact.scores, other)))

    d = np.take_along_axis(np.log(laws / exact.laws)[rows], drawn, 1)
    fresh = np.stack([rng.choice(60, 48, p=laws[row]) for row in rows])
    references = score(np.stack([rng.choice(60, 48, p=exact.laws[row]) for row in rows]))
    check = check_log_ratios(d, score(drawn))
    for name, procedure in PROCEDURES.items():
        truth = win_rate(score(fresh), references, procedure, jackknife=False)
        rate = check.win_rates["judge"][name]
        assert rate.standard_error is not None
        assert abs(rate.value - truth.value) < 4 * np.hypot(rate.standard_error, truth.standard_error)
        assert abs(rate.value - check.win_rates["select"][name].value) > 0.01


def test_the_reference_itself_is_neutral() -> None:
    """At log-ratios 0 the KL is 0, every win rate and density ratio is neutral, and each rollout counts."""
    rng = np.random.default_rng(0)
    samples = Samples(np.round(rng.normal(size=(5, 9)), 1), rng.normal(size=(5, 9)))
    check = check_log_ratios(np.zeros((5, 9)), samples, rng.normal(size=(5, 9)))
    assert (check.kl.value, check.kl_normalised.value, check.mean_weight.value) == (0, 0, 1)
    rates = [rate.value for rates in check.win_rates.values() for rate in rates.values()]
    assert len(rates) == 6
    assert_allclose(rates, 0.5, atol=1e-12)
    assert check.ess == pytest.approx(9)
    assert_allclose([each.value for each in check.density_ratio if each is not None], 1)
    assert check.correlation is None
    assert check.share_by_u is None
    assert check.metrics()["held_out/correlation"] == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(-50, 50), min_size=3, max_size=3))
def test_constants_of_a_prompt_do_not_matter_where_weights_are_normalised_in_it(seed: int, shifts: list[float]) -> None:
    """With normalise="prompt" all but the mean weight is the same; with "pooled" one constant for all cancels."""
    rng = np.random.default_rng(seed)
    d, samples, target = rng.normal(size=(3, 8)), Samples(rng.normal(size=(3, 8))), rng.normal(size=(3, 8))
    moved = d + np.array(shifts)[:, None]
    one, other = (check_log_ratios(each, samples, target, normalise="prompt") for each in (d, moved))
    assert_allclose([*one.metrics().values()], [*other.metrics().values()], rtol=1e-6, atol=1e-9)
    first = weighted_win_rate(d, samples, BestOf(2)).value
    assert weighted_win_rate(d + shifts[0], samples, BestOf(2)).value == pytest.approx(first)


def test_density_ratios_and_share_of_a_policy_that_is_a_function_of_u() -> None:
    """A policy e^{3u} / Z has the ratios of its integral, and all of its KL is a function of u; noise takes half."""
    rng = np.random.default_rng(2)
    u, edges = rng.random((400, 50)), np.linspace(0, 1, 11)
    target = 3 * u - np.log(np.expm1(3) / 3)
    check = check_log_ratios(target, Samples(u), target)
    exact = np.diff(np.expm1(3 * edges)) / np.expm1(3) * 10
    for ratio, value in zip(check.density_ratio, exact, strict=True):
        assert ratio is not None
        assert ratio.value == pytest.approx(value, abs=0.05 * value)
    assert check.target_density_ratio is not None
    assert_allclose([float(each or 0) for each in check.target_density_ratio], exact, rtol=0.05)
    assert check.correlation is not None
    assert check.correlation.value == pytest.approx(1)
    assert check.share_by_u == pytest.approx(0.95, abs=0.03)  # the rank among 50 tells u to +-.07
    own = float((np.exp(target) * target).mean())
    sigma = np.sqrt(2 * own)  # noise of the same KL, sigma^2 / 2
    noisy = check_log_ratios(target + sigma * rng.normal(size=u.shape) - sigma**2 / 2, Samples(u))
    assert noisy.share_by_u == pytest.approx(0.48, abs=0.05)
    blind = check_log_ratios(sigma * rng.normal(size=u.shape) - sigma**2 / 2, Samples(u))
    assert blind.share_by_u is not None
    assert blind.share_by_u < 0.01


def test_a_difference_is_paired() -> None:
    """It is the difference of the two checks, and its interval is far narrower than theirs."""
    rng = np.random.default_rng(4)
    u = rng.random((80, 24))
    noise = 0.5 * rng.normal(size=u.shape) - 0.125
    a, b = u + noise, 1.1 * u + noise
    samples, target = Samples(u), 2 * u
    both = [check_log_ratios(each, samples, target) for each in (a, b)]
    compared = compare_log_ratios(b, a, samples, target)
    for name in PROCEDURES:
        gain, (one, other) = compared.win_rates["select"][name], (each.win_rates["select"][name] for each in both)
        assert gain.value == pytest.approx(other.value - one.value)
        assert gain.standard_error is not None
        assert one.standard_error is not None
        assert gain.standard_error < one.standard_error / 2
        assert gain.excludes(0.0)
    assert compared.kl.value == pytest.approx(both[1].kl.value - both[0].kl.value)
    assert compared.correlation is not None
    assert compared.correlation.value > 0
    same = compare_log_ratios(a, a, samples)
    assert [rate.value for rate in same.win_rates["select"].values()] == [0, 0, 0]
    assert same.kl.value == 0
    assert "best of 4" in str(compared)
    assert json.loads(json.dumps(compared.to_json()))["kl"]["value"] == compared.kl.value


def test_the_realised_share_is_the_ratio_of_the_gaps() -> None:
    """Its interval covers a known share, shrinks with prompts, and is refused where the optima do not differ."""
    rng = np.random.default_rng(0)

    def estimates(prompts: int, share: float) -> list[Estimate]:
        common = rng.normal(0.6, 0.1, prompts)
        gap = rng.normal(0.06, 0.05, prompts)
        gained = share * gap + rng.normal(0, 0.05, prompts)
        return [Estimate(each) for each in (common + gained, common, common + 0.1 + gap, common + 0.1)]

    covered = 0
    for _ in range(20):
        found = realised_share(*estimates(60, 0.4))
        assert found.low is not None
        assert found.high is not None
        covered += found.low < 0.4 < found.high
    assert covered >= 16
    exact = realised_share(*estimates(2000, 0.4))
    assert exact.value == pytest.approx(0.4, abs=0.08)
    assert exact.standard_error is not None
    assert exact.standard_error == pytest.approx(0.05 / 0.06 / np.sqrt(2000), rel=0.15)
    one, other, *_ = estimates(30, 0.4)
    with pytest.raises(ValueError, match=r"beyond doubt, got a gap of 0\.0000"):
        realised_share(one, other, one, one)
    with pytest.raises(ValueError, match="same prompts, got 30 and 2"):
        realised_share(one, other, *(Estimate(np.array([x, x])) for x in (0.7, 0.6)))
    with pytest.raises(ValueError, match="2 prompts or more, got 1"):
        realised_share(*(Estimate(np.array([x])) for x in (0.7, 0.6, 0.8, 0.5)))


def test_a_check_is_the_same_after_json_and_prints() -> None:
    """Of 0/1 scores most tenths of u are empty; everything can be read back, and is shown."""
    rng = np.random.default_rng(0)
    d = 0.3 * rng.normal(size=(25, 10)) - 0.045
    check = check_log_ratios(d, Samples(rng.integers(0, 2, (25, 10)), rng.normal(size=(25, 10))), d)
    assert None in check.density_ratio
    assert HeldOutCheck.from_json(json.loads(json.dumps(check.to_json()))) == check
    text = str(check)
    for words in ("25 prompts, 10 rollouts each: KL 0.0", "by judge", "best of 4", "optimum", "effective sample size"):
        assert words in text
    assert all(np.isfinite(value) for value in check.metrics().values())
    far = check_log_ratios(d + 3, Samples(rng.normal(size=(25, 10))))
    assert "the mean weight is 20." in str(far)
    assert "a few rollouts decide" in str(check_log_ratios(20 * d, Samples(rng.normal(size=(25, 10)))))


@pytest.mark.parametrize(("K", "names"), [(1, []), (2, ["Standard()"]), (8, [*PROCEDURES])])
def test_procedures_that_few_rollouts_allow(K: int, names: list[str]) -> None:
    """By default those for which both sides have their own; one that is asked for and cannot be is an error."""
    d = np.full((3, K), np.log(1.5))
    check = check_log_ratios(d, Samples(np.arange(3.0 * K).reshape(3, K)))
    assert [*check.win_rates["select"]] == names
    assert check.kl.value == pytest.approx(1.5 * np.log(1.5) - 0.5)
    assert check.kl_normalised.value == 0
    assert str(check)
    if K < 8:
        with pytest.raises(ValueError, match=f"BestOf.n=4. of both sides needs 8 rollouts a prompt, got {K}"):
            check_log_ratios(d, Samples(np.zeros((3, K))), procedures=[BestOf(4)])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"log_ratios": [[0.0, np.nan]]}, r"log_ratios needs finite numbers, got nan in log_ratios\[0\]\[1\]"),
        ({"log_ratios": [[np.inf, 0.0]]}, r"log_ratios needs finite numbers, got inf in log_ratios\[0\]\[0\]"),
        ({"targets": [[0.0, -np.inf]]}, r"log_ratios needs finite numbers, got -inf"),
        ({"log_ratios": [[0.0]]}, r"one number a rollout, got shape \(1,\) for 2 in row 0"),
        ({"log_ratios": [[0.0, 0.0]] * 2}, "a row for each prompt of the samples, got 2 for 1"),
        ({"log_ratios": [[800.0, 0.0]]}, "below 700, where e.d is finite, got 800"),
        ({"log_ratios": [[0.0, 800.0, 1.0]], "samples": Samples([[1.0, 2.0, 3.0]])}, "below 700"),
        ({"normalise": "no"}, "got normalise='no'"),
    ],
)
def test_log_ratios_that_are_none_are_an_error(
    change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not finite, of another shape, or of other prompts."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match=why):
        check_log_ratios(**{"log_ratios": [[0.0, 0.1]], "samples": Samples([[1.0, 2.0]]), **change})


def test_other_procedures_and_weights_that_vanish_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A procedure that reads the score, and log-ratios that leave weight on one rollout where two are drawn."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    samples = Samples([[0.1, 0.2, 0.3, 0.4]])
    with pytest.raises(TypeError, match="needs Standard, BestOf or WorstOf, got SoftBestOf"):
        weighted_win_rate([[0.0] * 4], samples, SoftBestOf(2, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight on 2 rollouts of each prompt, got numbers 9e\+03 nats apart"):
        weighted_win_rate([[0.0, -9000.0, -9000.0, -9000.0]], samples, BestOf(2))


def test_a_policy_that_is_too_far_is_told_from_numbers_that_are_wrong() -> None:
    """Both are a ValueError; a run that is only looked at goes on after the first."""
    samples = Samples([[0.1, 0.2, 0.3, 0.4]] * 2)
    with pytest.raises(PolicyTooFarError, match="below 700"):
        check_log_ratios([[800.0, 0.0, 0.0, 0.0]] * 2, samples)
    with pytest.raises(PolicyTooFarError, match="weight on 2 rollouts"):
        weighted_win_rate([[0.0, -9000.0, -9000.0, -9000.0]] * 2, samples, BestOf(2))
    with pytest.raises(ValueError, match="finite numbers, got nan") as error:
        check_log_ratios([[np.nan, 0.0, 0.0, 0.0]] * 2, samples)
    assert not isinstance(error.value, PolicyTooFarError)


def test_a_policy_that_writes_none_of_the_rollouts_has_finite_numbers() -> None:
    """Each weight rounds to 0: there is no share of a decile, and no warning of a division."""
    check = check_log_ratios([[-1000.0] * 8] * 2, Samples([np.arange(8.0)] * 2), [np.arange(8.0)] * 2)
    assert check.mean_weight.value == 0
    assert all(np.isfinite(value) for value in check.metrics().values())
    assert check.density_ratio == (None,) * 10
    assert "policy   -" in str(check)


def test_a_correlation_is_at_most_1() -> None:
    """So is its interval, which is stretched for few prompts."""
    d = [[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.5], [0.0, 0.1, 0.2, 0.4]]
    correlation = check_log_ratios(d, Samples([np.arange(4.0)] * 3), [np.arange(4.0)] * 3).correlation
    assert correlation is not None
    assert correlation.low is not None
    assert correlation.high is not None
    assert -1 <= correlation.low < correlation.value < correlation.high <= 1


def test_the_kl_estimate_varies_less_than_the_plain_one() -> None:
    """w log w - w + 1 has the mean of w log w, which is the KL, and less variance; it is never negative."""
    rng = np.random.default_rng(0)
    d = 0.5 * rng.normal(size=(4000, 16)) - 0.125
    policy = HeldOutPolicy.of(d, Samples(np.zeros_like(d)))
    plain = Estimate((np.exp(d) * d).mean(1))
    assert policy.kl.value == pytest.approx(0.125, abs=4 * policy.kl.standard_error)
    assert policy.kl.standard_error < 0.6 * plain.standard_error
    assert policy.kl.per_prompt.min() >= 0
