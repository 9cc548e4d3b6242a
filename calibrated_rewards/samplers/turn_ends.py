"""Score completions in the pass that writes them: hand the states at the ends of their turns to a preference head.

A preference head reads one hidden state, at the end-of-turn token. The pass that writes a completion comes to that
token anyway: reading it takes one more step of the rows that have ended, no second forward of the whole.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from calibrated_rewards.samplers.policy import Draft

logger = logging.getLogger(__name__)


@runtime_checkable
class ReadsTurnEnds(Protocol):
    """A scorer that reads the hidden states at the end of a turn, and keeps scores of those that it is given."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states it reads, as indices into `hidden_states`."""

    @property
    def turn_end(self) -> Any:
        """The token that ends a turn; its `id` is read behind each completion."""

    @property
    def largest_gap(self) -> float:
        """The gap up to which scores of these states and of a separate forward agree."""

    def reads(self, model: Any) -> bool:
        """Tell if a model, as its adapters are now, is the one that it reads."""

    def forget(self) -> None:
        """Drop the scores that were kept before: what a call scores for free depends on that call alone."""

    def keep(self, rows: Sequence[list[int]], states: Tensor) -> None:
        """Keep the scores of rows that end in the token, of their states there."""

    def measure_gap(self, rows: Sequence[list[int]], states: Tensor) -> float:
        """Measure how far scores of some of these states are from those of a separate forward."""


@dataclass
class TurnEnds:
    """Hands states to a scorer, which keeps their scores, unless they were found to be those of something else."""

    scorer: ReadsTurnEnds
    agree: bool = True
    checked: bool = False
    warned: bool = False

    def find_token(self, model: Any) -> int | None:
        """Return the token to read behind each completion; None if the model writes with other weights."""
        if not self.agree:
            return None
        if not self.scorer.reads(model):
            if not self.warned:
                logger.warning("the policy writes with other weights or adapters than the head reads: reading again")
            self.warned = True
            return None
        return int(self.scorer.turn_end.id)

    def keep(self, prompts: Sequence[list[int]], drafts: Sequence[Draft]) -> None:
        """Hand over the states of drafts that have one; the first are compared with forwards of their own."""
        end, rows, states = int(self.scorer.turn_end.id), [], []
        for prompt, draft in zip(prompts, drafts, strict=True):
            if draft.state is not None:
                rows.append([*prompt, *(draft.ids[:-1] if draft.end == "token" else draft.ids), end])
                states.append(draft.state)
                draft.state = None
        if not rows:
            return
        joined = torch.stack(states)
        if not self.checked:
            self._judge(self.scorer.measure_gap(rows, joined))
        if self.agree:
            self.scorer.keep(rows, joined)

    def _judge(self, gap: float) -> None:
        self.checked = True
        if not gap <= self.scorer.largest_gap:  # nan agrees with nothing
            logger.warning("scores of the pass that writes are %.1e off: completions are read again for them", gap)
            self.agree = False
