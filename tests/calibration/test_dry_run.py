"""A dry run says what the run then does, and writes nothing."""

from collections import Counter
from dataclasses import dataclass

import pytest

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.dry_run import WARM_UP, forecast
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.sources import prompts_from
from calibrated_rewards.calibration.work import Work
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = [f"prompt {i}" for i in range(10)]
DRAWN: Counter = Counter()


@dataclass(frozen=True)
class Counting(NumberSampler):
    """NumberSampler that counts, and refuses one prompt."""

    def __call__(self, prompts, seeds, /):
        """What NumberSampler gives."""
        DRAWN["rollouts"] += sum(map(len, seeds))
        return super().__call__(prompts, seeds)

    def check(self, prompts):
        """One is too long."""
        if "too long" in prompts:
            raise ValueError("the prompt 'too long' is too long")


@pytest.fixture(autouse=True)
def _from_nothing():
    DRAWN.clear()


def foretold(path, prompts, scorers, k):
    asked = None if prompts is None else prompts_from(prompts)
    return forecast(RunDirectory(path), asked, Work(Counting(), scorers, 0), k)


def test_a_run_does_what_was_foretold(tmp_path):
    """From nothing, with more prompts and a larger K, with another reward model: as many rollouts as it said."""
    out, one, two = tmp_path / "t", {"a": NumberScorer()}, {"a": NumberScorer(), "b": HashScorer()}
    calls = [(PROMPTS[:4] * 2, one, 3), (PROMPTS, one, 5), (PROMPTS, one, 2), (PROMPTS, two, 5), (PROMPTS[:2], two, 9)]
    for prompts, scorers, k in calls:
        told = foretold(out, prompts, scorers, k)
        DRAWN.clear()
        tables = calibrate(prompts, Counting(), scorers, out, k=k)
        assert told.to_draw == DRAWN["rollouts"]
        assert told.prompts == len(tables["a"])
        assert told.repeated == len(prompts) - len({*prompts})
    assert told.to_score == {"a": 40, "b": 40}
    assert foretold(out, PROMPTS, two, 9).to_score == {"a": 0, "b": 0}


def test_nothing_is_written(tmp_path):
    """Not even the directory; and only the trial is drawn."""
    told = foretold(tmp_path / "t", PROMPTS, {"a": NumberScorer()}, 6)
    assert not (tmp_path / "t").exists()
    assert DRAWN["rollouts"] == WARM_UP + 6
    assert (told.trial.rollouts, told.trial.tokens) == (6, 6)
    assert told.seconds == pytest.approx(10 * (told.trial.sampling + told.trial.scoring))
    for said in ("10: 10 new, 0 known", "60 rollouts", "60 with a", "estimate"):
        assert said in str(told)


def test_what_the_run_would_refuse_is_refused(tmp_path):
    """A prompt that the sampler cannot complete, at any place."""
    with pytest.raises(ValueError, match="too long"):
        foretold(tmp_path / "t", [*PROMPTS, "too long"], {"a": NumberScorer()}, 6)
    assert DRAWN["rollouts"] == 0
