"""`calibrated-rewards reward`: a directory for trainers, verified, or nothing."""

import json
from pathlib import Path

import pytest
import tiny

from calibrated_rewards import BestOf, CalibratedReward, optimum
from calibrated_rewards.calibrate import calibrate
from calibrated_rewards.cli import main
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.testing import NumberSampler

PROMPTS = ["one", "two", "three"]


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
    assert f"train with beta={best.beta:.4g}: KL 1 nats, win rate {best.win_rate:.3f}" in told
    assert reward.beta == best.beta
    assert main(["reward", table, "--reward-model", model, "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["reward", table, "--reward-model", model, "--out", str(out), "--force"]) == 0
    assert reward.transform == optimum(BestOf(4), kl=1.0).transform
    assert (reward.estimator, reward.endings, reward.name) == ("posterior", ("</s>",), "calm")
    assert sorted(json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()) == sorted(PROMPTS)
    same = CalibratedReward(load_scorer(model), reward.table, reward.transform, estimator="posterior")
    assert reward(PROMPTS, ["1", "2", "3"]) == same(PROMPTS, ["1", "2", "3"])


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
