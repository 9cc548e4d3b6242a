"""An encoder that reads the prompt and the response as a pair of texts, and gives the pair a score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.labels import Labels, labels_of
from calibrated_rewards.models.own_forward import OwnForward, check_reads
from calibrated_rewards.models.parts import vocabulary
from calibrated_rewards.models.shared_prefix import ModelReader
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pair(NamedTuple):
    """The tokens of a pair, their types, and which text each is of: 0, 1, or None for special tokens."""

    ids: list[int]
    types: list[int]
    texts: list[int | None]


@dataclass(frozen=True, eq=False)
class CrossEncoder:
    """Scores with an AutoModelForSequenceClassification that takes `tokenizer(prompt, response)`.

    Of what is longer than `max_length` tokens, the prompt loses its first tokens and the response is kept; only where
    the response alone is too long does it lose its first tokens as well. That is reported as `Text` reports it.

    There is no chat template. A prompt that is one user's message is that message's content; several messages are
    lines, "user: ..." and "assistant: ...". A completion that is one assistant's message is its content.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: Labels | None = None
    """How several labels make one score; None: as `labels_of` reads their names."""
    text: Text = field(default_factory=Text)
    """`max_length`, `on_long` and `strip`; the tokenizer's own form of a pair leaves nothing else to choose."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock

    def __post_init__(self) -> None:
        plain = Text(max_length=self.text.max_length, on_long=self.text.on_long, strip=self.text.strip)
        if self.text != plain:
            raise ValueError(f"CrossEncoder takes max_length, on_long and strip of a Text, got {self.text}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        prompts, completions = paired(prompts, completions)
        if not prompts:
            return np.empty(0, np.float32)
        return finite(self._labels(self.logits(prompts, completions)), prompts, completions, name_of(self))

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """The numbers of all labels."""
        prompts, completions = paired(prompts, completions)
        with self._access.lock:
            pairs = self._pairs(prompts, completions)
        self.text.report([len(pair.ids) for pair in pairs], self._access.limit)
        pairs = [shortened(pair, self._access.limit) for pair in pairs]
        types = [pair.types for pair in pairs] if all(pair.types for pair in pairs) else None
        return self._reader([pair.ids for pair in pairs], types).numpy()

    def try_out(self) -> None:
        """Read a few made-up tokens: ValueError for a model that cannot be read, or reads nothing."""
        check_reads(self._reader, self._access.limit)

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "kind": "cross-encoder",
            **model_fingerprint(self.model, self.tokenizer),
            "labels": repr(self._labels),
            "text": {"max_length": self._access.limit, "strip": list(self.text.strip)},
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @cached_property
    def _labels(self) -> Labels:
        return self.labels if self.labels is not None else labels_of(self.model.config.id2label)  # type: ignore[arg-type]

    @cached_property
    def _access(self) -> ModelReader:
        return ModelReader(self.model, self.tokenizer, self.text, self.batch_tokens, show_progress=self.show_progress)

    @property
    def _reader(self) -> OwnForward:
        # RoBERTa counts positions by what is not its own padding id, so that is the one to pad with.
        ids = self.model.config.pad_token_id, self.tokenizer.pad_token_id
        pad = next((i for i in ids if i is not None and 0 <= i < vocabulary(self.model)), 0)
        return self._access.own_forward(pad)

    def _pairs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Pair]:
        """The tokens of the pairs, whole."""
        responses = [self.text.render(self.tokenizer, "", flat(completion))[0] for completion in completions]
        asked = [flat(prompt) for prompt in prompts]
        found = self.tokenizer(asked, responses, padding=False, truncation=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        types: list[list[int]] = found.get("token_type_ids", [[]] * len(ids))
        texts = [found.sequence_ids(i) for i in range(len(ids))]
        return [Pair(*pair) for pair in zip(ids, types, texts, strict=True)]


def flat(messages: Prompt | Completion) -> str:
    """A text as it is; messages as one: the content of a single one, or lines "role: content".

    >>> flat([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> flat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    'system: Be brief.\\nuser: Hi'
    """
    if isinstance(messages, str) or not len(messages):
        return messages if isinstance(messages, str) else ""
    read = Text().messages(messages)
    if len(read) == 1 and read[0]["role"] != "system":
        return _content(read[0])
    return "\n".join(f"{message['role']}: {_content(message)}" for message in read)


def shortened(pair: Pair, limit: int) -> Pair:
    """At most `limit` tokens: without the prompt's first ones, and then without the response's.

    >>> shortened(Pair([0, 5, 6, 1, 7, 8, 1], [], [None, 0, 0, None, 1, 1, None]), 5).ids
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
    dropped = set(order[:over])
    stay = [i for i in range(len(pair.ids)) if i not in dropped]
    return Pair([pair.ids[i] for i in stay], [pair.types[i] for i in stay if pair.types], [pair.texts[i] for i in stay])


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str) or message.get("tool_calls"):
        raise TypeError(f"a cross-encoder reads messages that are text alone, got {message}")
    return content
