"""The common reward model: a transformer with a classification head, one label or several, decoder or encoder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Labels, labels_of
from calibrated_rewards.models.own_forward import HeadPrecision, OwnForward, check_reads, fit_precision
from calibrated_rewards.models.parts import body_of, heads_of, unwrap, vocabulary
from calibrated_rewards.models.shared_prefix import Decoder, ModelReader, ModuleHead, Row, group_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import refuse_pickle, score_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SequenceClassifier:
    """A scorer that is an AutoModelForSequenceClassification, of any architecture.

    Decoders are read at the token where the model itself pools, and completions of one prompt share its KV cache;
    encoders and encoder-decoders run their own forward. Either way padding is on the right and the head is float32.
    """

    model: Any
    """The model, as `from_pretrained` gives it; PEFT's wrapper around one will do."""
    tokenizer: "PreTrainedTokenizerBase"
    labels: Labels | None = None
    """The rule that makes one score of several labels; None: as `labels_of` reads their names."""
    text: Text = field(default_factory=Text)
    pool: Literal["model", "last"] = "model"
    """The token at which a decoder is read: as by its own forward (the last that is no padding), or the very last."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        if self.pool not in ("model", "last"):
            raise ValueError(f"SequenceClassifier needs pool to be 'model' or 'last', got pool={self.pool!r}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(lambda *pairs: self._labels(self.logits(*pairs)), self, prompts, completions)

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """Return the numbers of all labels."""
        ids = self._access.encode(prompts, completions)
        reader = self._reader
        if isinstance(reader, OwnForward):
            return fit_precision(reader, ids, self._precision)(ids).numpy()
        rows = [Row(row, [len(row) - 1 if self.pool == "last" else self._pool_of_model(row)]) for row in ids]
        return torch.cat(reader(rows, [group_of(prompt) for prompt in prompts])).numpy()

    def try_out(self) -> None:
        """Read a few made-up tokens: ValueError for a model that cannot be read, or reads nothing."""
        reader = self._reader
        if isinstance(reader, OwnForward):
            check_reads(reader, self._access.limit)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        settings = {"labels": repr(self._labels), "pool": self.pool, "text": self._access.text_fingerprint()}
        return {"kind": "sequence classifier", **model_fingerprint(self.model, self.tokenizer), **settings}

    @cached_property
    def _labels(self) -> Labels:
        return self.labels if self.labels is not None else labels_of(self._model.config.id2label)

    @property
    def _reader(self) -> Decoder | OwnForward:
        """Made anew for each call, of the parts that the model has now; what was found out about it is kept."""
        decoder = self._decoder
        if decoder is not None and self._decodes:
            return decoder
        if self.pool == "last":
            raise ValueError(f"pool='last' needs a decoder with one head, got {type(self.model).__name__}")
        return self._own_forward

    @property
    def _decoder(self) -> Decoder | None:
        """A decoder with one head on its last hidden states; None for all else."""
        model, heads = self._model, list(heads_of(self._model).values())
        if len(heads) != 1 or model.config.is_encoder_decoder or body_of(model) is model:
            return None
        return self._access.decoder(ModuleHead(heads[0]))

    @property
    def _own_forward(self) -> OwnForward:
        config = self._model.config
        separate = config.get_text_config().eos_token_id if config.is_encoder_decoder else None
        return self._access.own_forward(self._access.pad, separate=separate)

    @cached_property
    def _decodes(self) -> bool:
        """True if body, position and head give what the model's own forward gives; if not, that is what is run."""
        decoder = self._decoder
        if decoder is None:
            return False
        few = min(32, vocabulary(self._model))
        last = 2 % few if self._access.pad is None else self._access.pad
        near = 1e-5 if self._model.dtype == torch.float32 else 0.05
        for ids in [i % few for i in range(3, 12)], [5 % few, 7 % few, 6 % few, last]:
            try:
                expected = self._own_forward([ids])
                numbers = decoder([Row(ids, [self._pool_of_model(ids)])], [0])[0]
                alike = expected.shape == numbers.shape and not expected.isnan().all()
                farthest = near * max(1.0, float(expected.abs().max()))
                alike = alike and float((expected - numbers).abs().max()) <= farthest
            except (AttributeError, TypeError, IndexError, RuntimeError, ValueError):
                alike = False
            if not alike:
                logger.info("%s is read through its own forward: no shared prefixes", type(self.model).__name__)
                return False
        return True

    def _pool_of_model(self, ids: list[int]) -> int:
        return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != self._access.pad), 0)

    @cached_property
    def _precision(self) -> HeadPrecision:
        return HeadPrecision()

    @cached_property
    def _access(self) -> ModelReader:
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        return ModelReader(self._model, self.tokenizer, self.text, *options)

    @property
    def _model(self) -> Any:
        return unwrap(self.model)
