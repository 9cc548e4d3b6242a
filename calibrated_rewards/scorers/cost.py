"""Minus a scorer: cost models, and whatever else says how bad a completion is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, reads_messages, score
from calibrated_rewards.scorers.serial import is_thread_safe


@dataclass(frozen=True)
class Cost:
    """The other way round: a completion that costs little scores high.

    >>> Cost(lambda prompts, completions: [len(c) for c in completions])(["Hi", "Hi"], ["Hello!", "Go away"])
    array([-6., -7.], dtype=float32)
    """

    scorer: Scorer

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Minus the cost of each pair."""
        return -score(self.scorer, prompts, completions)

    @property
    def reads_messages(self) -> bool:
        """Whether the scorer reads messages."""
        return reads_messages(self.scorer)

    @property
    def thread_safe(self) -> bool:
        """Whether the scorer says so."""
        return is_thread_safe(self.scorer)

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {"kind": "cost", "of": fingerprint(self.scorer)}
