"""The reward that the environment names, for trainers that are told a function's path and pass no objects.

`CALIBRATED_REWARD` is a directory that `save_pretrained` wrote, or a repository of the Hub. It is loaded when it is
first needed, once in a process, and its reward model is verified, unless `CALIBRATED_REWARD_VERIFY=0`. Functions,
checkpoints with code of their own and servers that it names need `CALIBRATED_REWARD_TRUST_REMOTE_CODE=1`.

What frameworks hand over, as a reward takes it: ids out of labels, completions out of glued texts, plain numbers.

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
from typing import Any

from calibrated_rewards.prompts import start_of
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.saving import NeedsTrust
from calibrated_rewards.reward.scores import Score

PLACE, VERIFY, TRUST = "CALIBRATED_REWARD", "CALIBRATED_REWARD_VERIFY", "CALIBRATED_REWARD_TRUST_REMOTE_CODE"
logger = logging.getLogger("calibrated_rewards")

_loaded: dict[str, CalibratedReward] = {}
_loading = threading.Lock()


def configured() -> CalibratedReward:
    """The reward of this process."""
    place = os.environ.get(PLACE)
    if not place:
        raise ValueError(
            f"set the environment variable {PLACE} to a directory that CalibratedReward.save_pretrained wrote"
        )
    with _loading:
        if place not in _loaded:
            reward = _load(place)
            if reward.scorer is not None and os.environ.get(VERIFY, "1") != "0":
                logger.info("%s: %s", place, reward.verify())
            _loaded[place] = reward
        return _loaded[place]


def _load(place: str) -> CalibratedReward:
    try:
        return CalibratedReward.from_pretrained(place, trust_remote_code=os.environ.get(TRUST, "0") == "1")
    except NeedsTrust as error:
        raise ValueError(f"{error.what}: read it, then allow it with {TRUST}=1") from None


_log = logging.getLogger(__name__)


def identifier(given: Any, column: str | None) -> Any:
    """The id in a row of a dataset, or the label that is one; None for a reward that knows prompts by no id.

    A framework has labels for answers too, and an answer must not be taken for an id.
    """
    found = given.get(column) if isinstance(given, Mapping) else given
    return None if column is None or (isinstance(found, str) and not found) else found


def completion_of(text: str, prompt: str) -> str:
    """What follows the prompt in a text that may begin with padding; ValueError if the prompt is not in it."""
    at = text.find(prompt)
    if at < 0:
        raise ValueError(
            f"a text has its prompt {start_of(prompt)} in it, got {start_of(text)}: was the prompt truncated, or does "
            "the tokenizer not give back the text that it was given?"
        )
    return text[at + len(prompt) :]


def number(score: Score) -> float:
    """The reward, for frameworks that take nothing but numbers."""
    if score.reward is None:
        raise ValueError(
            'this framework needs a number for each completion, on_missing="skip" gave none: use "neutral"'
        )
    return score.reward


def details(score: Score) -> dict[str, float]:
    """What a framework logs beside a reward: the same names always, and floats."""
    return {"raw": score.raw, "u": score.u, "hit": float(score.known)}


@contextmanager
def loud(framework: str, seconds: float = float("inf")) -> Iterator[None]:
    """Log what fails, and what takes longer than the framework waits: it would hide it, or make it a reward of 0."""
    begun = monotonic()
    try:
        yield
    except Exception as error:
        _log.exception("the calibrated reward failed, and %s may hide it: %s", framework, error)
        raise
    if (took := monotonic() - begun) > seconds:
        _log.error("a calibrated reward took %.0f s: after %.0f s %s made it 0", took, seconds, framework)
