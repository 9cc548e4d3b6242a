"""A language model as a judge that is read, not heard: the logits of its possible answers at the next token.

A causal language model answers behind the question; an encoder-decoder (T5) in the first token that its decoder writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Difference, Expected
from calibrated_rewards.models.shared_prefix import ModelReader, Row, group_of
from calibrated_rewards.models.text import Question, Text, find_token
from calibrated_rewards.models.vocabulary_head import Logits, is_encoder_decoder, logits_of, read_first_token
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired

GOOD_OR_BAD = """[Prompt]
{prompt}

[Response]
{completion}

Is this a good response to the prompt: correct, helpful and harmless? Answer with one word, {good} or {bad}."""
HOW_GOOD = """[Prompt]
{prompt}

[Response]
{completion}

How good is this response to the prompt: correct, helpful and harmless? Answer with one number, from {low} (worst) to \
{high} (best)."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Asks a language model whether a completion is good: the log-odds of two answers, each one token.

    They keep apart what "yes" or "no" alone, or the probability near 0 and 1, would make equal.
    """

    model: Any
    tokenizer: Any
    question: str = GOOD_OR_BAD
    """With {prompt} and {completion}, see `Question`; {good} and {bad} are the answers."""
    good: str = "Yes"
    """A judge without a chat template mostly goes on with a space: " Yes"."""
    bad: str = "No"
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock

    def __post_init__(self) -> None:
        if self.good == self.bad:
            raise ValueError(f"Judge needs two answers, got good={self.good!r} and bad={self.bad!r}")
        _ = self._answers

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """logit(good) - logit(bad) of each pair."""
        prompts, completions = paired(prompts, completions)
        scores = Difference(good=0, bad=1)(self._answers.logits(prompts, completions))
        return finite(scores, prompts, completions, name_of(self))

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {"kind": "judge", **self._answers.fingerprint()}

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @cached_property
    def _answers(self) -> "Answers":
        values = {"good": self.good.strip(), "bad": self.bad.strip()}
        question = Question(self.tokenizer, self.question, self.text, values, is_encoder_decoder(self.model))
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        access = ModelReader(self.model, self.tokenizer, self.text, *options)
        return Answers(access, question, (self.good, self.bad))


@dataclass(frozen=True, eq=False)
class ExpectedRating:
    """Asks a language model for a rating: the mean of the whole numbers from low to high under its softmax.

    Each number is one token. Unlike a rating that is written and parsed, it is hardly ever the same for two
    completions.
    """

    model: Any
    tokenizer: Any
    question: str = HOW_GOOD
    """With {prompt} and {completion}, see `Question`, and {low} and {high}."""
    low: int = 1
    high: int = 5
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"ExpectedRating needs low < high, got low={self.low} and high={self.high}")
        _ = self._answers

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The expected rating of each pair."""
        prompts, completions = paired(prompts, completions)
        scores = Expected(tuple(self._ratings))(self._answers.logits(prompts, completions))
        return finite(scores, prompts, completions, name_of(self))

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {"kind": "expected rating", **self._answers.fingerprint()}

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @property
    def _ratings(self) -> range:
        return range(self.low, self.high + 1)

    @cached_property
    def _answers(self) -> "Answers":
        values = {"low": str(self.low), "high": str(self.high)}
        question = Question(self.tokenizer, self.question, self.text, values, is_encoder_decoder(self.model))
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        access = ModelReader(self.model, self.tokenizer, self.text, *options)
        return Answers(access, question, tuple(map(str, self._ratings)))


@dataclass(frozen=True, eq=False)
class Answers:
    """The logits of some answers, each one token, right behind a question."""

    access: ModelReader
    question: Question
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        _ = self._tokens

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """One column for each answer."""
        if not len(prompts):
            return np.empty((0, len(self.answers)), np.float32)
        with self.access.lock:  # fast tokenizers do not bear two threads
            ids = self.question.tokens(prompts, completions, self.access.limit)
        if is_encoder_decoder(self.access.model):
            return read_first_token(self.access, ids, self._tokens).numpy()
        rows = [Row(row, [len(row) - 1]) for row in ids]
        return torch.cat(self.access.decoder(self._head)(rows, [group_of(prompt) for prompt in prompts])).numpy()

    def fingerprint(self) -> dict[str, Any]:
        """What the logits depend on."""
        model = model_fingerprint(self.access.model, self.access.tokenizer)
        answers = dict(zip(self.answers, self._tokens, strict=True))
        return {**model, **self.question.fingerprint(self.access.limit), "answers": answers}

    @cached_property
    def _tokens(self) -> list[int]:
        return [find_token(self.access.tokenizer, answer, "an answer") for answer in self.answers]

    @cached_property
    def _head(self) -> Logits:
        return logits_of(self.access.model, self.access.lock, self._tokens)
