"""Score completions in the pass that writes them: hand the states at the ends of their turns to a preference head.

A preference head reads one hidden state, at the end-of-turn token. The pass that writes a completion comes to that
token anyway: reading it takes one more step of the rows that have ended, no second forward of the whole. What the head
reads is the completion's text, and the text may make other tokens than those that were drawn: "U", "b" is read as "Ub".
Then only the tokens from the first other one on are read again, behind the keys and values of those before.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.samplers.policy import Draft, Endings, Turn

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

    def encode_whole(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Encode pairs as the rows that it reads, which end in that token, however long they are."""

    def forget(self) -> None:
        """Drop the scores that were kept before."""

    def keep(self, rows: Sequence[list[int]], states: Tensor) -> None:
        """Keep the scores of rows that end in the token, of their states there."""

    def measure_gap(self, rows: Sequence[list[int]], states: Tensor) -> float:
        """Measure how far scores of some of these states are from those of a separate forward."""


@dataclass(frozen=True, eq=False)
class Turns:
    """Turns of drafts: the rows of tokens that a scorer reads of them."""

    scorer: ReadsTurnEnds
    endings: Endings
    prompts: Sequence[Prompt]
    """The prompt of each draft."""

    @property
    def end(self) -> int:
        """The token at which turns are read, behind each completion."""
        return int(self.scorer.turn_end.id)

    def begin(self, at: Sequence[int], drafts: Sequence[Draft], starts: Sequence[list[int]]) -> list[Turn]:
        """Make the turns of drafts that have ended or are cut, numbers `at`; number i follows the tokens starts[i]."""
        texts = [rollout.completion for rollout in self.endings.rollouts(drafts)]
        rows = self.scorer.encode_whole([self.prompts[i] for i in at], texts)
        drawn = [
            [*starts[i], *(draft.ids[:-1] if draft.end == "token" else draft.ids), self.end]
            for i, draft in zip(at, drafts, strict=True)
        ]
        return [
            Turn(row, row == own and draft.end != "text") for row, own, draft in zip(rows, drawn, drafts, strict=True)
        ]


@dataclass
class TurnEnds:
    """Hands states to a scorer, which keeps their scores, unless they were found to be those of something else."""

    scorer: ReadsTurnEnds
    prompts: Sequence[Prompt] = ()
    agree: bool = True
    checked: set[str] = field(default_factory=set)
    """The ways to the end of a turn that were compared."""
    warned: bool = False

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Begin a call for some prompts: what a call scores for free depends on that call alone."""
        self.prompts = prompts
        self.scorer.forget()

    def make_turns(self, model: Any, endings: Endings, at: Sequence[int]) -> Turns | None:
        """Make what says how drafts of prompts at[i] are read; None if the model writes with other weights."""
        if not self.agree:
            return None
        if not self.scorer.reads(model):
            if not self.warned:
                logger.warning("the policy writes with other weights or adapters than the head reads: reading again")
            self.warned = True
            return None
        return Turns(self.scorer, endings, [self.prompts[i] for i in at])

    def keep(self, drafts: Sequence[Draft]) -> None:
        """Hand over the states of drafts that have one; the first are compared with forwards of their own."""
        by_way: dict[str, list[Turn]] = {}
        for draft in drafts:
            turn, draft.turn = draft.turn, None
            if turn is not None and turn.state is not None:
                way = "others" if not turn.as_drawn else "cut" if draft.end is None else "ended"
                by_way.setdefault(way, []).append(turn)
        for way, own in by_way.items():
            if way not in self.checked:
                self._judge(own)
                self.checked.add(way)
        turns = [turn for own in by_way.values() for turn in own]
        if turns and self.agree:
            self.scorer.keep([turn.row for turn in turns], torch.stack([turn.state for turn in turns]))

    def _judge(self, turns: Sequence[Turn]) -> None:
        gap = self.scorer.measure_gap([turn.row for turn in turns], torch.stack([turn.state for turn in turns]))
        if not gap <= self.scorer.largest_gap:  # nan agrees with nothing
            logger.warning("scores of the pass that writes are %.1e off: completions are read again for them", gap)
            self.agree = False
