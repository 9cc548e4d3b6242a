"""vLLM's way to be asked for scores: /classify and /pooling with tokens, texts or chats, /score with pairs of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import logit

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.http_client import check_plain, parse_numbers, text_fingerprint
from calibrated_rewards.models.label_names import find_side
from calibrated_rewards.models.labels import Labels, labels_of
from calibrated_rewards.models.server_address import without_secrets
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import lock_for, plain


@dataclass(frozen=True)
class Vllm:
    """vLLM's /classify, and its /pooling with `path="/pooling"`, for models with a classification or a reward head.

    With the reward model's tokenizer the *token ids* are sent: template, special tokens, EOS and truncation are then
    those of `text`, and the score is that of the same checkpoint scored here (vLLM 0.15 or later). Without one, text
    prompts are sent as text, joined to their completion, and chats as messages, in a request each: the server renders
    them, and refuses what is too long.

    It asks for logits (`use_activation: false`): probabilities near 0 and 1 are equal numbers for different answers.
    """

    model: str
    """The name it is served under; it names the scorer in the fingerprint."""
    tokenizer: Any = None
    text: Text = field(default_factory=Text)
    labels: Labels | None = None
    """How several labels make one score; None: the only label, or of two the second's log-odds, unless the name that
    the server gives the larger one says otherwise: then this asks."""
    probabilities: bool = False
    """The server gives probabilities whatever it is asked, as vLLM did before 0.12: take their log-odds."""
    steps: Literal["last", "min", "mean"] = "last"
    """/pooling may answer for each token, or each step of a process reward model: which of their scores to take."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """More fields for the request: task, priority, ... They may hold keys, so no repr shows them."""
    path: str = "/classify"

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            check_plain(self.text)
        if self.steps not in ("last", "min", "mean"):
            raise ValueError(f"Vllm needs steps to be 'last', 'min' or 'mean', got steps={self.steps!r}")

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Token ids; or texts and chats."""
        if self.tokenizer is not None:
            limit = self.text.limit(self.tokenizer, None)
            with lock_for(self.tokenizer):  # requests are made in several threads, tokens in one
                return list(self.text.encode(self.tokenizer, prompts, completions, limit))
        return [_text_or_chat(self.text, p, c) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Messages are: vLLM takes one chat a request."""
        return isinstance(item, dict)

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The request."""
        asked = items[0] if self.alone(items[0]) else {"input": items}
        return {"model": self.model, "use_activation": False, **self.options, **asked}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """From each row's probs (/classify) or data (/pooling)."""
        rows = _rows(answer, count)
        if self.labels is None:
            _check_names(answer)
        return [self._score((log_odds(row) if self.probabilities else row).astype(np.float32)) for row in rows]

    def doubt(self, answer: Any) -> str:
        """Several labels that always sum to one are no logits."""
        if self.probabilities or not all(map(_sums_to_one, _rows(answer, len(answer["data"])))):
            return ""
        return (
            "these are probabilities, logits were asked for: a server that does not know use_activation needs "
            "Vllm(probabilities=True)"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, but for what the server is."""
        return {
            "dialect": "vllm",
            "model": self.model,
            "path": self.path,
            "text": text_fingerprint(self.text, self.tokenizer),
            "labels": repr(self.labels),
            "probabilities": self.probabilities,
            "steps": self.steps,
            "options": without_secrets(self.options),
        }

    def _score(self, rows: Float32[np.ndarray, "n L"]) -> float:
        scores = (self.labels or labels_of({i: f"LABEL_{i}" for i in range(rows.shape[1])}))(rows)
        return float({"last": scores[-1], "min": scores.min(), "mean": scores.mean()}[self.steps])


@dataclass(frozen=True)
class VllmScore:
    """vLLM's /score, for cross-encoders: the prompt is one text, the completion the other.

    A chat is sent as its text if it is a single message; longer ones have no such form.
    """

    model: str
    probabilities: bool = False
    """As in `Vllm`: the server gives a probability, take its log-odds."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: str = "/score"

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Pairs of texts."""
        return [(_only_text(p), _only_text(c)) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Never."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The request."""
        first, second = map(list, zip(*items, strict=True))
        return {"model": self.model, "use_activation": False, **self.options, "text_1": first, "text_2": second}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """The scores as they come, or their log-odds."""
        scores = np.array([parse_numbers([row["score"]]) for row in by_index(answer["data"], count)], np.float64)
        return [float(x) for x in (log_odds(scores) if self.probabilities else scores)[:, 0]]

    def doubt(self, answer: Any) -> str:
        """None: one number has no such sign."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, but for what the server is."""
        return {"dialect": "vllm score", **asdict(self), "options": without_secrets(self.options)}


def _rows(answer: Any, count: int) -> list[Float64[np.ndarray, "n L"]]:
    """The numbers of each input: one row of them, or one for each token or step."""
    found = [np.asarray(row["probs"] if "probs" in row else row["data"]) for row in by_index(answer["data"], count)]
    for row in found:
        if row.dtype.kind not in "iuf" or not 1 <= row.ndim <= 2 or not row.size:
            raise ValueError(f"an input has one or more rows of numbers, got {start_of(row.tolist())}")
    return [np.atleast_2d(row.astype(np.float64)) for row in found]


def _check_names(answer: Any) -> None:
    """Refuse two labels of which the server's name for the larger says that the first is the good one.

    A row names its most probable label alone, so that nobody knows both names from one answer.
    """
    for row in answer["data"]:
        name, numbers_of_row = row.get("label"), np.asarray(row.get("probs", ()))
        if not isinstance(name, str) or numbers_of_row.shape != (2,):
            continue
        said = find_side(name)
        if said and (numbers_of_row[1] > numbers_of_row[0]) != (said == 1):
            at = int(numbers_of_row.argmax())
            raise ValueError(
                Message(
                    f"the server calls label {at} {name!r}: the second of two is then not the good one. Say "
                    f"{setting('labels', 'Difference(good=0, bad=1)', option='--label 0-1')}, or, if it is meant so, "
                    f"{setting('labels', 'Difference(good=1, bad=0)', option='--label 1-0')}"
                )
            )


def by_index(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The rows of an answer in the order of the inputs, which each row says.

    >>> by_index([{"index": 1, "score": 5.0}, {"index": 0, "score": 3.0}], 2)
    [{'index': 0, 'score': 3.0}, {'index': 1, 'score': 5.0}]
    """
    found = {int(row["index"]): row for row in rows}
    if len(rows) != count or sorted(found) != list(range(count)):
        raise ValueError(f"an answer has one row for each of {count} inputs, got {[row['index'] for row in rows]}")
    return [found[i] for i in range(count)]


def log_odds(probabilities: Float64[np.ndarray, "n L"]) -> Float64[np.ndarray, "n L"]:
    """Logits that lead to these probabilities: of one label its log-odds, of several their logarithms.

    What rounding has made 0 or 1 is as far out as float32 tells apart.
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            f"a probability is in [0, 1], got {probabilities.tolist()}: Vllm(probabilities=False) takes logits"
        )
    tiny = np.finfo(np.float32).tiny
    inside = np.clip(probabilities, tiny, 1 - np.finfo(np.float32).epsneg)
    return np.asarray(logit(inside) if probabilities.shape[1] == 1 else np.log(inside))


def _sums_to_one(rows: Float64[np.ndarray, "n L"]) -> bool:
    return bool(rows.shape[1] > 1 and (rows >= 0).all() and (abs(rows.sum(1) - 1) < 1e-3).all())


def _text_or_chat(text: Text, prompt: Prompt, completion: Completion) -> Any:
    if isinstance(prompt, str) and not text.chat:
        return text.render(cast(Any, None), prompt, completion)[0]
    return {"messages": text.messages(prompt) + _answer(text, completion)}


def _answer(text: Text, completion: Completion) -> list[dict[str, Any]]:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": text.strip_ends(completion)}]
    return list(plain(completion))


def _only_text(said: Prompt | Completion) -> str:
    """A text, or that of a chat's only message."""
    messages = said if isinstance(said, str) else plain(said)
    if isinstance(messages, str):
        return messages
    if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
        raise ValueError(f"/score compares two texts, got {start_of(said)}: a chat of one message with text is one")
    return str(messages[0]["content"])
