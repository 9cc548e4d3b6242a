"""Write completions token by token: draw, read the tokens drawn, drop rows that have ended.

`generation.py` reads rows, `drawing.py` draws the next token. Where a preference head is to read the completions, the
ends of their turns are read on the way.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import LogitsProcessorList

from calibrated_rewards.models.shared_prefix import common_prefix
from calibrated_rewards.samplers.drawing import HALVINGS, Drawn, draw, uniforms
from calibrated_rewards.samplers.generation import Reader, Rows
from calibrated_rewards.samplers.policy import Draft, Endings, Turn
from calibrated_rewards.samplers.turn_ends import Turns

# Tokens for which a row's uniforms are made at a time.
AHEAD = 16
# Rows that have ended leave the batch when no more than this part goes on: taking the others out copies their cache.
CROWD = 0.75


class Other(NamedTuple):
    """A turn of other tokens than were drawn."""

    turn: Turn
    place: int
    """The row of its draft."""
    read: int
    """How many of its tokens were read in that row."""

    @property
    def tokens(self) -> list[int]:
        """The tokens that are to be read."""
        return self.turn.row[self.read :]


@dataclass
class Batch:
    """Drafts that are being written, those that have ended but not left among them, and the rows that were read."""

    rows: Rows
    places: list[int]
    """The row of each draft: drafts that have the same tokens so far have one."""
    members: list[int]
    """The number of each draft."""


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes completions of prompts, each of which depends on its prompt and its seed, not on those beside it."""

    reader: Reader
    processors: LogitsProcessorList
    endings: Endings
    max_tokens: int
    turns: Turns | None = None
    """How completions are to be read to the ends of their turns."""
    positions: int | None = None
    """Most tokens of a row; a completion that was cut there has no room for the end of a turn."""

    def __call__(self, prompts: Sequence[list[int]], of: Sequence[int], seeds: Sequence[int]) -> list[Draft]:
        """Write a draft for each seed: the i-th continues prompts[of[i]]."""
        drafts, starts = [Draft() for _ in seeds], [prompts[i] for i in of]
        chances = np.empty((len(drafts), 0, HALVINGS))
        batch = self._open(prompts, of)
        for written in range(self.max_tokens):
            if written % AHEAD == 0:
                chances = uniforms([seeds[i] for i in batch.members], written, AHEAD)
            drawn = self._draw(batch, chances[:, written % AHEAD])
            self._append([drafts[i] for i in batch.members], drawn)
            last = written + 1 == self.max_tokens
            going = set() if last else {i for i in batch.members if drafts[i].end is None}
            due = self._begin_turns(batch, drafts, starts, going)
            if not going and not due:
                break
            tokens = drawn.tokens.tolist()
            staying = [at for at, i in enumerate(batch.members) if i in going or i in due]
            if self.reader.can_select(batch.rows) and len(staying) <= CROWD * len(batch.members):
                chances, tokens = chances[staying], [tokens[at] for at in staying]
                places, members = ([each[at] for at in staying] for each in (batch.places, batch.members))
                batch = Batch(batch.rows, places, members)
            batch = self._next(batch, tokens, due, {i for i in due if drafts[i].end is None}, bool(going))
            if not going:
                break
        return drafts

    def _open(self, prompts: Sequence[list[int]], of: Sequence[int]) -> Batch:
        """Read the prompts; drafts of a prompt begin as one row."""
        reader, members = self.reader, list(range(len(of)))
        if reader.share:
            rows = reader.open(prompts, range(len(prompts)))
            if reader.can_select(rows):
                return Batch(rows, list(of), members)
            reader = replace(reader, share=False)
        return Batch(reader.open(prompts, of), list(members), members)

    def _begin_turns(
        self, batch: Batch, drafts: Sequence[Draft], starts: Sequence[list[int]], going: Collection[int]
    ) -> dict[int, Turn]:
        """Begin the turns of drafts that have just ended; return those to be read on, to the end of the turn.

        Turns of other tokens than were drawn are read at once, behind a copy of what comes before the first of them.
        """
        ended = [i for i in batch.members if i not in going and drafts[i].turn is None]
        if self.turns is None or not ended:
            return {}
        places = dict(zip(batch.members, batch.places, strict=True))
        due, others = dict[int, Turn](), list[Other]()
        for i, turn in zip(ended, self.turns.begin(ended, [drafts[i] for i in ended], starts), strict=True):
            draft, draft.turn = drafts[i], turn
            if turn.as_drawn and (draft.end == "token" or self._fits(batch.rows.ids.shape[1] + 2)):
                due[i] = turn
            elif not turn.as_drawn and self._fits(len(turn.row)):
                # The last token that was drawn is not read yet; the last one of the turn is to be read.
                read = common_prefix([[*starts[i], *draft.ids[:-1]], turn.row[:-1]])
                if read >= len(starts[i]):
                    others.append(Other(turn, places[i], read))
        if others and self.reader.can_read_others(batch.rows):
            self._read_others(batch.rows, others)
        return due

    def _read_others(self, rows: Rows, others: Sequence[Other]) -> None:
        """Read turns on from where they differ, those of similar lengths at once: the shorter ones are padded."""
        left = sorted(others, key=lambda other: -len(other.tokens))
        while left:
            at_once = [other for other in left if 2 * len(other.tokens) >= len(left[0].tokens)]
            left = left[len(at_once) :]
            at, kept = [other.place for other in at_once], [other.read for other in at_once]
            states = self.reader.read_others(rows, at, kept, [other.tokens for other in at_once])
            for other, state in zip(at_once, states, strict=True):
                other.turn.state = state

    def _fits(self, tokens: int) -> bool:
        return self.positions is None or tokens <= self.positions

    def _next(
        self, batch: Batch, tokens: Sequence[int], due: Mapping[int, Turn], cut: Collection[int], going_on: bool
    ) -> Batch:
        """Read the next token of each draft, and keep the hidden states at the ends of turns.

        The end stands in the place of the next token of drafts that a token ended, and behind that of drafts that are
        cut. Drafts that go on with the same token stay one row; others get a copy of theirs.
        """
        end = self.turns.end if self.turns is not None else 0
        tokens = [end if i in due and i not in cut else token for i, token in zip(batch.members, tokens, strict=True)]
        pairs = list(zip(batch.places, tokens, strict=True))
        ways = {way: row for row, way in enumerate(dict.fromkeys(pairs))}
        parents, rows = [parent for parent, _ in ways], batch.rows
        if parents != list(range(len(rows.ids))):
            rows = self.reader.select(rows, parents)
        fed = torch.tensor([[token, end] if cut else [token] for _, token in ways], device=rows.ids.device)
        states, places = list[Tensor](), [ways[pair] for pair in pairs]
        for step in [fed] if self.reader.reads_ahead(rows) else fed.chunk(fed.shape[1], dim=1):
            more = len(states) + step.shape[1] < fed.shape[1]
            rows = self.reader.next(rows, step, step.shape[1] if due else 0, going_on or more)
            if rows.states is not None:
                states += rows.states.unbind(1)
        for i, place in zip(batch.members, places, strict=True):
            if i in due:
                due[i].state = states[-1 if i in cut else 0][place]
        return Batch(rows, places, batch.members)

    def _draw(self, batch: Batch, chances: Float64[np.ndarray, "drafts halvings"]) -> Drawn:
        rows, places = batch.rows, batch.places
        logits = rows.logits.float()
        scores = self.processors(rows.ids.to(logits.device), logits)  # type: ignore[arg-type]
        if places != list(range(len(rows.ids))):
            scores = scores[torch.tensor(places, device=scores.device)]
        return draw(scores, torch.from_numpy(chances))

    def _append(self, drafts: Sequence[Draft], drawn: Drawn) -> None:
        """Append the tokens of the drafts that go on, and mark those that they end."""
        going = []
        for draft, token, logprob in zip(drafts, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
            if draft.end is None:
                draft.ids.append(token)
                draft.logprob += logprob
                going.append(draft)
        self.endings.mark(going)
