"""Building blocks of adapters: the reward that the environment names, and what trainers pass in the form it takes.

`CALIBRATED_REWARD` is a directory that `save_pretrained` wrote, or a repository of the Hub: trainers that take a
function by its path can pass no objects. It is loaded when it is first needed, once in a process, and its reward model
is verified, unless `CALIBRATED_REWARD_VERIFY=0`. Functions, checkpoints with code of their own and servers that it
names need `CALIBRATED_REWARD_TRUST_REMOTE_CODE=1`.

>>> completion_of("<pad><user>Hi</user>Hello!<pad>", "<user>Hi</user>")
'Hello!<pad>'
>>> identifier({"uid": "p7", "answer": "3"}, "uid"), identifier("p7", "uid"), identifier("3", None)
('p7', 'p7', None)
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from calibrated_rewards.prompts import start_of
from calibrated_rewards.reward.lookup import Score

if TYPE_CHECKING:
    from calibrated_rewards.reward.combined import Reward

PLACE, VERIFY, TRUST = "CALIBRATED_REWARD", "CALIBRATED_REWARD_VERIFY", "CALIBRATED_REWARD_TRUST_REMOTE_CODE"
logger = logging.getLogger("calibrated_rewards")

_loaded: dict[str, "Reward"] = {}
_loading = threading.Lock()


def configured() -> "Reward":
    """Load the reward that the environment names, a CombinedReward too; the same one at every later call."""
    from calibrated_rewards.reward.saving import NeedsTrust, load_reward

    place = os.environ.get(PLACE)
    if not place:
        raise ValueError(
            f"set the environment variable {PLACE} to a directory that CalibratedReward.save_pretrained wrote"
        )
    with _loading:
        if place not in _loaded:
            try:
                reward = load_reward(place, trust_remote_code=os.environ.get(TRUST, "0") == "1")
            except NeedsTrust as error:
                raise ValueError(f"{error.reason}: read it, then allow it with {TRUST}=1") from None
            if getattr(reward, "scorer", reward) is not None and os.environ.get(VERIFY, "1") != "0":
                logger.info("%s: %s", place, reward.verify())
            _loaded[place] = reward
        return _loaded[place]


def identifier(row: Any, column: str | None) -> Any:
    """Take the id from a row of a dataset, or from a label that is one; None for a reward that knows prompts by no id.

    A framework has labels for answers too, and an answer must not be taken for an id.
    """
    value = row.get(column) if isinstance(row, Mapping) else row
    return None if column is None or (isinstance(value, str) and not value) else value


def completion_of(text: str, prompt: str) -> str:
    """Cut the completion out of a text that has its prompt in it, after padding; ValueError if it has not."""
    at = text.find(prompt)
    if at < 0:
        raise ValueError(
            f"a text has its prompt {start_of(prompt)} in it, got {start_of(text)}: was the prompt truncated, or does "
            "the tokenizer not give back the text that it was given?"
        )
    return text[at + len(prompt) :]


def number(score: Score) -> float:
    """Take the reward of a score, for frameworks that need a number; ValueError where it was skipped."""
    if score.reward is None:
        raise ValueError(
            'this framework needs a number for each completion, on_missing="skip" gave none: use "neutral"'
        )
    return score.reward


def details(score: Score) -> dict[str, float]:
    """Collect what a framework logs beside a reward: the same names always, and floats."""
    return {"raw": score.raw, "u": score.u, "hit": float(score.known)}


@contextmanager
def loud(framework: str, seconds: float = float("inf")) -> Iterator[None]:
    """Log errors, and calls that take longer than the framework waits: it hides either, or makes it a reward of 0."""
    start = monotonic()
    try:
        yield
    except Exception as error:
        logger.exception("the calibrated reward failed, and %s may hide it: %s", framework, error)
        raise
    if (spent := monotonic() - start) > seconds:
        logger.error("a calibrated reward took %.0f s: after %.0f s %s made it 0", spent, seconds, framework)
