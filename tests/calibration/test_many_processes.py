"""Processes that share a directory: one table whoever made it, nothing drawn twice, and nobody waits for the dead.

benchmarks/cluster.py does this with the launchers of torch and accelerate, and for longer.
"""

import json
import signal
import subprocess
import sys
from collections import Counter

import crowds
import deaths
import numpy as np
import pytest

from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import seeds_of
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

KILLED = -signal.SIGKILL
SCENES = {
    "1 together": [deaths.DONE],
    "2 together": [deaths.DONE] * 2,
    "3 together": [deaths.DONE] * 3,
    "race 0": [deaths.DONE] * 2,
    "race 1": [deaths.DONE] * 2,
    "one_killed": [KILLED, deaths.DONE, deaths.DONE],
    "one_stopped": [deaths.DONE] * 2,
    "one_late": [deaths.DONE] * 3,
    "other_k": [deaths.DONE] * 2,
    "other_prompts": [deaths.DONE] * 2,
    "with_clusters": [deaths.DONE] * 3,
    "one_outlived": [KILLED, deaths.DONE],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of all scenes, by one process that forks the others."""
    command = [sys.executable, "-W", "error", crowds.__file__, str(tmp_path_factory.mktemp("crowds"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert not done.returncode, done.stderr
    sys.stderr.write(done.stderr)  # shown where a test fails
    return json.loads(done.stdout)


@pytest.mark.parametrize("scene", SCENES)
def test_the_table_is_that_of_one_process(found, scene):
    """All who live come to their end; files and bytes are those of a process that was alone."""
    assert found[scene]["codes"] == SCENES[scene]
    assert found[scene]["temporary"] == []
    assert found[scene]["files"] == found["1 together"]["files"]


@pytest.mark.parametrize("scene", SCENES)
def test_every_process_is_given_rows_of_its_prompts(found, scene):
    """Also who looks as others draw more: a row is the scores of a prompt's first rollouts, so many as there are."""
    for rows in found[scene]["rows"].values():
        for prompt, row in zip(crowds.PROMPTS, rows, strict=False):
            drawn = NumberSampler()([prompt], [seeds_of(0, prompt_key(prompt), 0, len(row))])[0]
            scores = NumberScorer()([prompt] * len(row), [rollout.completion for rollout in drawn])
            assert np.sort(scores).tolist() == row
            assert len(row) == crowds.K or scene == "other_k"


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene not in ("one_killed", "other_k")])
def test_nothing_is_drawn_twice(found, scene):
    """Each prompt goes to one sampler, once."""
    assert set(found[scene]["sampled"].values()) == {1}
    assert len(found[scene]["sampled"]) == len(crowds.PROMPTS)


def test_work_is_shared(found):
    """Of three processes at once each does something; who comes when all is done, nothing."""
    assert found["3 together"]["at_work"] == 3
    assert found["one_stopped"]["at_work"] == 2
    assert found["one_late"]["at_work"] <= 2


def test_a_kill_costs_a_shard(found):
    """What the dead one was at, and no more, is drawn again."""
    assert Counter(found["one_killed"]["sampled"].values()) == {1: len(crowds.PROMPTS) - crowds.PER_SHARD, 2: 2}


def test_one_that_is_stopped_is_waited_for(found):
    """The other does all else, and does not take the shard of one that may go on."""
    assert found["one_stopped"]["waits"]
