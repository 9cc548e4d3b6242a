"""The common reward model: a transformer with a classification head, one label or several, decoder or encoder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.reading.batches import Budget
from calibrated_rewards.reading.body import (
    body_of,
    default_budget,
    heads_of,
    in_float32,
    lock_of,
    positions_of,
    vocabulary,
)
from calibrated_rewards.reading.decoder import Decoder, Plain, Row, Sharing, group_of
from calibrated_rewards.reading.fingerprint import model_fingerprint
from calibrated_rewards.reading.labels import Labels
from calibrated_rewards.reading.labels_of import labels_of
from calibrated_rewards.reading.own_forward import OwnForward
from calibrated_rewards.reading.text import Text
from calibrated_rewards.scorers.recipe import in_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SequenceClassifier:
    """Scores with an AutoModelForSequenceClassification, any architecture.

    Decoders are read at the token where the model itself pools, and completions of one prompt share its KV cache;
    encoders and encoder-decoders run their own forward. Either way padding is on the right and the head is float32.
    """

    model: Any
    """The model, as `from_pretrained` gives it; PEFT's wrapper around one will do."""
    tokenizer: "PreTrainedTokenizerBase"
    labels: Labels | None = None
    """How several labels make one score; None: the only label, or of two the second's log-odds."""
    text: Text = field(default_factory=Text)
    pool: Literal["model", "last"] = "model"
    """Where a decoder is read: where its own forward would (the last token that is no padding id), or the last."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    share_prefixes: bool = True
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.pool not in ("model", "last"):
            raise ValueError(f"SequenceClassifier needs pool to be 'model' or 'last', got pool={self.pool!r}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        if not len(prompts):
            return np.empty(0, np.float32)
        return self._labels(self.logits(prompts, completions))

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """The numbers of all labels."""
        with self._lock:  # fast tokenizers do not bear two threads
            ids = self.text.encode(self.tokenizer, prompts, completions, self._limit)
        if isinstance(self._reader, OwnForward):
            return self._reader(ids).numpy()
        rows = [Row(row, [self._pooled(row)]) for row in ids]
        return torch.cat(self._reader(rows, [group_of(prompt) for prompt in prompts])).numpy()

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "kind": "sequence classifier",
            **model_fingerprint(self.model, self.tokenizer),
            "labels": repr(self._labels),
            "pool": self.pool,
            "text": {**self.text.fingerprint(self.tokenizer), "max_length": self._limit},
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @property
    def _lock(self) -> Any:
        return lock_of(self.model)

    @cached_property
    def _pad(self) -> int | None:
        """The model's padding id; None if it has none, or one (such as -1) that no input can hold."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if pad is not None and 0 <= pad < vocabulary(self.model) else None

    @cached_property
    def _limit(self) -> int:
        return self.text.limit(self.tokenizer, positions_of(self.model))

    @cached_property
    def _labels(self) -> Labels:
        return self.labels if self.labels is not None else labels_of(self.model.config.id2label)

    @cached_property
    def _reader(self) -> Decoder | OwnForward:
        budget = Budget(self.batch_tokens or default_budget(self.model))
        decoder, own = self._decoder(budget), self._own_forward(budget)
        if decoder is not None and self._reads_as_forward(decoder, own):
            return decoder
        if self.pool == "last":
            raise ValueError(f"pool='last' needs a decoder with one head, got {type(self.model).__name__}")
        return own

    def _own_forward(self, budget: Budget) -> OwnForward:
        config = self.model.config
        return OwnForward(
            self.model,
            pad_id=self._pad or 0,
            budget=budget,
            separate=config.get_text_config().eos_token_id if config.is_encoder_decoder else None,
            one_by_one=self._pad is None,
            show_progress=self.show_progress,
            lock=self._lock,
        )

    def _decoder(self, budget: Budget) -> Decoder | None:
        """A decoder with one head on its last hidden states; None for all else."""
        heads = list(heads_of(self.model).values())
        if len(heads) != 1 or self.model.config.is_encoder_decoder or body_of(self.model) is self.model:
            return None
        return Decoder(
            self.model,
            body_of(self.model),
            Plain(in_float32(heads[0])),
            budget,
            Sharing(self.share_prefixes),
            show_progress=self.show_progress,
            lock=self._lock,
        )

    def _reads_as_forward(self, decoder: Decoder, forward: OwnForward) -> bool:
        """Whether body, position and head give what the model's own forward gives; if not, that is what is run."""
        few = min(32, vocabulary(self.model))
        last = 2 % few if self._pad is None else self._pad
        probes = [[i % few for i in range(3, 12)], [5 % few, 7 % few, 6 % few, last]]
        for ids in probes:
            try:
                own = forward([ids])
                read = decoder([Row(ids, [self._pool_of_model(ids)])], [0])[0]
            except (AttributeError, TypeError, IndexError, RuntimeError, ValueError):
                return False
            near = 1e-5 if self.model.dtype == torch.float32 else 0.05
            if own.shape != read.shape or float((own - read).abs().max()) > near * max(1.0, float(own.abs().max())):
                return False
        return True

    def _pooled(self, ids: list[int]) -> int:
        return len(ids) - 1 if self.pool == "last" else self._pool_of_model(ids)

    def _pool_of_model(self, ids: list[int]) -> int:
        return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != self._pad), 0)
