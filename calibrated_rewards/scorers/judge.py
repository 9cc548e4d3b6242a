"""Language models as judges: the logits of their possible answers are read, or a rating that they write.

Where logits are read, a causal language model answers behind the question; an encoder-decoder (T5) in the first token
that its decoder writes.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from calibrated_rewards.models.batches import progress_bar
from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Difference, Expected
from calibrated_rewards.models.parts import check_vocabulary, device_of, for_scoring, unwrap, vocabulary
from calibrated_rewards.models.shared_prefix import ModelReader, group_of, reader_of
from calibrated_rewards.models.text import Question, Text, find_token
from calibrated_rewards.models.vocabulary_head import Logits, is_encoder_decoder, logits_of, read_first_token
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import check_pairs, refuse_pickle, score_with

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
NUMBER = r"(?<![\w.])(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?"
"""A number; of "8/10" and "8 out of 10" the 8, of "GPT4" none."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The possible answers of a language model, each one token, and their logits where its answer begins."""

    access: ModelReader
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        _ = self.tokens

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The token of each possible answer."""
        return {word: find_token(self.access.tokenizer, word, "an answer") for word in self.words}

    def logits(self, ids: list[list[int]], groups: Sequence[Hashable]) -> Tensor:
        """Read the logits behind each question, `(questions, answers)`; questions of one group share their prefix."""
        if is_encoder_decoder(self.access.model):
            return read_first_token(self.access, ids, [*self.tokens.values()])
        return self.access.read_last(self._head, ids, groups)

    def ask(
        self, question: Question, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float32[np.ndarray, "n L"]:
        """Ask a question about each pair and return the logits of its answers."""
        with self.access.lock:  # fast tokenizers do not bear two threads
            ids = question.tokens(prompts, completions, self.access.limit)
        return self.logits(ids, [group_of(prompt) for prompt in prompts]).numpy()

    @cached_property
    def _head(self) -> Logits:
        return logits_of(self.access.model, self.access.lock, [*self.tokens.values()])


@dataclass(frozen=True, eq=False)
class Judge:
    """A scorer that asks a language model whether a completion is good: the log-odds of two answers, each one token.

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
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        if self.good == self.bad:
            raise ValueError(f"Judge needs two answers, got good={self.good!r} and bad={self.bad!r}")
        _ = self._question, self._answers

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each pair with logit(good) - logit(bad)."""
        odds = Difference(good=0, bad=1)
        return score_with(lambda *pairs: odds(self._answers.ask(self._question, *pairs)), self, prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        question = self._question.fingerprint(self._answers.access.limit)
        model = model_fingerprint(self.model, self.tokenizer)
        return {"kind": "judge", **model, **question, "answers": self._answers.tokens}

    @cached_property
    def _question(self) -> Question:
        values = {"good": self.good.strip(), "bad": self.bad.strip()}
        return Question(self.tokenizer, self.question, self.text, values, is_encoder_decoder(self.model))

    @cached_property
    def _answers(self) -> Answers:
        return Answers(reader_of(self), (self.good, self.bad))


@dataclass(frozen=True, eq=False)
class ExpectedRating:
    """A scorer that asks a language model for a rating: the mean of the numbers from low to high under its softmax.

    They are whole numbers, each one token. Unlike a rating that is written and parsed, the mean is hardly ever the same
    for two completions.
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
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"ExpectedRating needs low < high, got low={self.low} and high={self.high}")
        _ = self._question, self._answers

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each pair with its expected rating."""
        mean = Expected(tuple(range(self.low, self.high + 1)))
        return score_with(lambda *pairs: mean(self._answers.ask(self._question, *pairs)), self, prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        question = self._question.fingerprint(self._answers.access.limit)
        model = model_fingerprint(self.model, self.tokenizer)
        return {"kind": "expected rating", **model, **question, "answers": self._answers.tokens}

    @cached_property
    def _question(self) -> Question:
        values = {"low": str(self.low), "high": str(self.high)}
        return Question(self.tokenizer, self.question, self.text, values, is_encoder_decoder(self.model))

    @cached_property
    def _answers(self) -> Answers:
        return Answers(reader_of(self), tuple(map(str, range(self.low, self.high + 1))))


@dataclass(frozen=True, eq=False)
class TokenLogit:
    """A scorer that reads the logit of one token at the end of the conversation, where no other message is opened.

    Llama-3.1-Nemotron-70B-Reward-HF was trained so, with token 0: its card generates one token and takes that logit.
    """

    model: Any
    tokenizer: Any
    token: int = 0
    """The token's id."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle
    _access = cached_property(reader_of)

    def __post_init__(self) -> None:
        if not 0 <= self.token < vocabulary(self.model):
            raise ValueError(
                f"TokenLogit needs a token among the model's {vocabulary(self.model)}, got token={self.token}"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each pair with the token's logit."""
        return score_with(self._scores, self, prompts, completions)

    def _scores(self, prompts: list[Prompt], completions: list[Completion]) -> Float32[np.ndarray, " n"]:
        ids = self._access.encode(prompts, completions)
        return self._access.read_last(self._head, ids, [group_of(prompt) for prompt in prompts])[:, 0].numpy()

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        model, text = model_fingerprint(self.model, self.tokenizer), self._access.text_fingerprint()
        return {"kind": "token logit", **model, "token": self.token, "text": text}

    @cached_property
    def _head(self) -> Logits:
        return logits_of(self.model, self._access.lock, [self.token])


@dataclass(frozen=True, eq=False)
class RatedJudge:
    """A scorer that has a causal LM write a rating, greedily, and takes the last number from low to high.

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
    __reduce__ = refuse_pickle
    _access = cached_property(reader_of)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"RatedJudge needs low < high, got low={self.low} and high={self.high}")
        if self.max_new_tokens < 1:
            raise ValueError(f"RatedJudge needs max_new_tokens >= 1, got max_new_tokens={self.max_new_tokens}")
        if (groups := re.compile(self.pattern).groups) > 1:
            raise ValueError(f"RatedJudge needs a pattern with one group or none, got {groups} in {self.pattern!r}")
        _ = self._question

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each pair with its rating."""
        return score_with(
            lambda *pairs: np.array([self.parse_rating(answer) for answer in self.answers(*pairs)], np.float32),
            self,
            prompts,
            completions,
        )

    def answers(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[str]:
        """Return the judge's answer about each pair, as it writes it."""
        prompts, completions = check_pairs(prompts, completions)
        with self._access.lock:  # fast tokenizers do not bear two threads
            rows = self._question.tokens(prompts, completions, self._limit)
        check_vocabulary(rows, self.model)
        answers, budget = [""] * len(rows), self._access.budget
        costs = [len(row) + self.max_new_tokens for row in rows]
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.max_new_tokens,
            do_sample=False,  # greedy, whatever the checkpoint samples with
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
        )
        with (
            for_scoring(self.model, self._access.lock),
            generate_with(self.model, settings),
            progress_bar(len(rows), self.show_progress) as bar,
        ):
            for batch in budget.batches(costs):
                written = budget.run(lambda at: self._generate([rows[i] for i in at]), batch, costs)
                for i, ids in zip(batch, written, strict=True):
                    answers[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
                bar.update(len(batch))
        return answers

    def parse_rating(self, answer: str) -> float:
        """Return the last number of an answer that is a rating."""
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
        """Name all that the scores depend on."""
        settings = {name: getattr(self, name) for name in ("low", "high", "pattern", "max_new_tokens", "unparsed")}
        question, model = self._question.fingerprint(self._limit), model_fingerprint(self.model, self.tokenizer)
        return {"kind": "rated judge", **model, **question, "ends": self._ends, **settings}

    def _generate(self, rows: list[list[int]]) -> list[Tensor]:
        """Generate the tokens behind each row, up to the end that the model itself sets."""
        device, longest = device_of(self.model), max(map(len, rows))
        # Padded on the left: all rows are continued at one place.
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows]).to(device)
        gaps = torch.tensor([longest - len(row) for row in rows])
        mask = (torch.arange(longest) >= gaps[:, None]).long().to(device)
        watch = LogitsProcessorList([NoNan(self.model)])
        written = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=watch)[:, longest:].cpu()
        ends = torch.tensor(self.model.generation_config.eos_token_id or [])
        return [row[: int((~torch.isin(row, ends)).cumprod(0).sum())] for row in written]

    @property
    def _ends(self) -> list[int] | None:
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [ends] if isinstance(ends, int) else ends

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    @cached_property
    def _question(self) -> Question:
        return Question(self.tokenizer, self.question, self.text, {"low": f"{self.low:g}", "high": f"{self.high:g}"})

    @cached_property
    def _limit(self) -> int:
        """Most tokens of a question: what the model reads, less what it writes."""
        limit = self._access.limit - self.max_new_tokens
        if limit < 2:
            raise ValueError(
                f"RatedJudge needs max_new_tokens that leave room for a question, got {self.max_new_tokens} of the "
                f"{self._access.limit} tokens that the model reads"
            )
        return limit


@contextmanager
def generate_with(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Make these settings the model's own meanwhile: what a call leaves open would be taken from the checkpoint's.

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
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


class NoNan(LogitsProcessor):
    """A check that stops a model that computes nan: the largest of such logits is any token, its text is noise."""

    def __init__(self, model: object) -> None:
        self.name = type(model).__name__

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits as they are, or raise."""
        if scores.isnan().any():
            raise ValueError(f"{self.name} gives nan for its next token: look for nan among its weights")
        return scores
