"""Functions that saved rewards name: a reward.json says `functions_of_saved_rewards:length`, and no more."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibrated_rewards import Exponential, scaled


def length(_prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """A scorer as it stands: the number of characters."""
    return [float(len(completion)) for completion in completions]


def exclamations(_prompt: Any, completion: str) -> float:
    """A scorer of one pair, for `Function`."""
    return float(completion.count("!"))


def median(members: np.ndarray) -> np.ndarray:
    """A combination of one's own, for `Ensemble`."""
    return np.asarray(np.median(members, axis=0))


def longer(_prompts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    """A preference, for `MeanWin`: certain that the longer one is better."""
    return [0.5 * (1 + np.sign(len(a) - len(b))) for a, b in zip(firsts, seconds, strict=True)]


def two_answers(_prompt: Any) -> tuple[str, ...]:
    """The references of each prompt, for `MeanWin`."""
    return ("12", "1234")


def rising(c: Any) -> Any:
    """The density of a procedure of one's own, for `Calibrated`: 2 C."""
    return 2 * c


def half(u: Any) -> Any:
    """A transform of one's own: u / (2 - u)."""
    return np.asarray(u, np.float64) / (2 - np.asarray(u, np.float64))


def risen(_prompts: Sequence[Any], completions: Sequence[str]) -> Any:
    """A scorer with names of the package in its code, of which a calibration keeps a digest."""
    return scaled(Exponential(2.0), "unit")([1 / (1 + len(completion)) for completion in completions])
