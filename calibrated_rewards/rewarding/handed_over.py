"""What frameworks hand over, as a reward takes it: ids out of labels, completions out of glued texts, plain numbers.

>>> completion_of("<pad><user>Hi</user>Hello!<pad>", "<user>Hi</user>")
'Hello!<pad>'
>>> identifier({"uid": "p7", "answer": "3"}, "uid"), identifier("p7", "uid"), identifier("3", None)
('p7', 'p7', None)
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

from calibrated_rewards.prompts import start_of
from calibrated_rewards.rewarding.scores import Score

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
