"""A scorer that cannot score a prompt, as a combined reward without references, refuses it before anything is drawn."""

from pathlib import Path

import pytest

from calibrated_rewards import CalibratedReward
from calibrated_rewards.calibration import OnTheSpot
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.dry_run import forecast
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.sources import prompts_from
from calibrated_rewards.calibration.work import Work
from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward import CombinedReward
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.scorers.ensemble import Cost, Ensemble
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

KNOWN, UNKNOWN = ["prompt 0", "prompt 1"], "prompt 2"


class Forbidden(NumberSampler):
    """A sampler that is not to be asked."""

    def __call__(self, prompts: object, seeds: object, /) -> list[list[Rollout]]:
        """Fail."""
        raise AssertionError("drawn")


def combined() -> CombinedReward:
    """A combination of two rewards that know two prompts."""
    scorers = {"number": NumberScorer(), "hash": HashScorer()}
    tables = calibrate(KNOWN, NumberSampler(), scorers, k=4, show_progress=False)
    return CombinedReward({name: CalibratedReward(scorers[name], table) for name, table in tables.items()})


SCORERS = {
    "itself": combined(),
    "minus it": Cost(combined()),
    "an ensemble with it": Ensemble([NumberScorer(), combined()]),
}


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_a_prompt_that_a_scorer_does_not_know_is_refused_before_drawing(tmp_path: Path, scorer: object) -> None:
    """By a run, which leaves the directory free for another, and by its dry run; what it knows is scored."""
    with pytest.raises(UnknownPromptError, match=UNKNOWN):
        calibrate([*KNOWN, UNKNOWN], Forbidden(), {"both": scorer}, tmp_path, k=2, prompts_per_shard=1)
    assert RunDirectory(tmp_path).names() == []
    work = Work(Forbidden(), {"both": scorer}, 0)
    with pytest.raises(UnknownPromptError, match=UNKNOWN):
        forecast(RunDirectory(tmp_path), prompts_from([*KNOWN, UNKNOWN]), work, 2)
    assert len(calibrate(KNOWN, NumberSampler(), {"both": scorer}, tmp_path, k=2)["both"]) == 2


def test_prompts_of_an_earlier_run_are_refused_before_more_is_drawn(tmp_path: Path) -> None:
    """The directory has rollouts of a prompt that the new scorer does not know: it stays as it is."""
    calibrate([*KNOWN, UNKNOWN], NumberSampler(), {"r": NumberScorer()}, tmp_path, k=2)
    with pytest.raises(UnknownPromptError, match=UNKNOWN):
        calibrate(None, Forbidden(), {"both": combined()}, tmp_path, k=4)
    with pytest.raises(UnknownPromptError, match=UNKNOWN):
        forecast(RunDirectory(tmp_path), None, Work(Forbidden(), {"both": combined()}, 0), 4)


def test_on_demand_too() -> None:
    """References are not drawn for what the scorer then refuses."""
    with pytest.raises(UnknownPromptError, match=UNKNOWN):
        OnTheSpot(None, Forbidden(), combined(), k=2, seed=0)([UNKNOWN])
