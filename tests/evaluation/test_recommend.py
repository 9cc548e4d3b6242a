"""One answer: the same beta wherever it is asked for, a promise that the truth keeps, and three sentences."""

import json
import re
import shlex

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import spearmanr

from calibrated_rewards import ReferenceTable, recommend
from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.frontier_results import FrontierPoint
from calibrated_rewards.evaluation.objectives import ExpectedScore, ExponentialUtility, OptimumAtKL, parse_objective
from calibrated_rewards.evaluation.recommendation import Recommendation
from calibrated_rewards.evaluation.references import References
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import parse_transform
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import NormalQuantile


def normals(prompts, rollouts, correlation=0.6, seed=0):
    """Scores of a reward model and of a judge correlated with it, for the same rollouts."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, prompts, rollouts))
    return Samples(x, correlation * x + np.sqrt(1 - correlation**2) * noise)


def table_of(samples):
    return ReferenceTable.build((f"prompt {i}", row) for i, row in enumerate(samples.select))


@pytest.mark.parametrize("procedure", [BestOf(8), WorstOf(4), Standard()])
def test_one_question_has_one_beta(procedure, tmp_path, capsys):
    """`recommend`, `expect`, the frontier and the command `reward` name the same number, whatever the estimator."""
    samples = normals(60, 40)
    table = ReferenceTable.build(
        ((f"prompt {i}", row) for i, row in enumerate(samples.select)), path=tmp_path / "table"
    )
    answer = recommend(tmp_path / "table", procedure, kl=0.4)
    named = parse_transform(answer.name)
    expected = expect(table, named.transform, kl=0.4, procedure=procedure, estimator=answer.estimator)
    (point,) = (point for point in answer.frontier.points if point.arm in (answer.procedure, "identity")[-1:])
    if not isinstance(procedure, Standard):
        arms = {"it": OptimumAtKL(procedure)}
        (point,) = estimate_frontier(samples, arms, [0.4], [procedure], table=table, estimator=answer.estimator).points
    reward = ["reward", str(tmp_path / "table"), "--reward-model", "http://127.0.0.1:9", "--server", "native"]
    how = ["--transform", answer.name, "--estimator", answer.estimator, "--no-verify", "--out", str(tmp_path / "r")]
    assert main([*reward, *how]) == 0
    printed = float(re.search(r"train with beta=(\S+)", capsys.readouterr().out)[1])
    assert answer.beta == expected.beta
    assert point.beta == pytest.approx(expected.beta, rel=1e-6)
    assert printed == pytest.approx(expected.beta, rel=1e-3)
    assert answer.own_win_rate == expected.win_rate


def test_the_first_lines_answer():
    """What to train, what it wins against what, whether K is enough; then a command and one table."""
    samples = normals(200, 32, 0.9)
    answer = recommend(References(samples, table_of(samples), "reward", "judge"), BestOf(4), kl=0.5)
    train, wins, enough, _, command, *rest = str(answer).splitlines()
    assert train == f"Train with best-of:4:0.5 (optimum for best of 4) and beta {answer.beta:.4g}."
    assert re.match(
        r"It should win \d\d\.\d % \[.*\] of best of 4 duels by judge, .* points \[.*\] from the raw score's", wins
    )
    assert enough.startswith("K = 32 is not enough: a policy that fits these references loses")
    assert enough.endswith(" would lose 1 point.")
    assert command.strip() == answer.command
    assert len([line for line in rest if line.startswith("  best-of:4")]) == 1
    assert recommend(table_of(normals(20, 900)), Standard(), kl=0.1).enough


def test_what_is_promised_by_another_judge_is_the_truth():
    """Normal scores with a judge correlated by .9: the raw score's win rate is an integral, at K far from infinite."""
    samples = normals(1500, 64, 0.9)
    (point,) = estimate_frontier(samples, {"raw": parse_objective("raw")}, [0.5], [BestOf(4)]).points
    rng = np.random.default_rng(1)
    # Under the raw score's optimum x is normal with mean 1 at KL 1/2; best of 4 of both, judged with noise.
    x, y = 1 + rng.normal(size=(400_000, 4)).max(axis=1), rng.normal(size=(400_000, 4)).max(axis=1)
    noise = np.sqrt(2 * (1 - 0.9**2)) * rng.normal(size=400_000)
    truth = np.mean(0.9 * (x - y) + noise > 0)
    estimate = point.win_rates["judge"]["BestOf(n=4)"]
    assert estimate.value == pytest.approx(truth, abs=3 * estimate.standard_error + 0.003)
    plain = RolloutsAtKL(samples, (BestOf(4),)).reweight("raw", parse_objective("raw").at(0.5), 0.5)
    assert truth - plain.win_rates[:, 1].mean() > 3 * estimate.standard_error  # what was removed
    own = win_rate(NormalQuantile(), beta_for_kl(NormalQuantile(), 0.5), BestOf(4))
    assert point.win_rates["reward"]["BestOf(n=4)"].value == pytest.approx(own, abs=0.004)


@pytest.mark.parametrize("correlation", [0.6, 0.9])
def test_finite_k_costs_by_a_judge_what_it_costs(correlation):
    """The policy that fits K references, drawn and judged on a grid of quantiles: its win rate is what is promised."""
    K, kl = 64, np.float64(0.5)
    samples = normals(1000, K, correlation)
    answer = recommend(References(samples, table_of(samples), "reward", "judge"), BestOf(4), kl, estimator="posterior")
    u = (np.arange(1000) + 0.5) / 1000
    x = ndtri(u)
    beats = ndtr(correlation * (x[:, None] - x) / np.sqrt(2 * (1 - correlation**2)))
    theirs = np.diff(np.concatenate([[0.0], (np.arange(1000) + 1) / 1000]) ** 4)
    rewards, rng, wins = values(answer.transform, K, "posterior")[::2], np.random.default_rng(1), []
    for _ in range(200):
        mass = np.exp((rewards[np.searchsorted(np.sort(rng.random(K)), u)] - rewards.max()) / answer.beta)
        ours = np.diff(np.concatenate([[0.0], np.cumsum(mass / mass.sum())]) ** 4)
        wins.append(ours @ beats @ theirs)
    (limit,) = (p.win_rates["judge"]["BestOf(n=4)"] for p in answer.frontier.points if p.arm == "best-of:4")
    assert answer.win_rate.value == pytest.approx(np.mean(wins), abs=0.02)
    assert abs(answer.win_rate.value - np.mean(wins)) < abs(limit.value - np.mean(wins))


def test_how_well_a_judge_agrees_sets_the_rate():
    """1 for a judge of the same order, .7 for one that agrees loosely or not at all; between them by Spearman's rho."""
    samples = normals(50, 40, 0.95)
    rho = np.mean([spearmanr(a, b)[0] for a, b in zip(samples.select, samples.judge, strict=True)])
    assert RolloutsAtKL(samples, ()).judge_rate == pytest.approx(0.7 + 0.3 * (rho - 0.6) / 0.4)
    assert RolloutsAtKL(Samples(samples.select, [np.exp(row) for row in samples.select]), ()).judge_rate == 1.0
    assert RolloutsAtKL(normals(50, 40, 0.0), ()).judge_rate == 0.7


def test_transforms_are_exact_by_the_score_that_selects():
    """Without ties theory's number, whatever the rollouts; with ties that of the table's own law."""
    arms = {"best-of:4": OptimumAtKL(BestOf(4)), "identity": parse_objective("identity")}
    for seed in 0, 1:
        best, identity = estimate_frontier(normals(10, 20, seed=seed), arms, [0.5], [BestOf(4)]).points
        assert best.win_rates["reward"]["BestOf(n=4)"].value == pytest.approx(0.8733, abs=5e-5)  # FORMULAS: .5
        assert identity.win_rates["reward"]["BestOf(n=4)"].value == pytest.approx(0.7998, abs=5e-5)
    tied = Samples(np.random.default_rng(0).integers(2, size=(40, 20)).astype(float))
    (point,) = estimate_frontier(tied, {"identity": arms["identity"]}, [0.2], [Standard()]).points
    expected = expect(table_of(tied), parse_transform("identity").transform, kl=0.2)
    assert point.win_rates["reward"]["Standard()"].value == pytest.approx(expected.win_rate, abs=5e-3)


@pytest.mark.parametrize(
    ("objective", "utility"),
    [
        (ExpectedScore(BestOf(3)), lambda r, p: float(np.sum(np.diff(r) * (1 - np.cumsum(p)[:-1] ** 3)))),
        (ExpectedScore(WorstOf(2)), lambda r, p: float(np.sum(np.diff(r) * (1 - np.cumsum(p)[:-1]) ** 2))),
        (ExponentialUtility(2.0), lambda r, p: float(np.log(p @ np.exp(2.0 * r)) / 2.0)),
    ],
    ids=["IAMA, best of 3", "IAMA, worst of 2", "RS-GRPO"],
)
def test_a_rival_is_at_its_own_optimum(objective, utility):
    """The policy of the fixed point has a higher utility than any nearby one of the same KL: no gradient is left."""
    scores = np.sort(np.random.default_rng(0).normal(size=6))
    pools = RolloutsAtKL(Samples(scores[None, :]), ())
    values = pools._solve_fixed_point(objective, 0.3)
    beta = pools.pools.beta_for_kl(values, 0.3)
    weights = pools.pools.tilted(values, beta)[0][0]

    def lagrangian(logits):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return utility(scores, p) - beta * float(p @ np.log(np.maximum(p * 6, 1e-300)))

    at, step = np.log(weights), 1e-4
    gradient = [(lagrangian(at + d) - lagrangian(at - d)) / (2 * step) for d in step * np.eye(6)]
    assert np.abs(gradient).max() < 1e-4
    assert lagrangian(at) > lagrangian(np.zeros(6)) + 1e-3


def test_calibration_helps_beyond_knowing_n():
    """Where prompts differ in scale, the raw score's own optimum for best of 4 spends its KL on the wide ones."""
    samples = normals(300, 48)
    wide = Samples([row * np.exp(0.7 * (i % 5 - 2)) for i, row in enumerate(samples.select)])
    arms = {name: parse_objective(name) for name in ("raw", "iama:4", "best-of:4")}
    raw, iama, best = estimate_frontier(wide, arms, [0.5], [BestOf(4)]).points
    by_arm = [each.win_rates["reward"]["BestOf(n=4)"].value for each in (raw, iama, best)]
    assert by_arm[0] + 0.02 < by_arm[1] < by_arm[2] - 0.02
    assert iama.kl_spread > 0.1


def test_saved_and_read_again(tmp_path, capsys):
    """JSON holds all of it; the command prints what the function says."""
    ReferenceTable.build(
        ((f"prompt {i}", row) for i, row in enumerate(normals(30, 24).select)), path=tmp_path / "table"
    )
    answer = recommend(tmp_path / "table", BestOf(2), kl=0.3)
    answer.save(tmp_path / "answer.json")
    assert Recommendation.load(tmp_path / "answer.json") == answer
    assert answer.transform == parse_transform("best-of:2:0.3").transform
    assert main(["recommend", str(tmp_path / "table"), "--best-of", "2", "--kl", "0.3"]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    (tmp_path / "answer.json").write_text(json.dumps({"beta": 1}))
    with pytest.raises(ValueError, match=r"answer\.json needs to be a recommendation that `save` wrote"):
        Recommendation.load(tmp_path / "answer.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kl", "9"], "best-of:4:9"),
        (["--best-of", "64"], "best of 64 needs 64 rollouts of each prompt or more, got K=24"),
        (["--best-of", "1-3000000"], "best of 1 to 3000000 needs 3000000 rollouts of each prompt or more, got K=24"),
        (["--judge", "nobody"], "is a bare table: --select and --judge need a run with rollouts"),
    ],
)
def test_what_cannot_be_answered_is_refused(options, says, tmp_path, capsys):
    """In the words of what to type, with exit code 2."""
    ReferenceTable.build(
        ((f"prompt {i}", row) for i, row in enumerate(normals(10, 24).select)), path=tmp_path / "table"
    )
    assert main(["recommend", str(tmp_path / "table"), *options]) == 2
    assert says in capsys.readouterr().err


def test_ties_are_not_called_too_few_references():
    """With 0/1 scores more references do not refine a rank, and no K is asked for."""
    rng = np.random.default_rng(0)
    scores = (rng.random((80, 32)) < rng.beta(2, 2, size=(80, 1))).astype(float)
    answer = recommend(table_of(Samples(scores)), BestOf(4), kl=0.2)
    assert answer.references_needed is None
    assert answer.enough
    assert re.search(r"(99|100).*% of the references tie with another", str(answer))
    # The raw score of two values is the identity on another scale, and the same policy.
    raw, identity = (point for point in answer.frontier.points if point.arm in ("raw", "identity"))
    assert raw.win_rates == identity.win_rates
    assert raw.beta == pytest.approx(2 * identity.beta)


def test_one_tie_does_not_make_k_enough():
    """Rounded as 16-bit scores are, or with a single tied pair, a small K costs what it costs without ties."""
    samples = normals(300, 16)
    plain = recommend(table_of(samples), BestOf(4), kl=0.5)
    pair = [row.copy() for row in samples.select]
    pair[0][1] = pair[0][0]
    rounded = [np.round(row * 16) / 16 for row in samples.select]
    for rows in pair, rounded:
        answer = recommend(table_of(Samples(rows)), BestOf(4), kl=0.5)
        assert answer.enough is False
        assert answer.loss == pytest.approx(plain.loss, abs=0.015)
        assert answer.references_needed > 32


def test_nothing_is_claimed_of_the_raw_score_from_too_few():
    """Where half the rollouts are fewer than the procedure draws, the raw score's win rate is not known."""
    answer = recommend(table_of(normals(100, 8)), BestOf(8), kl=0.5)
    assert answer.raw_win_rate is answer.gain is None
    assert "What the raw score wins is not known from so few rollouts" in str(answer)
    assert not answer.gain_shown


def test_the_raw_score_is_named_where_it_wins():
    """At a KL that steep transforms of 64 references cannot use, the first line does not say to train with one."""
    answer = recommend(table_of(normals(300, 64)), BestOf(4), kl=2.5)
    truth = win_rate(NormalQuantile(), beta_for_kl(NormalQuantile(), 2.5), BestOf(4))
    assert answer.raw_is_better == (truth > answer.own_win_rate + 0.002)
    assert str(answer).startswith("With K = 64 no transform beats the raw score") == answer.raw_is_better


FEW, OPEN = "; not certain: ", "; these data do not tell the two apart"


@given(
    st.floats(-0.3, 0.3),
    st.just(0.0) | st.floats(1e-6, 0.1),
    st.floats(1, 100),
    st.booleans(),
    st.sampled_from(["reward", "judge"]),
)
def test_a_verdict_never_contradicts_its_interval(value, half, ess, corrected, judge):
    """Whatever the gain: words of doubt where the interval holds 0, of few rollouts where only those leave doubt."""
    gain, rate = (IntervalEstimate(each, each - half, each + half, 0.1, 30) for each in (value, 0.6))
    rates, gains = ({name: {"p": each} for name in ("reward", "judge")} for each in (rate, gain))
    ess_of = {"p": ess}
    point = FrontierPoint("exp:5", 0.5, 0.0, 1.0, ess, ess_of, rates, gains, ess_of, corrected)
    doubt, verdict = point.format_doubt(gain, judge, "p"), point.verdict(judge, "p")
    holds_0 = value - half <= 0 <= value + half
    if half:
        assert (OPEN in doubt) == holds_0
        assert doubt.startswith(FEW) == (not holds_0 and verdict is None)
    else:  # both are known: the difference is one however small
        assert (verdict is None) == (value == 0 or not corrected)
        assert OPEN not in doubt
    assert (doubt == "") == (verdict is not None)
    assert verdict is None or (verdict == "better") == (value > 0)


@pytest.mark.parametrize(
    ("rollouts", "kl", "correlation"), [(16, 0.5, 0.9), (32, 0.2, 0.6), (32, 1.0, 0.9), (24, 0.5, 0.0)]
)
def test_the_printed_verdict_is_that_of_the_printed_interval(rollouts, kl, correlation):
    """Of recommend's second line and of frontier's first, with a judge and few rollouts."""
    samples = normals(60, rollouts, correlation)
    answer = recommend(References(samples, table_of(samples), "reward", "judge"), BestOf(4), kl)
    for line in str(answer).splitlines()[1], answer.frontier.headline():
        if "from the raw score" not in line and "from raw" not in line:
            assert "is not known from so few" in line
            continue
        low, high = map(float, re.search(r"points \[([+-][\d.]+), ([+-][\d.]+)\]", line).groups())
        assert (OPEN in line) <= (low <= 0 <= high)
        assert low > 0 or high < 0 or OPEN in line or FEW in line
    assert answer.gain_shown == (answer.gain is not None and OPEN not in str(answer) and FEW not in str(answer))


def test_the_highest_row_is_the_answer_or_the_reason_is_given():
    """Of 0/1 rewards the z-score, which spends more on some prompts, may win more: it says that it only compares."""
    rng = np.random.default_rng(0)
    passed = (rng.random((100, 32)) < rng.beta(0.6, 0.8, size=(100, 1))).astype(float)
    for samples in Samples(passed), normals(60, 64), normals(60, 200):
        answer = recommend(table_of(samples), BestOf(4), kl=0.2)
        rates = {point.arm: point.win_rates["reward"]["BestOf(n=4)"].value for point in answer.frontier.points}
        highest, arm = max(rates, key=rates.get), answer.name.rpartition(":")[0]
        higher = rates[highest] > rates[arm] + 0.003
        assert (f"\n{highest} is higher" in str(answer)) >= higher
        assert higher or highest != arm or "is higher" not in str(answer)
        if samples.select[0].max() == 1.0:
            assert "\nz-score is higher but only compares: the answer is a transform of the quantile" in str(answer)


@pytest.mark.parametrize("command", ["recommend", "frontier"])
def test_a_file_of_rollouts_is_sent_to_calibrate(command, tmp_path, capsys, monkeypatch):
    """And what it says to type works: the folder that it makes is answered for."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"p{i}", "completion": f"{k}", "score": rng.normal()} for i in range(9) for k in range(24)]
    (tmp_path / "my rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([command, "my rollouts.jsonl"]) == 2
    says = re.search(r"`calibrated-rewards (.*)`", capsys.readouterr().err)[1].replace("COLUMN", "score")
    assert main([*shlex.split(says), "--quiet"]) == 0
    assert main([command, "table/", "--kl", "0.2"]) == 0
    assert main([command, "nowhere"]) == 2
    assert "nowhere needs to be the folder of a calibration, got none: `calibrated-rewards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kl": 0.0}, "needs a finite kl > 0, in nats, got kl=0.0"),
        ({"kl": 50.0}, "best-of:4:50"),
        ({"procedure": BestOfUpTo(3, (1, 1, 2))}, "needs Standard, BestOf, BestOfUpTo without weights or WorstOf, got"),
        ({"judge": "gold"}, "a table has the scores of one scorer"),
    ],
)
def test_a_bad_question_is_a_value_error(options, says):
    """Whatever is wrong with it, and before anything is solved."""
    with pytest.raises(ValueError, match=re.escape(says)):
        recommend(table_of(normals(20, 24)), **options)
