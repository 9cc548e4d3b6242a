"""A language model as a judge that is heard: it writes a rating, and the rating is read from what it wrote."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from calibrated_rewards.models.batches import Budget, progress_bar
from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import (
    check_vocabulary,
    default_budget,
    device_of,
    for_scoring,
    lock_of,
    positions_of,
    unwrap,
)
from calibrated_rewards.models.text import Question, Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.judge import HOW_GOOD
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired

NUMBER = r"(?<![\w.])(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?"
"""A number; of "8/10" and "8 out of 10" the 8, of "GPT4" none."""


@dataclass(frozen=True, eq=False)
class RatedJudge:
    """Asks a causal LM for a rating, lets it write greedily, and takes the last number from low to high.

    Ratings are few, so many completions tie; where no words are needed `ExpectedRating` is finer, and faster.
    """

    model: Any
    tokenizer: Any
    question: str = HOW_GOOD
    """With {prompt} and {completion}, see `Question`, and {low} and {high}."""
    low: float = 1.0
    high: float = 10.0
    pattern: str = NUMBER
    """A regular expression whose group, or whole where it has none, is a rating."""
    max_new_tokens: int = 64
    unparsed: float | None = None
    """The score of an answer without a rating; None: that is an error."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"RatedJudge needs low < high, got low={self.low} and high={self.high}")
        if self.max_new_tokens < 1:
            raise ValueError(f"RatedJudge needs max_new_tokens >= 1, got max_new_tokens={self.max_new_tokens}")
        if (groups := re.compile(self.pattern).groups) > 1:
            raise ValueError(f"RatedJudge needs a pattern with one group or none, got {groups} in {self.pattern!r}")
        _ = self._question

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The rating of each pair."""
        prompts, completions = paired(prompts, completions)
        ratings = [self.rating(answer) for answer in self.answers(prompts, completions)]
        return finite(np.array(ratings, np.float32), prompts, completions, name_of(self))

    def answers(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[str]:
        """What the judge writes about each pair."""
        prompts, completions = paired(prompts, completions)
        with self._lock:  # fast tokenizers do not bear two threads
            rows = self._question.tokens(prompts, completions, self._limit)
        check_vocabulary(rows, self.model)
        found = [""] * len(rows)
        costs = [len(row) + self.max_new_tokens for row in rows]
        with (
            for_scoring(self.model, self._lock),
            generating(self.model, self._settings),
            progress_bar(len(rows), self.show_progress) as bar,
        ):
            for batch in self._budget.batches(costs):
                written = self._budget.run(lambda at: self._written([rows[i] for i in at]), batch, costs)
                for i, ids in zip(batch, written, strict=True):
                    found[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
                bar.update(len(batch))
        return found

    def rating(self, answer: str) -> float:
        """The last number of an answer that is a rating."""
        numbers = [float(number) for number in re.findall(self.pattern, answer)]
        ratings = [number for number in numbers if self.low <= number <= self.high]
        if ratings:
            return ratings[-1]
        if self.unparsed is None:
            raise ValueError(
                f"the judge writes a rating from {self.low:g} to {self.high:g}, got the answer {answer!r}; "
                "ask otherwise, allow more max_new_tokens, or say what such a completion scores, unparsed=..."
            )
        return self.unparsed

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        told = {"pattern": self.pattern, "max_new_tokens": self.max_new_tokens, "unparsed": self.unparsed}
        question = self._question.fingerprint(self._limit)
        model = model_fingerprint(self.model, self.tokenizer)
        scale = {"low": self.low, "high": self.high, "ends": self._ends}
        return {"kind": "rated judge", **model, **question, **scale, **told}

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    def _written(self, rows: list[list[int]]) -> list[Tensor]:
        """The tokens that the model writes after each row, up to the end it sets itself."""
        ids, mask = left_padded(rows, self._pad, device_of(self.model))
        watch = LogitsProcessorList([NoNan(self.model)])
        written = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=watch)
        ends = torch.tensor(self.model.generation_config.eos_token_id or [])
        return [until(row, ends) for row in written[:, ids.shape[1] :].cpu()]

    @property
    def _ends(self) -> list[int] | None:
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [ends] if isinstance(ends, int) else ends

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    @property
    def _settings(self) -> GenerationConfig:
        """Greedy, whatever the checkpoint samples with."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
        )

    @cached_property
    def _question(self) -> Question:
        return Question(self.tokenizer, self.question, self.text, {"low": f"{self.low:g}", "high": f"{self.high:g}"})

    @cached_property
    def _budget(self) -> Budget:
        return Budget(self.batch_tokens or default_budget(self.model))

    @property
    def _lock(self) -> Any:
        return lock_of(self.model)

    @cached_property
    def _limit(self) -> int:
        """Most tokens of a question: what the model reads, less what it writes."""
        limit = self.text.limit(self.tokenizer, positions_of(self.model)) - self.max_new_tokens
        if limit < 2:
            raise ValueError(
                f"RatedJudge needs max_new_tokens that leave room for a question, got {self.max_new_tokens} of the "
                f"{limit + self.max_new_tokens} tokens that the model reads"
            )
        return limit


@contextmanager
def generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """These settings are the model's own while it runs: what a call leaves open would be taken from the checkpoint's.

    That may forbid repetitions or suppress tokens. PEFT's wrapper hands on the settings of the model in it.
    """
    outer = unwrap(model)
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    owners = [owner for owner in {outer, inner} if "generation_config" in vars(owner)]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own


class NoNan(LogitsProcessor):
    """Stops a model that computes nan: the largest of such logits is any token, and what it writes is noise."""

    def __init__(self, model: object) -> None:
        self.name = type(model).__name__

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits as they are."""
        if scores.isnan().any():
            raise ValueError(f"{self.name} gives nan for its next token: look for nan among its weights")
        return scores


def left_padded(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the left: all rows are continued at one place."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    gaps = torch.tensor([longest - len(row) for row in rows])
    return ids.to(device), (torch.arange(longest) >= gaps[:, None]).long().to(device)


def until(row: Tensor, ends: Tensor) -> Tensor:
    """A row up to the first of these tokens.

    >>> until(torch.tensor([5, 6, 2, 0]), torch.tensor([2]))
    tensor([5, 6])
    """
    return row[: int((~torch.isin(row, ends)).cumprod(0).sum())]
