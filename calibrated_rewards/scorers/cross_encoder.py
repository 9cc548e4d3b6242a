"""Encoders that read a prompt and its response as a pair of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Labels, labels_of
from calibrated_rewards.models.own_forward import OwnForward, check_reads
from calibrated_rewards.models.parts import vocabulary
from calibrated_rewards.models.shared_prefix import reader_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import check_pairs, refuse_pickle, score_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    @cached_property
    def _labels(self) -> Labels:
        return self.labels if self.labels is not None else labels_of(self.model.config.id2label)  # type: ignore[arg-type]

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
