"""How other servers of reward models are asked: OpenRLHF's, and this library's own.

A reward model behind HTTP: several requests in flight, retried with care, scores in the order of the pairs."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.batches import progress_bar
from calibrated_rewards.models.http_client import (
    Post,
    Refused,
    RequestThreads,
    check_numbers,
    check_plain,
    open_client,
    parse_numbers,
    text_fingerprint,
)
from calibrated_rewards.models.server_address import Address, format_url, redact_url
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import paired, plain


@dataclass(frozen=True)
class OpenRlhf:
    """OpenRLHF's /get_reward, and the servers made after it: texts, rendered here, and a list of rewards.

    Its own server takes EOS and padding off the end of a text and adds one EOS. Chats need the tokenizer of the reward
    model (or of the policy, if the server was made for its texts) for its template.
    """

    model: str
    """What is served there, for the fingerprint; it is not sent."""
    tokenizer: Any = None
    text: Text = field(default_factory=Text)
    path: str = "/get_reward"

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            check_plain(self.text)

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """The whole text, and that of the prompt."""
        return [self._texts(p, c) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Never."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The request."""
        queries, prompts = map(list, zip(*items, strict=True))
        return {"query": queries, "prompts": prompts, "labels": [""] * len(items)}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """The rewards, each a number or a list of one."""
        return parse_numbers(answer["rewards"])

    def doubt(self, answer: Any) -> str:
        """None."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, but for what the server is."""
        return {"dialect": "openrlhf", "model": self.model, "text": text_fingerprint(self.text, self.tokenizer)}

    def _texts(self, prompt: Prompt, completion: Completion) -> tuple[str, str]:
        if self.tokenizer is None and not isinstance(prompt, str):
            raise ValueError(
                f"OpenRlhf sends text, got messages: {start_of(prompt)}. Give a tokenizer, OpenRlhf(tokenizer=...), "
                "whose chat template renders them"
            )
        return self.text.render(self.tokenizer, prompt, completion)[0], self.text.opening(self.tokenizer, prompt)[0]


@dataclass(frozen=True)
class Native:
    """This library's own server: prompts and completions as they are, raw scores."""

    model: str
    """What is served there, for the fingerprint; it is not sent."""
    path: str = "/score"

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Texts, and messages as plain JSON."""
        return [(plain(p), plain(c)) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Never."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The request."""
        prompts, completions = map(list, zip(*items, strict=True))
        return {"prompts": prompts, "completions": completions}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """The raw scores."""
        return parse_numbers(answer["raw"])

    def doubt(self, answer: Any) -> str:
        """None."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, but for what the server is."""
        return {"dialect": "native", "model": self.model}


__all__ = ["Asking", "Dialect", "Refused", "Remote"]

# A call fails if so many inputs, and all that came before them, had answers that a dialect doubts.
ENOUGH = 4


@runtime_checkable
class Dialect(Protocol):
    """How a kind of server is asked, and how its answer is read; remote_vllm.py and remote_dialects.py have some."""

    @property
    def path(self) -> str:
        """Where requests go on a server of which only the host is given."""

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """What is sent of each pair."""

    def alone(self, item: Any) -> bool:
        """Whether an input needs a request of its own."""

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The body of a request for these inputs."""

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """The scores in an answer, in the order of the inputs; or ValueError, KeyError, TypeError."""

    def doubt(self, answer: Any) -> str:
        """What makes an answer that has scores look like something else, in all of its inputs; or nothing."""

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, as far as the asking side knows."""


@dataclass(frozen=True)
class Remote:
    """Scores with a server: `Remote("http://rm:8000", Vllm("my-reward-model", tokenizer))`.

    Connection errors, timeouts, status 408, 429 and 5xx are tried again, after a time that doubles and is shaken, or
    longer if the server asks for it (Retry-After); anything else is an error at once. The token, sent as
    `Authorization: Bearer`, is in no repr, error, log or fingerprint, nor are a password, a query or unusual words in
    the path of the url; the address is in no fingerprint: the dialect's model names the scorer.
    """

    url: str
    """Where requests are posted, as it stands; a bare host gets the dialect's path. $NAME: an environment variable."""
    dialect: Dialect
    batch_size: int = 32
    """Pairs in a request."""
    concurrency: int = 8
    """Requests in flight at once."""
    timeout: float = 120.0
    """Seconds for each step of a request: to connect, to send, to wait for an answer."""
    retries: int = 5
    """How often a request is tried again."""
    backoff: float = 0.5
    """Seconds before the first of these; then twice as many each time."""
    token: str | None = field(default=None, repr=False)
    show_progress: bool = True

    thread_safe = True  # each call has its own connections

    def __post_init__(self) -> None:
        _ = self._place
        whole = {"batch_size": (self.batch_size, 1), "concurrency": (self.concurrency, 1), "retries": (self.retries, 0)}
        check_numbers("Remote", whole, self.timeout, self.backoff)

    def __repr__(self) -> str:
        usual = {"batch_size": 32, "concurrency": 8, "timeout": 120.0, "retries": 5, "backoff": 0.5}
        changed = "".join(
            f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value
        )
        return f"Remote({format_url(self.url)!r}, {self.dialect!r}{changed})"

    def __hash__(self) -> int:
        return hash(self.url)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        asked, answered = paired(prompts, completions)
        items = self.dialect.inputs(asked, answered) if asked else []
        scores = np.empty(len(items), np.float32)
        batches = list(self._batches(items))
        if not batches:
            return scores
        doubtful, trusted = 0, False
        with progress_bar(len(items), self.show_progress) as bar, closing(self._answers(items, batches)) as answers:
            for number, (found, doubt) in answers:
                batch = batches[number]
                scores[batch] = found
                bar.update(len(batch))
                doubtful, trusted = doubtful + len(batch), trusted or not doubt
                if doubtful >= ENOUGH and not trusted:
                    raise ValueError(f"{self.shown} gave answers to {doubtful} inputs of which all look alike: {doubt}")
        return scores

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, as far as this side knows."""
        return {"kind": "remote", **self.dialect.fingerprint()}

    @property
    def address(self) -> str:
        """Where requests are posted."""
        return self._place.posted(self.dialect.path)

    @property
    def shown(self) -> str:
        """The address as errors show it."""
        return redact_url(self.address)

    def redacted(self, said: str) -> str:
        """A text less the secrets that this side has sent, which servers may quote."""
        return self._place.redacted(said)

    @property
    def _place(self) -> Address:
        return Address(self.url, self.token)

    def _answers(self, items: list[Any], batches: list[list[int]]) -> Generator[tuple[int, Any], None, None]:
        """The number of each batch with its scores and what is to be doubted of them, as they come."""
        stop, connected = threading.Event(), open_client(self._place, self.timeout, self.concurrency)
        post = Post(self._place, connected, self.retries, self.backoff, stop)
        asked = [[items[i] for i in batch] for batch in batches]
        return RequestThreads(Asking(self, post), asked, self.concurrency, stop, connected.close).results()

    def _batches(self, items: list[Any]) -> Iterator[list[int]]:
        together = []
        for i, item in enumerate(items):
            if self.dialect.alone(item):
                yield [i]
            else:
                together.append(i)
        for start in range(0, len(together), self.batch_size):
            yield together[start : start + self.batch_size]


@dataclass(frozen=True, eq=False)
class Asking:
    """Asks for the scores of some inputs."""

    remote: Remote
    post: Post

    def __call__(self, items: list[Any]) -> tuple[Float32[np.ndarray, " n"], str]:
        """The scores, checked, and what is to be doubted of them."""
        response = self.post(self.remote.address, self.remote.dialect.payload(items))
        said = self.post.quote(response)
        try:
            answer = response.json()
            with np.errstate(over="ignore"):
                scores = np.asarray(self.remote.dialect.scores(answer, len(items))).astype(np.float32)
            doubt = self.remote.dialect.doubt(answer)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            why = self.remote.redacted(repr(error))
            raise ValueError(f"{self.remote.shown} gave an answer that has no scores to read, {why}: {said}") from None
        if scores.shape != (len(items),) or not np.isfinite(scores).all():
            raise ValueError(f"{self.remote.shown} gives a finite number for each of {len(items)} inputs, got {said}")
        return scores, doubt
