"""Before anything is added to a run some kept rollouts are scored again, whatever the fingerprint says."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from calibrated_rewards.calibration.calibrate import calibrate, import_rollouts
from calibrated_rewards.calibration.dry_run import forecast
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.work import Kept, Work
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = [f"prompt {i}" for i in range(6)]
DRAWN = {"prompt": "another", "completions": ["1", "2"]}


@dataclass
class Server:
    """A scorer that is another one behind the same fingerprint, as a server that was updated is."""

    sign: float = 1.0
    asked: int = 0

    def __call__(self, prompts, completions):
        """The number in each completion, or minus that."""
        self.asked += len(completions)
        return self.sign * NumberScorer()(prompts, completions)

    def fingerprint(self):
        """The address."""
        return {"kind": "behind an address"}


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


ADDING = {
    "more rollouts": lambda out, scorer: calibrate(PROMPTS, NumberSampler(), {"r": scorer}, out, k=8),
    "more prompts": lambda out, scorer: calibrate([*PROMPTS, "new"], NumberSampler(), {"r": scorer}, out, k=4),
    "another reward model beside it": lambda out, scorer: calibrate(
        None, None, {"new": HashScorer(), "r": scorer}, out
    ),
    "an import": lambda out, scorer: import_rollouts([DRAWN], out, {"r": scorer}),
    "a forecast": lambda out, scorer: forecast(RunDirectory(out), None, Work(NumberSampler(), {"r": scorer}, 0), 8),
}


@pytest.mark.parametrize("what", ADDING)
def test_another_reward_model_is_refused_whatever_its_fingerprint(tmp_path, what):
    """However something would be added; and the directory is as it was."""
    calibrate(PROMPTS, NumberSampler(), {"r": Server()}, tmp_path, k=4, prompts_per_shard=2)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="'r' is not the reward model that gave the scores which are kept"):
        ADDING[what](tmp_path, Server(-1.0))
    assert files(tmp_path) == before
    ADDING[what](tmp_path, Server())


def test_it_costs_a_handful(tmp_path):
    """Eight pairs, of prompts from all over the run, of a thousand rollouts."""
    calibrate(PROMPTS, NumberSampler(), Server(), tmp_path, k=200, prompts_per_shard=1)
    again = Server()
    calibrate(PROMPTS, NumberSampler(), again, tmp_path, k=200)
    assert again.asked == 8


def test_a_stochastic_reward_model_is_refused(tmp_path):
    """With its first scores, before most of the work, and in words that say so; its rollouts stay."""

    def dice(_, completions):
        return [random.random() for _ in completions]

    with pytest.raises(ValueError, match="gives a pair another score each time that it is asked"):
        calibrate(PROMPTS, NumberSampler(), {"dice": dice}, tmp_path, k=4, prompts_per_shard=2)
    assert [RunDirectory(tmp_path).state("00000").scored, RunDirectory(tmp_path).state("00001")] == [{}, None]
    calibrate(None, None, {"dice": NumberScorer()}, tmp_path)


def test_scores_that_depend_on_the_call_are_refused(tmp_path):
    """A pair has one score, alone or beside others: a rank within the call is none."""

    def centred(prompts, completions):
        scores = NumberScorer()(prompts, completions)
        return scores - scores.mean()

    with pytest.raises(ValueError, match="depend on what else is in the call"):
        calibrate(PROMPTS, NumberSampler(), centred, tmp_path, k=4)


def kept(scores, prompts=None):
    prompts = prompts or ["p"] * len(scores)
    return Kept(prompts, [str(i) for i in range(len(scores))], np.float32(scores), 1.0)


def test_rounding_is_not_another_reward_model():
    """What a batch of another size makes of 16 bits is accepted as far as the scorer itself goes; more is not."""

    def rounded(shift):
        def score(_, completions):
            return [float(c) + shift + 0.05 * (len(completions) > 1) for c in completions]

        return score

    kept([0.0, 1.0, 2.0]).check("r", rounded(0.0), 1e-3)
    kept([0.0, 1.0, 2.0]).check("r", rounded(0.06), 1e-3)
    with pytest.raises(ValueError, match="not the reward model"):
        kept([0.0, 1.0, 2.0]).check("r", rounded(0.3), 1e-3)


def test_unfinished_scores_of_another_name_are_checked_too(tmp_path):
    """A run that was stopped as it scored: what is there of the second reward model is scored again."""

    class Stopped(Server):
        def __call__(self, prompts, completions):
            if self.asked >= 20:
                raise KeyboardInterrupt
            return super().__call__(prompts, completions)

    calibrate(PROMPTS, NumberSampler(), {"a": NumberScorer()}, tmp_path, k=4, prompts_per_shard=2)
    with pytest.raises(KeyboardInterrupt):
        calibrate(None, None, {"b": Stopped()}, tmp_path)
    with pytest.raises(ValueError, match="'b' is not the reward model"):
        calibrate(None, None, {"b": Server(-1.0)}, tmp_path)
    assert len(calibrate(None, None, {"b": Server()}, tmp_path)["b"]) == len(PROMPTS)


def test_messages_are_scored_as_they_are_kept(tmp_path):
    """Fresh from the sampler or read from the disk: the same members, None not among them."""

    @dataclass(frozen=True)
    class Chatting(NumberSampler):
        def __call__(self, prompts, seeds):
            drawn = super().__call__(prompts, seeds)
            wrap = [{"role": "assistant", "content": [{"type": "text", "text": "x"}], "name": None}]
            return [[Rollout([{**wrap[0], "content": one.completion}]) for one in own] for own in drawn]

    def members(_, completions):
        return [len(c[0]) + float(c[0]["content"]) for c in completions]

    table = calibrate(PROMPTS, Chatting(), members, tmp_path, k=3)
    assert table.meta["form"] == {"prompts": "text", "completions": "messages"}
    calibrate(PROMPTS, Chatting(), members, tmp_path, k=5)
