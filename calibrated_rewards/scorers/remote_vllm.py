"""vLLM's dialects for scores: /classify and /pooling with tokens, texts or chats, /score with pairs of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float64
from scipy.special import logit

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.http_client import check_plain, parse_numbers, text_fingerprint
from calibrated_rewards.models.label_names import find_side
from calibrated_rewards.models.labels import Labels, labels_of
from calibrated_rewards.models.server_address import without_secrets
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import lock_for, to_plain


@dataclass(frozen=True)
class Vllm:
    """The dialect of vLLM's /classify, or of /pooling with `path="/pooling"`, for models with a reward head.

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
    """The rule that makes one score of several labels; None: the only label, or of two the second's
    log-odds, which is refused where the name that the server gives the larger one says otherwise."""
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
        """Encode each pair as token ids; without a tokenizer as a text or a chat."""
        if self.tokenizer is not None:
            limit = self.text.limit(self.tokenizer, None)
            with lock_for(self.tokenizer):  # requests are made in several threads, tokens in one
                return list(self.text.encode(self.tokenizer, prompts, completions, limit))
        return [self._text_or_chat(p, c) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Return True for messages: vLLM takes one chat a request."""
        return isinstance(item, dict)

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """Build the body of a request for these inputs."""
        inputs = items[0] if self.alone(items[0]) else {"input": items}
        return {"model": self.model, "use_activation": False, **self.options, **inputs}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """Read them from each row's probs (/classify) or data (/pooling)."""
        rows = _read_rows(answer, count)
        if self.labels is None:
            _check_names(answer)
        scores = []
        for row in rows:
            labels = self.labels or labels_of({i: f"LABEL_{i}" for i in range(row.shape[1])})
            steps = labels((to_log_odds(row) if self.probabilities else row).astype(np.float32))
            scores.append(float({"last": steps[-1], "min": steps.min(), "mean": steps.mean()}[self.steps]))
        return scores

    def doubt(self, answer: Any) -> str:
        """Doubt several labels that always sum to one: they are no logits."""
        rows = _read_rows(answer, len(answer["data"]))
        if self.probabilities or any(
            row.shape[1] == 1 or (row < 0).any() or not (abs(row.sum(1) - 1) < 1e-3).all() for row in rows
        ):
            return ""
        return (
            "these are probabilities, logits were asked for: a server that does not know use_activation needs "
            "Vllm(probabilities=True)"
        )

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on, but for what the server is."""
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

    def _text_or_chat(self, prompt: Prompt, completion: Completion) -> Any:
        if isinstance(prompt, str) and not self.text.chat:
            return self.text.render(cast(Any, None), prompt, completion)[0]
        if isinstance(completion, str):
            answer = [{"role": "assistant", "content": self.text.strip_ends(completion)}]
        else:
            answer = to_plain(completion)
        return {"messages": self.text.messages(prompt) + answer}


@dataclass(frozen=True)
class VllmScore:
    """The dialect of vLLM's /score, for cross-encoders: the prompt is one text, the completion the other.

    A chat is sent as its text if it is a single message; longer ones have no such form.
    """

    model: str
    probabilities: bool = False
    """As in `Vllm`: the server gives a probability, take its log-odds."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: str = "/score"

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Return the texts of each pair."""
        return [(_read_text(p), _read_text(c)) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Return False: any inputs go together."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """Build the body of a request for these inputs."""
        first, second = map(list, zip(*items, strict=True))
        return {"model": self.model, "use_activation": False, **self.options, "text_1": first, "text_2": second}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """Read the scores as they come, or as log-odds."""
        scores = np.array([parse_numbers([row["score"]]) for row in sort_rows(answer["data"], count)], np.float64)
        return [float(x) for x in (to_log_odds(scores) if self.probabilities else scores)[:, 0]]

    def doubt(self, answer: Any) -> str:
        """Return "": one number has no such sign."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on, but for what the server is."""
        return {"dialect": "vllm score", **asdict(self), "options": without_secrets(self.options)}


def _read_rows(answer: Any, count: int) -> list[Float64[np.ndarray, "n L"]]:
    """Read the numbers of each input: one row of them, or one for each token or step."""
    rows = [np.asarray(row["probs"] if "probs" in row else row["data"]) for row in sort_rows(answer["data"], count)]
    for row in rows:
        if row.dtype.kind not in "iuf" or not 1 <= row.ndim <= 2 or not row.size:
            raise ValueError(f"an input has one or more rows of numbers, got {start_of(row.tolist())}")
    return [np.atleast_2d(row.astype(np.float64)) for row in rows]


def _check_names(answer: Any) -> None:
    """Refuse two labels of which the server's name for the larger says that the first is the good one.

    A row names its most probable label alone, so that nobody knows both names from one answer.
    """
    for row in answer["data"]:
        name, numbers_of_row = row.get("label"), np.asarray(row.get("probs", ()))
        if not isinstance(name, str) or numbers_of_row.shape != (2,):
            continue
        side = find_side(name)
        if side and (numbers_of_row[1] > numbers_of_row[0]) != (side == 1):
            at = int(numbers_of_row.argmax())
            raise ValueError(
                Message(
                    f"the server calls label {at} {name!r}: the second of two is then not the good one. Say "
                    f"{setting('labels', 'Difference(good=0, bad=1)', option='--label 0-1')}, or, if it is meant so, "
                    f"{setting('labels', 'Difference(good=1, bad=0)', option='--label 1-0')}"
                )
            )


def sort_rows(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Sort the rows of an answer by the index of the input, which each row says.

    >>> sort_rows([{"index": 1, "score": 5.0}, {"index": 0, "score": 3.0}], 2)
    [{'index': 0, 'score': 3.0}, {'index': 1, 'score': 5.0}]
    """
    by_index = {int(row["index"]): row for row in rows}
    if len(rows) != count or sorted(by_index) != list(range(count)):
        raise ValueError(f"an answer has one row for each of {count} inputs, got {[row['index'] for row in rows]}")
    return [by_index[i] for i in range(count)]


def to_log_odds(probabilities: Float64[np.ndarray, "n L"]) -> Float64[np.ndarray, "n L"]:
    """Compute logits that lead to these probabilities: of one label its log-odds, of several their logarithms.

    What rounding has made 0 or 1 is as far out as float32 tells apart.
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            f"a probability is in [0, 1], got {probabilities.tolist()}: Vllm(probabilities=False) takes logits"
        )
    tiny = np.finfo(np.float32).tiny
    inside = np.clip(probabilities, tiny, 1 - np.finfo(np.float32).epsneg)
    return np.asarray(logit(inside) if probabilities.shape[1] == 1 else np.log(inside))


def _read_text(messages: Prompt | Completion) -> str:
    """Return a text, or that of a chat's only message."""
    plain = to_plain(messages)
    if isinstance(plain, str):
        return plain
    if len(plain) != 1 or not isinstance(plain[0].get("content"), str):
        raise ValueError(f"/score compares two texts, got {start_of(messages)}: a chat of one message with text is one")
    return str(plain[0]["content"])
