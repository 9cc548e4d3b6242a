"""`calibrated-rewards reward`: a directory for trainers, verified, or nothing."""

import argparse
import json
from pathlib import Path

import jaxtyping
import pytest
import tiny

from calibrated_rewards import BestOf, CalibratedReward, WorstOf, optimum
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.wording import format_transform
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import NumberSampler
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import parse_transform
from calibrated_rewards.theory.tilted_policy import beta_for_kl, kl

PROMPTS = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def without_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-time types take nearly all of the time of solving for an optimum."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A table, and its reward model."""
    at = tmp_path_factory.mktemp("made")
    model = tiny.saved(tiny.classifier(), at / "rm", tiny.tokenizer())
    calibrate(PROMPTS, NumberSampler(), load_scorer(model), k=8, out=at / "table")
    return str(at / "table"), model


def test_it_writes_what_trainers_load(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reward of the same settings, with the prompts of the run beside it."""
    table, model = made
    out = tmp_path / "reward"
    settings = ["--transform", "best-of:4:1.0", "--estimator", "posterior", "--ending", "</s>", "--name", "calm"]
    assert main(["reward", table, "--reward-model", model, "--out", str(out), *settings]) == 0
    told = capsys.readouterr().out
    reward = CalibratedReward.from_pretrained(out)

    assert "verified: 6 probes" in told
    assert "calm, 3 prompts" in told
    best = optimum(BestOf(4), kl=1.0)
    found = expect(reward.table, best.transform, kl=1.0, procedure=BestOf(4), estimator="posterior")
    assert f"train with beta={reward.beta:.4g}\nthis table, with its ties and K: at beta={reward.beta:.4g} " in told
    assert f"has KL 1 nats and win rate {found.win_rate:.3f}, best of 4 against the reference's best of 4" in told
    assert f"KL 1 at beta={best.beta:.4g}, with win rate {best.win_rate:.3f}" in told
    assert reward.beta == pytest.approx(found.beta)
    assert main(["reward", table, "--reward-model", model, "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["reward", table, "--reward-model", model, "--out", str(out), "--force"]) == 0
    assert reward.transform == optimum(BestOf(4), kl=1.0).transform
    assert (reward.estimator, reward.endings, reward.name) == ("posterior", ("</s>",), "calm")
    assert sorted(json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()) == sorted(PROMPTS)
    same = CalibratedReward(load_scorer(model), reward.table, reward.transform, estimator="posterior")
    assert reward(PROMPTS, ["1", "2", "3"]) == same(PROMPTS, ["1", "2", "3"])


def test_it_writes_a_reward_for_an_n_that_is_not_known(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """best-of:1-N:KL is saved, read back and written in words; the report's words know it too."""
    table, model = made
    words = ["--reward-model", model, "--out", str(tmp_path / "reward"), "--transform", "best-of:1-4:0.5"]
    assert main(["reward", table, *words]) == 0
    told = capsys.readouterr().out
    reward = CalibratedReward.from_pretrained(tmp_path / "reward")
    mixture = BestOfUpTo(4)
    found = expect(reward.table, reward.transform, kl=0.5, procedure=mixture)

    assert reward.transform == optimum(mixture, kl=0.5).transform
    assert f"and win rate {found.win_rate:.3f}, best of 1 to 4 against the reference's best of 1 to 4" in told
    assert format_transform(reward.transform) == "optimum for best of 1 to 4"
    assert reward.beta == pytest.approx(found.beta)


def test_another_reward_model_is_no_reward(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written, and the exit code says so; unless the user knows better."""
    other = tiny.saved(tiny.classifier(seed=1), tmp_path / "other", tiny.tokenizer())
    asked = ["reward", made[0], "--reward-model", other, "--out", str(tmp_path / "reward")]

    assert main(asked) == 2
    assert "not the one that the table was made with" in capsys.readouterr().err
    assert not (tmp_path / "reward").exists()
    assert main([*asked, "--no-verify"]) == 0


def test_a_cost_that_the_table_is_not_of_names_the_table_and_the_rule(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --cost for a table without, and the other way round: no list of fingerprints."""
    table, model = made
    words = ["--reward-model", model, "--out", str(tmp_path / "reward")]
    assert main(["reward", table, *words, "--cost"]) == 2
    assert f"the table {table} was made without --cost" in capsys.readouterr().err
    calibrate(PROMPTS, NumberSampler(), load_scorer(model, cost=True), k=8, out=tmp_path / "cost")
    assert main(["reward", str(tmp_path / "cost"), *words]) == 2
    said = capsys.readouterr().err
    assert f"the table {tmp_path / 'cost'} was made with --cost" in said
    assert "fingerprint" not in said
    assert main(["reward", str(tmp_path / "cost"), *words, "--cost"]) == 0


def test_settings_are_checked(made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A transform that has no name here, an estimator that there is not."""
    table, model = made
    asked = ["reward", table, "--reward-model", model, "--out", str(tmp_path / "reward")]
    for wrong in ("best-of:4", "best-of:four:1", "loud", "exp", "exp:x", "log:x"):
        with pytest.raises(SystemExit):
            main([*asked, "--transform", wrong])
        assert "best-of:N:KL" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*asked, "--estimator", "best"])


def test_a_table_of_ties_has_its_own_numbers_or_an_error(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewards of 0 and 1: another beta than theory's; a KL beyond the ties, or equal references: nothing is written."""
    rows = {"ones": [0.0] * 65 + [1.0] * 35, "half": [0.0, 1.0] * 8, "equal": [2.0] * 8}
    for name, row in rows.items():
        ReferenceTable.build([(prompt, row) for prompt in PROMPTS], path=tmp_path / name)
    rest = ["--reward-model", made[1], "--no-verify", "--out", str(tmp_path / "reward")]

    assert main(["reward", str(tmp_path / "ones"), *rest, "--transform", "best-of:8:0.5"]) == 0
    told = capsys.readouterr().out
    assert "has KL 0.5 nats and win rate 0.516, best of 8 against the reference's best of 8" in told
    assert "KL 0.5 at beta=0.2385, with win rate 0.930" in told
    assert CalibratedReward.from_pretrained(tmp_path / "reward").beta == pytest.approx(0.01, rel=0.1)
    rest[-1] = str(tmp_path / "none")
    for name, transform, message in (
        ("half", "best-of:8:0.7", "best-of:8:0.7 asks for a KL of 0.7, and the table"),
        ("half", "exp:10:0.7", "100 % of its prompts reach no KL of 0.7"),
        ("equal", "best-of:8:0.5", "in each of its 3 prompts"),
        ("equal", "log", "log has nothing to tell on the table"),
    ):
        assert main(["reward", str(tmp_path / name), *rest, "--transform", transform]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("worst-of:64:1", "worst-of:64:1: The optimum for WorstOf(n=64) has a KL of 0.194 at most, and wins 0.99999"),
        ("best-of:1000:0.5", "best-of:1000:0.5: The optimum for BestOf(n=1000) has a KL of 0.114 at most"),
        ("best-of:4:-1", "a KL is a number of nats > 0, such as 0.5, got -1"),
        ("exp:10:nan", "a KL is a number of nats > 0, such as 0.5, got nan"),
        ("best-of:0:1", "best-of:0:1: BestOf needs a whole n >= 1, got n=0"),
    ],
)
def test_an_optimum_that_there_is_not_is_a_message(
    name: str, message: str, made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that names what was given, without a traceback, and without a beta that nobody gave."""
    with pytest.raises(SystemExit) as stopped:
        main(["reward", made[0], "--reward-model", made[1], "--out", str(tmp_path / "r"), "--transform", name])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert message in said
    assert "beta" not in said


@pytest.mark.parametrize(("name", "instead"), [("best-of:4:9", "exp:10:9"), ("worst-of:64:1", "exp:-10:1")])
def test_a_kl_out_of_reach_names_what_to_type(name: str, instead: str) -> None:
    """tune() is a function, and no option: the message has a transform that --transform takes."""
    with pytest.raises(argparse.ArgumentTypeError, match=f"such as {instead}") as refused:
        parse_transform(name)
    assert "tune()" not in str(refused.value)
    assert parse_transform(instead).kl == float(name.rpartition(":")[2])


def test_what_is_not_solved_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's own error names a beta of its own; the command line's names another way."""

    def unsolved(*_: object, **__: object) -> None:
        raise ArithmeticError("Optimal(beta=0.001) was not solved")

    monkeypatch.setattr("calibrated_rewards.theory.named.optimal_transform", unsolved)
    with pytest.raises(argparse.ArgumentTypeError, match=r"use exp:-T:0.5, which needs no solving") as refused:
        parse_transform("worst-of:2000:0.5")
    assert "beta" not in str(refused.value)


def test_worst_of_a_thousand_at_a_small_kl_is_solved() -> None:
    """The optimum that was refused with a traceback has the KL that its name says."""
    named = parse_transform("worst-of:1000:0.0001")
    assert named.procedure == WorstOf(1000)
    assert kl(named.transform, beta_for_kl(named.transform, 0.0001)) == pytest.approx(0.0001)
