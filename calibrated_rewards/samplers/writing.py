"""Completions, token by token: read, draw, leave out who has ended, go on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from transformers import LogitsProcessorList

from calibrated_rewards.samplers.drawing import HALVINGS, Drawn, draw, uniforms
from calibrated_rewards.samplers.endings import Draft, Endings
from calibrated_rewards.samplers.rows import Reader, Rows

# Tokens for which a row's chances are made at a time.
AHEAD = 16
# Rows that have ended leave the batch when no more than this part goes on: taking the others out copies their cache.
CROWD = 0.75


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes completions of prompts; each depends on its prompt and its seed, not on those beside it."""

    reader: Reader
    processors: LogitsProcessorList
    endings: Endings
    max_tokens: int

    def __call__(self, prompts: Sequence[list[int]], of: Sequence[int], seeds: Sequence[int]) -> list[Draft]:
        """A draft for each seed: the i-th continues prompts[of[i]]."""
        drafts = [Draft() for _ in seeds]
        # The drafts that the rows of the batch are of, those that have ended but not left among them.
        members = list(range(len(drafts)))
        chances = np.empty((len(drafts), 0, HALVINGS))
        rows = self.reader.open(prompts, of)
        for written in range(self.max_tokens):
            if written % AHEAD == 0:
                chances = uniforms([seeds[i] for i in members], written, AHEAD)
            drawn = self._draw(rows, chances[:, written % AHEAD])
            self._note([drafts[i] for i in members], drawn)
            going = [at for at, i in enumerate(members) if drafts[i].end is None]
            if not going or written + 1 == self.max_tokens:
                break
            tokens = drawn.tokens
            if self.reader.parts(rows) and len(going) <= CROWD * len(members):
                members, chances = [members[at] for at in going], chances[going]
                rows, tokens = self.reader.choose(rows, going), tokens[torch.tensor(going, device=tokens.device)]
            rows = self.reader.next(rows, tokens.to(rows.ids.device))
        return drafts

    def _draw(self, rows: Rows, chances: Float64[np.ndarray, "rows halvings"]) -> Drawn:
        logits = rows.logits.float()
        scores = self.processors(rows.ids.to(logits.device), logits)  # type: ignore[arg-type]
        return draw(scores, torch.from_numpy(chances))

    def _note(self, drafts: Sequence[Draft], drawn: Drawn) -> None:
        """Write down the tokens of the drafts that go on."""
        found = zip(drafts, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)
        going = [(draft, token, logprob) for draft, token, logprob in found if draft.end is None]
        for draft, token, logprob in going:
            draft.ids.append(token)
            draft.logprob += logprob
        self.endings.mark([draft for draft, _, _ in going])
