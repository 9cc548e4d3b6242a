"""Models whose score is another output than `logits`: attributes, end scores, or a bare tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Label, Labels
from calibrated_rewards.models.own_forward import HeadPrecision, OwnForward, fit_precision
from calibrated_rewards.models.shared_prefix import reader_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import check_pairs, refuse_pickle, score_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class MultiAttribute:
    """A scorer that reads one output of the model's own forward, of any shape (inputs, numbers).

    ArmoRM and QRM: `output="score"`, or `output="rewards"` with `labels=Weighted(...)`. Beaver: `output="end_scores"`.
    WorldPM and Qwen2.5-Math-RM: `output=0`. UltraRM, whose forward returns the scores: `output=None`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    output: str | int | None = "score"
    """A key or an index of what the forward returns; None if it returns the scores themselves."""
    labels: Labels | None = None
    """The rule that makes one score of several numbers; None: the only one."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle
    _access = cached_property(reader_of)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(self._scores, self, prompts, completions)

    def _scores(self, prompts: list[Prompt], completions: list[Completion]) -> Float32[np.ndarray, " n"]:
        numbers = self.logits(prompts, completions)
        if self.labels is None and numbers.shape[1] != 1:
            raise ValueError(
                Message(
                    f"output {self.output!r} has {numbers.shape[1]} numbers for each input: say how they make one "
                    f"score, with {setting('labels', 'Label(i) or Weighted(weights)')}"
                )
            )
        return (self.labels or Label(0))(numbers)

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """Return the numbers of the output, all of them."""
        ids = self._access.encode(*check_pairs(prompts, completions))
        reader = fit_precision(self._reader, ids, self._precision)
        if len(self._widths) != 1:
            self._widths.clear()
            self._widths.update(reader([row]).shape[1] for row in pick_two_lengths(ids, self._access.limit))
        if len(self._widths) > 1:
            raise ValueError(
                Message(
                    f"output {self.output!r} has a number for each token, not for each input; say which other output "
                    f"is the score, {setting('output', 'NAME')}"
                )
            )
        return reader(ids).numpy()

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        settings = {"output": self.output, "labels": repr(self.labels or Label(0))}
        model, text = model_fingerprint(self.model, self.tokenizer), self._access.text_fingerprint()
        return {"kind": "multi-attribute", **model, **settings, "text": text}

    @property
    def _reader(self) -> OwnForward:
        return self._access.own_forward(self._access.pad, output=self.output)

    @cached_property
    def _precision(self) -> HeadPrecision:
        return HeadPrecision()

    @cached_property
    def _widths(self) -> set[int]:
        """The numbers that two first inputs of different lengths gave: two widths if the output has one a token."""
        return set()


def pick_two_lengths(rows: list[list[int]], limit: int) -> tuple[list[int], list[int]]:
    """Pick two inputs of different lengths: the shortest two, or one with and without another last token.

    >>> pick_two_lengths([[5, 6, 7], [5, 6]], 9), pick_two_lengths([[5, 6]], 9), pick_two_lengths([[5, 6]], 2)
    (([5, 6], [5, 6, 7]), ([5, 6], [5, 6, 6]), ([5, 6], [5]))
    """
    by_length = {len(row): row for row in reversed(rows)}
    lengths = sorted(by_length)
    short = by_length[lengths[0]]
    if len(lengths) > 1:
        return short, by_length[lengths[1]]
    return short, [*short, short[-1]] if len(short) < limit else short[:-1]
