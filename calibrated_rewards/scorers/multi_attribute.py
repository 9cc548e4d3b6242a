"""Models whose score is not `logits` but another of their outputs: attributes, end scores, or a bare tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from calibrated_rewards.error_messages import Message, setting
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.reading.access import Access
from calibrated_rewards.reading.body import body_of, vocabulary
from calibrated_rewards.reading.fingerprint import model_fingerprint
from calibrated_rewards.reading.labels import Label, Labels
from calibrated_rewards.reading.own_forward import OwnForward
from calibrated_rewards.reading.text import Text
from calibrated_rewards.scorers.protocol import finite, name_of, paired
from calibrated_rewards.scorers.recipe import in_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class MultiAttribute:
    """Scores with one output of the model's own forward, of any shape (inputs, numbers).

    ArmoRM and QRM: `output="score"`, or `output="rewards"` with `labels=Weighted(...)`. Beaver: `output="end_scores"`.
    WorldPM and Qwen2.5-Math-RM: `output=0`. UltraRM, whose forward returns the scores: `output=None`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    output: str | int | None = "score"
    """A key or an index of what the forward returns; None if it returns the scores themselves."""
    labels: Labels | None = None
    """How several numbers make one score; None: the only one."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    show_progress: bool = True

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        prompts, completions = paired(prompts, completions)
        if not prompts:
            return np.empty(0, np.float32)
        numbers = self.logits(prompts, completions)
        if self.labels is None and numbers.shape[1] != 1:
            raise ValueError(
                Message(
                    f"output {self.output!r} has {numbers.shape[1]} numbers for each input: say how they make one "
                    f"score, with {setting('labels', 'Label(i) or Weighted(weights)')}"
                )
            )
        return finite((self.labels or Label(0))(numbers), prompts, completions, name_of(self))

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """The numbers of the output, all of them."""
        prompts, completions = paired(prompts, completions)
        with self._access.lock:
            ids = self.text.encode(self.tokenizer, prompts, completions, self._access.limit)
        return self._reader(ids).numpy()

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "kind": "multi-attribute",
            **model_fingerprint(self.model, self.tokenizer),
            "output": self.output,
            "labels": repr(self.labels or Label(0)),
            "text": {**self.text.fingerprint(self.tokenizer), "max_length": self._access.limit},
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @cached_property
    def _access(self) -> Access:
        return Access(self.model, self.tokenizer, self.text, self.batch_tokens, show_progress=self.show_progress)

    @property
    def _reader(self) -> OwnForward:
        """With heads in float32 if the model's code bears that, or else in the model's own precision."""
        return self._reads(self.model if self._bears_float32 else Whole(self.model))

    @cached_property
    def _bears_float32(self) -> bool:
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            self._check(self._reads(self.model))
            return True
        except RuntimeError as error:
            if self.model.dtype == torch.float32 or should_reduce_batch_size(error):
                raise
        # Its code goes on to compute with 16 bits.
        self._check(self._reads(Whole(self.model)))
        return False

    def _reads(self, model: nn.Module) -> OwnForward:
        return replace(self._access.own_forward(self._access.pad, output=self.output), model=model)

    def _check(self, reader: OwnForward) -> None:
        few = min(32, vocabulary(self.model))
        short, long = ([i % few for i in range(3, n)] for n in (8, 12))
        widths = reader([short]).shape[1], reader([long]).shape[1]
        if widths[0] != widths[1]:
            raise ValueError(f"output {self.output!r} has a number for each token, not for each input; say output=...")


class Whole(nn.Module):
    """A model as a body without heads, for code that does not bear a head in another precision."""

    base_model_prefix = "inner"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the model."""
        return body_of(self.inner).get_input_embeddings()  # type: ignore[no-any-return, operator]

    def forward(self, **inputs: torch.Tensor) -> Any:
        """What the model gives."""
        return self.inner(**inputs)
