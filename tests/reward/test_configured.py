"""The reward that the environment names: loaded once, verified, and loud if it is not there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calibrated_rewards import CalibratedReward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.reward.frameworks import configured
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer


def saved(at: Path, scorer: object = None) -> str:
    table = calibrate(["one", "two"], NumberSampler(), NumberScorer(), k=4)
    CalibratedReward(scorer or NumberScorer(), table).save_pretrained(at)  # type: ignore[arg-type]
    return str(at)


def test_it_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads that ask first get one object; another directory is another reward."""
    monkeypatch.setenv("CALIBRATED_REWARD", saved(tmp_path / "first"))
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(lambda _: configured(), range(16))]
    assert len({*map(id, found)}) == 1
    assert found[0](["one"], ["99"]) == [1.0]
    monkeypatch.setenv("CALIBRATED_REWARD", saved(tmp_path / "second"))
    assert configured() is not found[0]


def test_a_wrong_reward_model_is_caught_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says that it need not be."""
    monkeypatch.setenv("CALIBRATED_REWARD", saved(tmp_path / "wrong", HashScorer()))
    with pytest.raises(ValueError, match="not the one that the table was made with"):
        configured()
    monkeypatch.setenv("CALIBRATED_REWARD_VERIFY", "0")
    assert configured().scorer == HashScorer()


def test_nothing_named_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to set."""
    monkeypatch.delenv("CALIBRATED_REWARD", raising=False)
    with pytest.raises(ValueError, match="set the environment variable CALIBRATED_REWARD"):
        configured()
