"""Reward models that are a transformer with a head: classifiers of one text or of a pair, and outputs by other names.

`SequenceClassifier` is the common one. `CrossEncoder` reads prompt and response as a pair of texts. `MultiAttribute`
reads another output than `logits`: attributes, end scores, or a bare tensor.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Label, Labels, labels_of
from calibrated_rewards.models.own_forward import OwnForward, check_reads, fit_precision
from calibrated_rewards.models.parts import body_of, heads_of, unwrap, vocabulary
from calibrated_rewards.models.shared_prefix import Decoder, ModelReader, ModuleHead, Row, group_of, reader_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import check_pairs, refuse_pickle, score_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def rule_of(scorer: Any) -> Labels:
    """Return the rule that makes one score of a classifier's labels: the one chosen, or as their names say."""
    return scorer.labels if scorer.labels is not None else labels_of(unwrap(scorer.model).config.id2label)


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
    _labels = cached_property(rule_of)

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
            return fit_precision(reader, ids, self._access.precision)(ids).numpy()
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
    def _access(self) -> ModelReader:
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        return ModelReader(self._model, self.tokenizer, self.text, *options)

    @property
    def _model(self) -> Any:
        return unwrap(self.model)


class Pair(NamedTuple):
    """The tokens of a pair, their types, and the text that each is of: 0, 1, or None for special tokens."""

    ids: list[int]
    types: list[int]
    texts: list[int | None]


@dataclass(frozen=True, eq=False)
class CrossEncoder:
    """A scorer that is an AutoModelForSequenceClassification and takes `tokenizer(prompt, response)`.

    Of what is longer than `max_length` tokens, the prompt loses its first tokens and the response is kept; only where
    the response alone is too long does it lose its first tokens as well. That is reported as `Text` reports it.

    There is no chat template. A prompt that is one user's message is that message's content; several messages are
    lines, "user: ..." and "assistant: ...". A completion that is one assistant's message is its content.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: Labels | None = None
    """The rule that makes one score of several labels; None: as `labels_of` reads their names."""
    text: Text = field(default_factory=Text)
    """`max_length`, `on_long` and `strip`; the tokenizer's own form of a pair leaves nothing else to choose."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle
    _access = cached_property(reader_of)
    _labels = cached_property(rule_of)

    def __post_init__(self) -> None:
        plain = Text(max_length=self.text.max_length, on_long=self.text.on_long, strip=self.text.strip)
        if self.text != plain:
            raise ValueError(f"CrossEncoder takes max_length, on_long and strip of a Text, got {self.text}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(lambda *pairs: self._labels(self.logits(*pairs)), self, prompts, completions)

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """Return the numbers of all labels."""
        prompts, completions = check_pairs(prompts, completions)
        with self._access.lock:  # fast tokenizers do not bear two threads
            responses = [self.text.render(self.tokenizer, "", write_flat(each))[0] for each in completions]
            texts = [write_flat(prompt) for prompt in prompts], responses
            encoding = self.tokenizer(*texts, padding=False, truncation=False, verbose=False)
        ids: list[list[int]] = encoding["input_ids"]
        token_types = encoding.get("token_type_ids", [[]] * len(ids))
        pairs = [Pair(row, token_types[i], encoding.sequence_ids(i)) for i, row in enumerate(ids)]
        self.text.report([len(pair.ids) for pair in pairs], self._access.limit)
        pairs = [shorten(pair, self._access.limit) for pair in pairs]
        types = [pair.types for pair in pairs] if all(pair.types for pair in pairs) else None
        return self._reader([pair.ids for pair in pairs], types).numpy()

    def try_out(self) -> None:
        """Read a few made-up tokens: ValueError for a model that cannot be read, or reads nothing."""
        check_reads(self._reader, self._access.limit)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        text = {"max_length": self._access.limit, "strip": list(self.text.strip)}
        model = model_fingerprint(self.model, self.tokenizer)
        return {"kind": "cross-encoder", **model, "labels": repr(self._labels), "text": text}

    @property
    def _reader(self) -> OwnForward:
        # RoBERTa counts positions by what is not its own padding id, so that is the one to pad with.
        ids = self.model.config.pad_token_id, self.tokenizer.pad_token_id
        pad = next((i for i in ids if i is not None and 0 <= i < vocabulary(self.model)), 0)
        return self._access.own_forward(pad)


def write_flat(messages: Prompt | Completion) -> str:
    """Write messages as one text: the content of a single one, or lines "role: content"; a text stays as it is.

    >>> write_flat([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> write_flat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    'system: Be brief.\\nuser: Hi'
    """
    if isinstance(messages, str) or not len(messages):
        return messages if isinstance(messages, str) else ""
    plain = Text().messages(messages)
    for message in plain:
        if not isinstance(message.get("content"), str) or message.get("tool_calls"):
            raise TypeError(f"a cross-encoder reads messages that are text alone, got {message}")
    if len(plain) == 1 and plain[0]["role"] != "system":
        return str(plain[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in plain)


def shorten(pair: Pair, limit: int) -> Pair:
    """Cut a pair to `limit` tokens: first the prompt's first ones go, then the response's.

    >>> shorten(Pair([0, 5, 6, 1, 7, 8, 1], [], [None, 0, 0, None, 1, 1, None]), 5).ids
    [0, 1, 7, 8, 1]
    """
    over = len(pair.ids) - limit
    if over <= 0:
        return pair
    order = [i for text in (0, 1) for i, of in enumerate(pair.texts) if of == text]
    if len(order) <= over:
        raise ValueError(
            f"max_length={limit} leaves no room for text beside {len(pair.ids) - len(order)} special tokens"
        )
    stay = sorted({*range(len(pair.ids))} - {*order[:over]})
    return Pair([pair.ids[i] for i in stay], [pair.types[i] for i in stay if pair.types], [pair.texts[i] for i in stay])


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
    _widths = cached_property(lambda _: set[int]())
    """The numbers that two first inputs of different lengths gave: two widths if the output has one a token."""

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
        reader = fit_precision(self._reader, ids, self._access.precision)
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
