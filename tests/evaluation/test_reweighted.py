"""The frontier without training: against theory, enumeration, simulation, and what no reward may depend on."""

import inspect
import itertools
import json
import re
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli import frontier
from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate, Samples, estimate_columns
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.frontier_results import (
    ERRORS,
    OWN_ERROR,
    FrontierEstimate,
    FrontierPoint,
    resolution_limit,
)
from calibrated_rewards.evaluation.objectives import OBJECTIVES, Fixed, OptimumAtKL, Transformed
from calibrated_rewards.evaluation.references import read_scores
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL
from calibrated_rewards.evaluation.win_rate import WeightedPools, predict, win_rates_of
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, Calibrated, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, bin_masses, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, NormalQuantile

PROCEDURES = (Standard(), BestOf(4), WorstOf(4))


def rates(found, arm, judge="reward"):
    """The win rates of one arm at the only KL."""
    (point,) = (point for point in found.points if point.arm == arm)
    return {procedure: value.value for procedure, value in point.win_rates[judge].items()}


def normals(prompts, rollouts, seed=0, correlation=0.6):
    """Rollouts whose judge's scores are correlated with those they are selected by."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, prompts, rollouts))
    return Samples(x, correlation * x + np.sqrt(1 - correlation**2) * noise)


@pytest.mark.parametrize("kl", [0.25, 1.0])
def test_transforms_are_as_good_as_theory_says(kl):
    """By the selecting score, a continuous model's win rates at the same KL, within O(1/K)."""
    transforms = {"identity": Identity(), "log": Log(), "exp:5": Exponential(5.0), "exp:-5": Exponential(-5.0)}
    errors = []
    for rollouts in 200, 800:
        pools = RolloutsAtKL(normals(2, rollouts), PROCEDURES)
        found = [pools.reweight(name, OBJECTIVES[name].at(kl), kl).win_rates.mean(axis=0) for name in transforms]
        truth = [[win_rate(each, beta_for_kl(each, kl), p) for p in PROCEDURES] for each in transforms.values()]
        errors.append((np.array(found)[:, : len(PROCEDURES)] - truth).ravel())
    coarse, fine = np.abs(errors)
    assert fine.max() < 3e-4
    assert fine.max() < coarse.max() / 3


def test_the_optimum_and_the_raw_score_are_as_good_as_theory_says():
    """The solved optimum at its KL; and a raw score of one normal law everywhere, whose quantile is NormalQuantile."""
    best = OptimumAtKL(BestOf(4)).at(0.5)
    found = estimate_frontier(normals(100, 500), {"raw": Fixed(Uncalibrated()), "best": Fixed(best)}, [0.5])
    for name, transform in {"raw": NormalQuantile(), "best": best.transform}.items():
        for procedure in PROCEDURES:
            truth = win_rate(transform, beta_for_kl(transform, 0.5), procedure)
            assert rates(found, name)[repr(procedure)] == pytest.approx(truth, abs=4e-3)


def test_prediction_from_bins_agrees_as_k_grows():
    """`evaluation.predict` integrates the exact law over each bin; the judge's verdicts are weighed alike."""
    gaps = []
    for rollouts in 50, 400:
        references = normals(20, rollouts)
        found = RolloutsAtKL(references, (BestOf(4),)).reweight("exp:5", OBJECTIVES["exp:5"].at(0.5), 0.5)
        transform = Exponential(5.0)
        mass = bin_masses(transform, beta_for_kl(transform, 0.5), BestOf(4), rollouts)
        predicted = predict(references, mass, bin_masses(transform, np.inf, BestOf(4), rollouts))
        gaps.append(abs(found.win_rates[:, 1].mean() - predicted.win_rate.value))
        assert found.ess[0] == pytest.approx(predicted.ess, rel=0.1)
    assert gaps[1] < min(1e-3, gaps[0] / 3)


def brute(select, weights, procedure, draws):
    """Output masses by all tuples of draws, ties to each of the drawn ones alike."""
    out = np.zeros(len(select))
    for chosen in itertools.product(range(len(select)), repeat=draws):
        drawn = np.array(chosen)
        wanted = select[drawn].max() if procedure == "best" else select[drawn].min()
        winners = drawn[select[drawn] == wanted]
        np.add.at(out, winners, np.prod(weights[drawn]) / len(winners))
    return out


@pytest.mark.parametrize("draws", [1, 2, 3, 4])
@pytest.mark.parametrize("which", ["best", "worst"])
def test_a_small_weighted_pool_by_enumeration(which, draws):
    """Masses and both kinds of win rate of pools with ties, of unequal sizes, weights not a function of the score."""
    rng = np.random.default_rng(draws)
    select, judge = (
        [np.array(row) for row in ([1.0, 0, 1, 2, 0], [3.0, 3, 1])],
        [rng.integers(3, size=n) for n in (5, 3)],
    )
    pools = WeightedPools(Samples(select, judge))
    weights = pools.filled(np.concatenate([rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(3))]), 0.0)
    procedure = BestOf(draws) if which == "best" else WorstOf(draws)
    ours, theirs = pools.output(weights, procedure), pools.output(pools.uniform, procedure)
    by_judge = win_rates_of(ours, theirs, pools.by_judge.beaten(theirs), itself=False)
    by_select = win_rates_of(ours, theirs, pools.by_select.beaten(theirs), itself=True)
    for p, size in enumerate((5, 3)):
        a = brute(select[p], weights[p, :size], which, draws)
        b = brute(select[p], np.full(size, 1 / size), which, draws)
        assert ours[p, :size] == pytest.approx(a, abs=1e-12)
        assert theirs[p, :size] == pytest.approx(b, abs=1e-12)
        pairs = [(i, j, a[i] * b[j]) for i in range(size) for j in range(size)]
        verdict = [(np.sign(judge[p][i] - judge[p][j]) + 1) / 2 * mass for i, j, mass in pairs if i != j]
        assert by_judge[p] == pytest.approx(sum(verdict) / sum(mass for i, j, mass in pairs if i != j), abs=1e-12)
        itself = [(np.sign(select[p][i] - select[p][j]) + 1) / 2 * mass for i, j, mass in pairs]
        assert by_select[p] == pytest.approx(sum(itself), abs=1e-12)


def test_by_simulation():
    """Draws of the weighted pool, the procedure run on them: what comes out, and how often it wins."""
    rng = np.random.default_rng(0)
    references = Samples([np.round(rng.normal(size=12), 1)], [rng.normal(size=12)])
    pools = WeightedPools(references)
    weights, _ = pools.tilted(pools.filled(references.select[0], 0.0), 0.7)
    procedure, runs = BestOf(3), 100_000
    outputs = []
    for law in weights[0], pools.uniform[0]:
        drawn = rng.choice(12, size=(runs, 3), p=law)
        picked = procedure.choose(references.select[0][drawn], rng)
        outputs.append(drawn[np.arange(runs), picked])
    ours, theirs = pools.output(weights, procedure), pools.output(pools.uniform, procedure)
    assert np.bincount(outputs[0], minlength=12) / runs == pytest.approx(ours[0], abs=0.006)
    ours_judged, theirs_judged = (references.judge[0][each] for each in outputs)
    apart = outputs[0] != outputs[1]
    simulated = (ours_judged > theirs_judged)[apart].mean()
    assert win_rates_of(ours, theirs, pools.by_judge.beaten(theirs), itself=False)[0] == pytest.approx(
        simulated, abs=0.006
    )


def test_a_procedure_known_by_its_density_alone():
    """`Calibrated` with the g of the best of three gives what `BestOf(3)` does; one that reads scores is refused."""
    g = Calibrated(np.square)
    found = estimate_frontier(normals(5, 40), {"identity": OBJECTIVES["identity"]}, [0.5], [BestOf(3), g])
    assert rates(found, "identity")[repr(g)] == pytest.approx(rates(found, "identity")["BestOf(n=3)"], abs=1e-9)
    with pytest.raises(ValueError, match=r"functions of the rank, got \[SoftBestOf"):
        estimate_frontier(normals(5, 40), procedures=[SoftBestOf(4, 1.0)])


@given(st.lists(st.lists(st.integers(-20, 20), min_size=6, max_size=9), min_size=2, max_size=4))
@settings(max_examples=12, deadline=None)
def test_ranks_know_nothing_of_the_scale(rows):
    """An increasing map of the raw scores changes nothing of a transform, whatever the ties."""
    wide = [[*row, -30, 30] for row in rows]
    arms = {name: OBJECTIVES[name] for name in ("identity", "exp:5")}
    judge = [np.cos(np.arange(len(row)) * 2.3) for row in wide]
    plain = estimate_frontier(Samples(wide, judge), arms, [0.3], PROCEDURES)
    mapped = estimate_frontier(Samples([np.array(row) ** 3 for row in wide], judge), arms, [0.3], PROCEDURES)
    assert plain == mapped


def test_the_raw_score_knows_the_scale():
    """Exponentiated scores make another optimum of the raw reward, and of everything that is not a rank."""
    references, arms = (
        normals(20, 60),
        {name: OBJECTIVES[name] for name in ("raw", "z-score", "par", "median", "log-sigmoid")},
    )
    plain = estimate_frontier(references, arms, [0.5])
    mapped = estimate_frontier(Samples([np.exp(row) for row in references.select], references.judge), arms, [0.5])
    for name in arms:
        assert abs(rates(plain, name)["Standard()"] - rates(mapped, name)["Standard()"]) > 1e-3


def test_shifts_between_prompts():
    """Each calibration takes a shift of a prompt away, and the raw score does too: its optimum is by prompt."""
    references = normals(10, 50)
    shifted = Samples([row + 64.0 * p for p, row in enumerate(references.select)], references.judge)
    plain, moved = (estimate_frontier(each, OBJECTIVES, [0.5], PROCEDURES) for each in (references, shifted))
    for a, b in zip(plain.points, moved.points, strict=True):
        assert b.beta == pytest.approx(a.beta, rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_arms_spend_the_same_kl(name):
    """The mean KL of the weights is the one asked for, by a sum of its own, with ragged rows; so is the ess."""
    rng = np.random.default_rng(3)
    select = [rng.normal(size=n) * (1 + n / 20) for n in (20, 31, 40)]
    point = RolloutsAtKL(Samples(select), (Standard(),)).reweight(name, OBJECTIVES[name].at(0.6), 0.6)
    from calibrated_rewards.table.reference_table import ReferenceTable

    spent, squares = [], []
    for row in select:
        table = ReferenceTable.build([("p", row)])
        v = OBJECTIVES[name].at(0.6)(table, table.rows(["p"] * len(row)), np.float32(row).astype(np.float64))
        w = np.exp((v - v.max()) / point.beta)
        w /= w.sum()
        spent.append(np.log(len(row)) + np.sum(w * np.log(np.maximum(w, 1e-300))))
        squares.append(np.sum(w**2))
    assert point.kl == 0.6
    assert np.mean(spent) == pytest.approx(0.6, rel=1e-6)
    assert point.kl_spread == pytest.approx(np.std(spent), rel=1e-6, abs=1e-9)
    assert point.ess[0] == pytest.approx(1 / np.mean(squares), rel=1e-6)


def test_intervals_are_those_of_each_estimate():
    """The shared resampling gives the bootstrap of `IntervalEstimate.of`, gains are paired, and one prompt has none."""
    rng = np.random.default_rng(0)
    per_prompt = rng.normal(size=(30, 3))
    for one, column in zip(estimate_columns(per_prompt), per_prompt.T, strict=True):
        expected = IntervalEstimate.of(Estimate(np.ascontiguousarray(column)))
        assert [one.value, one.low, one.high] == pytest.approx([expected.value, expected.low, expected.high])
        assert one.standard_error == pytest.approx(expected.standard_error)
    assert estimate_columns(per_prompt[:1])[0].low is None


def test_gains_are_paired():
    """Over the first arm, prompt by prompt: zero without width of itself, and much narrower than the rates."""
    raw, z, _ = estimate_frontier(normals(200, 60), dict(list(OBJECTIVES.items())[:3]), [0.5]).points
    assert (raw.gains["judge"]["Standard()"].low, raw.gains["judge"]["Standard()"].high) == (0.0, 0.0)
    gain, rate = z.gains["judge"]["BestOf(n=4)"], z.win_rates["judge"]["BestOf(n=4)"]
    assert gain.value == pytest.approx(rate.value - raw.win_rates["judge"]["BestOf(n=4)"].value)
    assert gain.standard_error < rate.standard_error / 2


def test_a_kl_out_of_reach_is_left_out_in_words():
    """Ties or too few rollouts bound the KL; an arm that cannot go there is missing, and none at all is an error."""
    references = Samples([[0.0, 1.0, 1.0, 1.0]] * 3, [[0.0, 1.0, 2.0, 3.0]] * 3)
    half = Fixed(Transformed(Identity()))
    found = estimate_frontier(references, {"identity": half}, [0.1, 1.0], [Standard()])
    assert [point.kl for point in found.points] == [0.1]
    assert found.left_out == ("identity at KL 1: these rollouts, K >= 4, reach a KL between 0 and 0.288, got kl=1.0.",)
    assert "Left out: identity at KL 1" in str(found)
    with pytest.raises(ValueError, match="needs a KL that an objective reaches, got none: identity at KL 1"):
        estimate_frontier(references, {"identity": half}, [1.0], [Standard()])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"kls": [0.0]}, "finite kls > 0"), ({"kls": []}, "finite kls > 0"), ({"procedures": []}, "needs procedures")],
)
def test_what_cannot_be_compared_is_refused(options, says):
    """Budgets of nothing and no procedure at all."""
    with pytest.raises(ValueError, match=says):
        estimate_frontier(normals(3, 8), **options)
    with pytest.raises(ValueError, match="2 rollouts of each prompt"):
        estimate_frontier(Samples([[1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"in float32 as tables do, got -1e\+39"):
        estimate_frontier(Samples([[1.0, -1e39, 2.0]]))
    with pytest.raises(ValueError, match="selected_by='judge' and judged_by='judge' with two arrays"):
        estimate_frontier(normals(3, 8), selected_by="judge")
    three, raw = Samples([[1.0, 2.0, 4.0]]), {"raw": OBJECTIVES["raw"]}
    (point,) = estimate_frontier(three, raw, [0.1], [Standard()], selected_by="judge").points
    assert [*point.win_rates] == ["judge"]


@pytest.mark.parametrize("kls", [0.5, ["a"], "0.5", [True], np.array([0.5, np.nan])])
def test_kls_are_numbers(kls):
    """A list of them, or an error that says so."""
    with pytest.raises(ValueError, match="finite kls > 0, a list of numbers, got kls="):
        inspect.unwrap(estimate_frontier)(normals(3, 8), kls=kls)


def test_kept_and_read_again(tmp_path):
    """The same object after JSON; a file of something else is refused by name."""
    found = estimate_frontier(normals(6, 30), OBJECTIVES, [0.5, 30.0])
    found.save(tmp_path / "new" / "frontier.json")
    assert FrontierEstimate.load(tmp_path / "new" / "frontier.json") == found
    (tmp_path / "other.json").write_text(json.dumps({"points": [{"arm": "raw"}]}))
    whole = (tmp_path / "new" / "frontier.json").read_text()
    broken = whole[: len(whole) // 2], "", "null", re.sub('"value": ([^,]+)', r'"value": "\1"', whole, count=1)
    for text in ((tmp_path / "other.json").read_text(), *broken, whole.replace('"value": ', '"value": NaN, "x": ', 1)):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json needs to be a frontier"):
            FrontierEstimate.load(tmp_path / "other.json")


def test_the_errors_are_those_that_were_measured():
    """By the committed results and by the table of docs/evidence/results.md, number for number."""
    root = Path(__file__).parents[2]
    measured = json.loads((root / "benchmarks" / "results" / "reweighted.json").read_text())["results"]
    rows = zip(measured["errors"], measured["errors_of_gains"], strict=True)
    expected = [(rate["to"], round(rate["largest"], 3), round(gain["largest"], 3)) for rate, gain in rows]
    own = [row["error_of_gain"] for row in measured["rows"] if row["judge"] == "reward"]
    assert round(max(map(abs, own)), 2) == OWN_ERROR
    assert [(below, *others) for below, *others in ERRORS[:-1]] == expected[:-1]
    assert ERRORS[-1] == (inf, *expected[-1][1:])
    page = (root / "docs" / "evidence" / "results.md").read_text()
    section = page.partition("\n## How far off a frontier is\n")[2].partition("\n## ")[0]
    table = [
        line
        for line in section.splitlines()
        if line.startswith(("| below", "| from", "| 1", "| 3", "| 5", "| 8", "| 2"))
    ]
    cells = [[float(cell) for cell in line.split("|")[2:6:2]] for line in table]
    assert cells == [list(each[1:]) for each in ERRORS]
    assert [resolution_limit(ess) for ess in (1.0, 1.5, 2.99, 5.0, 49.0, 1e12, inf)] == [
        0.088,
        0.07,
        0.07,
        0.013,
        0.006,
        0.002,
        0.002,
    ]


@given(st.floats(-0.3, 0.3), st.floats(0, 0.1), st.floats(1, 100), st.floats(1, 100))
def test_a_gain_is_told_only_beyond_its_margin(value, half, ess, of_gain):
    """Its interval, widened by what gains were off at that ESS, leaves out 0; without an interval nothing is told."""
    rate = {name: {"p": IntervalEstimate(0.6, 0.5, 0.7, 0.1, 30)} for name in ("reward", "judge")}
    gain = IntervalEstimate(value, value - half, value + half, 0.1, 30)
    point = FrontierPoint(
        "exp:5", 0.5, 0.0, 1.0, ess, {"p": ess}, rate, {name: {"p": gain} for name in rate}, {"p": of_gain}
    )
    wide = half + resolution_limit(of_gain)
    assert point.verdict("judge", "p") == ("better" if value > wide else "worse" if value < -wide else None)
    wide = half + min(resolution_limit(of_gain), OWN_ERROR)  # by the score that selects
    assert point.verdict("reward", "p") == ("better" if value > wide else "worse" if value < -wide else None)
    assert replace(point, gains={}).verdict("judge", "p") is None
    alone = IntervalEstimate(value, None, None, None, 1)
    assert replace(point, gains={"judge": {"p": alone}}).verdict("judge", "p") is None


def test_a_gain_rests_on_the_lesser_of_two():
    """Of the arm's effective rollouts and the first arm's, by procedure."""
    raw, log = estimate_frontier(normals(100, 60), {name: OBJECTIVES[name] for name in ("raw", "log")}, [0.5]).points
    assert log.ess_of["BestOf(n=4)"] > 8 > 5 > raw.ess_of["BestOf(n=4)"]
    assert log.ess_of_gains == {name: min(raw.ess_of[name], log.ess_of[name]) for name in log.ess_of}


def test_words_say_what_is_told_apart():
    """Better, worse and neither against the first arm, and a mark on what rests on too little."""
    same = {
        "raw": OBJECTIVES["raw"],
        "again": OBJECTIVES["raw"],
        "exp:10": OBJECTIVES["exp:10"],
        "log": OBJECTIVES["log"],
    }

    def judged(rollouts, start, judge="reward"):
        text = estimate_frontier(normals(100, rollouts), same, [0.5]).format(all_tables=True)
        rows = text[text.index(f"KL 0.5, judged by {judge}") :].splitlines()
        return next(line for line in rows if line.startswith(start)), text

    best, _ = judged(250, "  best of 4 at KL 0.5, against raw")
    assert "not told apart: again" in best
    assert best.index("better: exp:10 +") < best.index("worse: log -")
    # An interval without 0, of a gain that is smaller than what gains were off at so few.
    best, _ = judged(30, "  best of 4 at KL 0.5, against raw", "judge")
    assert "better" not in best
    assert "not told apart: again, exp:10, log" in best
    assert judged(60, "  best of 4 at KL 0.5, against raw")[0].count("~") == 2
    assert judged(60, "  exp:10")[0].count("~") == 0  # what is exact rests on no rollouts
    assert judged(60, "  raw")[0].count("~") == 1
    _, text = judged(60, "  raw")
    assert "up to 0.011 at an ESS of\n3 to 5, 0.07 at 1.5 to 3, 0.098 below" in text
    assert "~" not in str(estimate_frontier(normals(100, 60), {"log": OBJECTIVES["log"]}, [0.1]))


def test_few_prompts_are_said_first():
    """Intervals within what a rate can be, and words before any claim; one prompt has no intervals at all."""
    arms = {name: OBJECTIVES[name] for name in ("raw", "log")}
    found = estimate_frontier(normals(3, 60), arms, [0.5])
    text = str(found)
    assert text.startswith("3 prompts are few: below 20 even the intervals are rough")
    assert text.index("Without training, at KL 0.5") < text.index("against raw") < text.index("3 prompts, 60 rollouts")
    per_prompt = np.random.default_rng(1).normal(size=(5, 2))
    for one, column in zip(estimate_columns(per_prompt), per_prompt.T, strict=True):
        expected = IntervalEstimate.of(Estimate(column))
        assert [one.low, one.high] == pytest.approx([expected.low, expected.high])
    assert estimate_columns(np.array([[0.5], [1.0]]))[0].high > 1
    noisy = estimate_frontier(normals(2, 60, seed=5), arms, [0.5]).points
    ends = [rate for point in noisy for by in point.win_rates.values() for rate in by.values()]
    assert all(0 <= rate.low <= rate.value <= rate.high <= 1 for rate in ends)
    assert {0.0, 1.0} & {end for rate in ends for end in (rate.low, rate.high)}
    one = str(estimate_frontier(normals(1, 60), arms, [0.5]))
    assert one.startswith("1 prompt says nothing of others")
    assert "\n1 prompt, 60 rollouts of each or more." in one
    assert "nothing is claimed" in one
    assert "interval" not in one.split("there are no intervals")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A calibration by two scorers."""
    at = tmp_path_factory.mktemp("run")
    scorers = {"reward": NumberScorer(), "judge": HashScorer()}
    tables = calibrate([f"p{i}" for i in range(40)], NumberSampler(), scorers, k=24, out=at, show_progress=False)
    return at, tables


def asked(capsys, *words):
    """What the command says."""
    parser = ArgumentParser()
    frontier.add_arguments(parser)
    assert frontier.run(parser.parse_args([*map(str, words)])) == 0
    return capsys.readouterr().out


def test_rollouts_of_a_run_keep_their_pairs(run):
    """Sorted, both scores are those of the tables; and each rollout has its own two, as the scorers give them."""
    import pyarrow.parquet as pq

    at, tables = run
    references = read_scores(at, "reward", "judge")
    for name, rows in ("reward", references.select), ("judge", references.judge):
        ours = sorted(tuple(np.sort(row)) for row in rows)
        assert ours == sorted(tuple(scores.astype(float)) for _, scores in tables[name].items())
    pairs = {pair for rows in zip(references.select, references.judge, strict=True) for pair in zip(*rows, strict=True)}
    stored = [pq.read_table(path) for path in (at / "rollouts").glob("*.parquet")]
    told = {(row["prompt"], row["completion"]) for table in stored for row in table.to_pylist()}
    expected = {(float(NumberScorer()([p], [c])[0]), float(HashScorer()([p], [c])[0])) for p, c in told}
    assert pairs == expected


def test_the_command(run, capsys, tmp_path):
    """A run is selected by its reward and judged by its judge; JSON, a file, and the arms that were asked for."""
    at, _ = run
    words = ("--kl", "0.3", "--arms", "raw", "exp:3", "log", "--best-of", "2", "--out", tmp_path / "f.json")
    told = json.loads(asked(capsys, at, *words, "--json"))
    assert [point["arm"] for point in told["points"]] == ["raw", "exp:3", "log"]
    assert list(told["points"][0]["win_rates"]) == ["reward", "judge"]
    assert told["procedures"] == ["Standard()", "BestOf(n=2)"]
    found = estimate_frontier(
        read_scores(at, "reward", "judge"), {"raw": OBJECTIVES["raw"]}, [0.3], [Standard(), BestOf(2)]
    )
    kept = FrontierEstimate.load(tmp_path / "f.json")
    assert kept.points[0] == found.points[0]
    swapped = json.loads(asked(capsys, at, "--select", "judge", "--json", "--kl", "0.3", "--arms", "raw"))
    assert list(swapped["points"][0]["win_rates"]) == ["judge", "reward"]
    assert swapped["procedures"] == ["Standard()", "BestOf(n=4)", "WorstOf(n=4)"]


def test_the_command_for_several_n(run, capsys):
    """The headline is of the first N above 1; the table has a column for each N, of the headline's KL."""
    at, _ = run
    words = (at, "--arms", "raw", "best-of:4", "--kl", "0.3", "0.5", "--best-of", "1", "4", "2")
    points = [point for point in json.loads(asked(capsys, *words, "--json"))["points"] if point["kl"] == 0.5]
    text = asked(capsys, *words)
    assert text.startswith("Without training, at KL 0.5 and best of 4, judged by judge: optimum for best of 4 wins")
    for judge in "judge", "reward":
        head, *rows = text.partition(f"KL 0.5, judged by {judge}\n")[2].splitlines()[:3]
        assert re.split("  +", head.strip()) == ["best of 1", "best of 4", "best of 2", "smallest ESS", "beta"]
        for row, point in zip(rows, points, strict=True):
            cells = re.split("  +", row.strip())
            assert cells[0] == point["arm"]
            for cell, procedure in zip(cells[1:4], ("BestOf(n=1)", "BestOf(n=4)", "BestOf(n=2)"), strict=True):
                assert cell.startswith(f"{point['win_rates'][judge][procedure]['value']:.3f}")
            assert cells[4] == f"{min(point['ess_of'].values()):.1f}"
    assert text.count(", judged by ") == 3
    one = asked(capsys, at, "--arms", "raw", "--kl", "0.3", "0.5", "--best-of", "2")
    head = one.partition("best of 2, judged by judge\n")[2].splitlines()[0]
    assert re.split("  +", head.strip()) == ["KL 0.3", "KL 0.5", "ESS at KL 0.5", "beta at KL 0.5"]
    worst = asked(capsys, at, "--arms", "raw", "--kl", "0.5", "--worst-of", "2")
    assert worst.startswith("Without training, at KL 0.5 and worst of 2, judged by judge")


def test_the_command_takes_an_estimator(run, capsys):
    """Betas are those of `expect` on the table with the same estimator, which differ by estimator."""
    at, tables = run
    betas = {}
    for estimator in "empirical", "posterior":
        words = ("--kl", "0.3", "--arms", "best-of:4", "--best-of", "4", "--estimator", estimator, "--json")
        betas[estimator] = json.loads(asked(capsys, at, *words))["points"][0]["beta"]
        transform = scaled(optimum(BestOf(4), kl=0.3).transform, "unit")
        expected = expect(tables["reward"], transform, kl=0.3, procedure=BestOf(4), estimator=estimator)
        assert betas[estimator] == pytest.approx(expected.beta, rel=1e-6)
    assert betas["empirical"] != pytest.approx(betas["posterior"], rel=1e-3)


def test_the_command_for_an_n_that_is_not_known(run, capsys):
    """As an arm and as a procedure, by one name; its optimum is among the default arms, and needs N rollouts."""
    at, _ = run
    words = ("--kl", "0.3", "--json", "--best-of", "1-3", "1")
    points = json.loads(asked(capsys, at, *words))["points"]
    mixture = BestOfUpTo(3)
    assert [*points[0]["win_rates"]["judge"]] == ["Standard()", repr(mixture), "BestOf(n=1)"]
    assert [point["arm"] for point in points][-2:] == ["best-of:1-3", "best-of:1"]
    named = json.loads(asked(capsys, at, *words, "--arms", "raw", "best-of:1-3"))["points"]
    assert named == [point for point in points if point["arm"] in ("raw", "best-of:1-3")]
    with pytest.raises(ValueError, match="best of 1 to 100 needs 100 rollouts of each prompt or more"):
        asked(capsys, at, "--best-of", "1-100")


def test_a_mixture_is_what_its_g_makes_of_the_rollouts():
    """`Calibrated` with 1 + C + C^2 gives what `BestOfUpTo(3)` does, weighted rollout by rollout."""
    mixture, g = BestOfUpTo(3), Calibrated(lambda c: 1 + c + c**2)
    found = estimate_frontier(normals(5, 40), {"identity": OBJECTIVES["identity"]}, [0.5], [mixture, g])
    assert rates(found, "identity")[repr(g)] == pytest.approx(rates(found, "identity")[repr(mixture)], abs=1e-9)


def test_the_command_on_a_bare_table(run, capsys, tmp_path):
    """Judged by the scores themselves, the same as of the run; a judge needs rollouts, and a table a directory."""
    at, _ = run
    words = ("--kl", "0.3", "--arms", "identity", "--json")
    bare, whole = (json.loads(asked(capsys, path, *words))["points"][0] for path in (at / "reward", at))
    assert list(bare["win_rates"]) == ["reward"]
    assert bare["win_rates"]["reward"]["Standard()"]["value"] == whole["win_rates"]["reward"]["Standard()"]["value"]
    with pytest.raises(ValueError, match="bare table"):
        asked(capsys, at / "reward", "--judge", "judge")
    with pytest.raises(ValueError, match="got neither: `calibrated-rewards calibrate` makes one"):
        asked(capsys, tmp_path)
    (tmp_path / "reward.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a calibrated reward: name the directory of its calibration, or .*table"):
        asked(capsys, tmp_path)
    for name in "--out", "--plot":
        with pytest.raises(ValueError, match=f"{name} needs a file, got the folder"):
            asked(capsys, at / "reward", name, tmp_path)
    with pytest.raises(ValueError, match="scores of reward, judge, got 'gold'"):
        asked(capsys, at, "--judge", "gold")


def test_arms_by_name():
    """As transforms are called elsewhere; what is none is refused with the list."""
    assert frontier.parse_arm("worst-of:3") == ("worst-of:3", OptimumAtKL(WorstOf(3)))
    assert frontier.parse_arm("best-of:1-16") == ("best-of:1-16", OptimumAtKL(BestOfUpTo(16)))
    with pytest.raises(ArgumentTypeError, match="an objective is raw, z-score"):
        frontier.parse_arm("best-of:zero")
    with pytest.raises(ArgumentTypeError, match="BestOf needs"):
        frontier.parse_arm("best-of:0")


@pytest.mark.parametrize("name", ["identity:0.5", "log:0.5", "exp:10:0.5", "best-of:4:1.0"])
def test_an_objective_names_no_kl(name):
    """All are compared at the KLs of --kl: a KL in a name would be dropped."""
    with pytest.raises(ArgumentTypeError, match=f"without a KL, got '{name}'"):
        frontier.parse_arm(name)


@pytest.mark.parametrize("name", ["iama:٣", "tailrl:٣", "rs-grpo:٢", "best-of:٣", "best-of:1-٣", "exp:\u0661"])
def test_a_number_in_a_name_has_ascii_digits(name):
    """Python reads digits of all scripts; a shell's user meant something else."""
    with pytest.raises(ArgumentTypeError, match="an objective is"):
        frontier.parse_arm(name)


def test_a_soft_maximum_of_tiny_scores_is_the_raw_score():
    """e^{b r} is 1 + b r where r is 1e-30, and of differences that are much larger the highest score alone counts."""
    scores = normals(20, 32).select
    found = estimate_frontier(
        Samples(np.array(scores) * 1e-30), {name: frontier.parse_arm(name)[1] for name in ("raw", "rs-grpo:2")}, [0.5]
    )
    assert rates(found, "rs-grpo:2") == pytest.approx(rates(found, "raw"), abs=1e-4)
    soft = {"it": frontier.parse_arm("rs-grpo:2")[1]}
    largest = rates(estimate_frontier(Samples(np.array(scores) * 1e30), soft, [0.5]), "it")
    highest = rates(estimate_frontier(Samples(scores), {"it": Fixed(Top())}, [0.5]), "it")
    assert largest == pytest.approx(highest, abs=1e-9)


@dataclass(frozen=True)
class Top:
    """A reward of 1 for the highest of 32, or of 16, and 0 for the others."""

    def __call__(self, table, rows, scores):
        """Compare with a quantile that only the highest has."""
        return (Transformed(Identity())(table, rows, scores) > 0.96).astype(float)


def test_scores_whose_squares_overflow_are_refused():
    """A mean of 1e308s is infinite: the score is named in place of printing inf."""
    with pytest.raises(ValueError, match=r"-1e\+150 to 1e\+150, .* got -1e\+308 in select\[1\]\[0\]"):
        Samples([[0.0, 1.0], [-1e308, 1.0]])


@dataclass(frozen=True)
class Steeper:
    """An arm that is another reward at each KL."""

    def at(self, kl):
        """As steep as it may go far."""
        return Transformed(Exponential(8 * kl))


def test_an_arm_may_depend_on_the_kl():
    """Each KL has the win rate of its own reward."""
    references = normals(3, 50)
    both = estimate_frontier(references, {"arm": Steeper()}, [0.25, 1.0]).points
    for point in both:
        alone = estimate_frontier(references, {"arm": Fixed(Steeper().at(point.kl))}, [point.kl]).points
        assert alone == (point,)


def test_scores_tie_as_they_do_in_tables():
    """What float32 cannot tell apart ties, for the reward and for the procedure alike."""
    near = [1.0, 1.0 + 1e-12, 2.0, 3.0]
    found = estimate_frontier(Samples([near], [[0.0, 1.0, 2.0, 3.0]]), {"raw": OBJECTIVES["raw"]}, [0.3])
    tied = estimate_frontier(Samples([[1.0, 1.0, 2.0, 3.0]], [[0.0, 1.0, 2.0, 3.0]]), {"raw": OBJECTIVES["raw"]}, [0.3])
    assert found == tied


def test_a_procedure_that_draws_more_than_there_is_is_refused(tmp_path, capsys):
    """With K below N every reward comes down to one rollout: the error says N, K and what to do."""
    references = normals(10, 32)
    for procedure in (BestOf(33), WorstOf(100)):
        said = rf"of {procedure.n} needs {procedure.n} rollouts .* got K=32: .* K={3 * procedure.n} or more"
        with pytest.raises(ValueError, match=said):
            estimate_frontier(references, procedures=[Standard(), procedure])
    assert estimate_frontier(references, {"log": OBJECTIVES["log"]}, [0.5], [BestOf(32)]).points
    ReferenceTable.build((f"p{i}", row) for i, row in enumerate(references.select)).save(tmp_path / "table")
    assert main(["frontier", str(tmp_path / "table"), "--best-of", "100"]) == 2
    assert "best of 100 needs 100 rollouts of each prompt or more, got K=32" in capsys.readouterr().err
