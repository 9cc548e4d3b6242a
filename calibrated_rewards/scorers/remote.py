"""Reward models behind HTTP: several requests in flight, retried with care, scores in the order of the pairs.

`Remote` sends the requests; a `Dialect` says how a kind of server takes them. Here are OpenRLHF's and this library's
own, in remote_vllm.py those of vLLM.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from calibrated_rewards.models.http_client import (
    Post,
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
from calibrated_rewards.scorers.protocol import check_pairs, to_plain

# A call fails if so many inputs, and all that came before them, had answers that a dialect doubts.
ENOUGH = 4


@runtime_checkable
class Dialect(Protocol):
    """The requests that a kind of server takes, and how its answers are read; yours may be another one."""

    @property
    def path(self) -> str:
        """The path of requests to a server of which only the host is given."""

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Turn each pair into an input of a request."""

    def alone(self, item: Any) -> bool:
        """Return whether an input needs a request of its own."""

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """Build the body of a request for these inputs."""

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """Read the scores from an answer, in the order of the inputs; or ValueError, KeyError, TypeError."""

    def doubt(self, answer: Any) -> str:
        """Say why all numbers of an answer look like something else than scores; "" if they do not."""

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on, as far as this side knows."""


@dataclass(frozen=True)
class Remote:
    """A scorer that asks a server: `Remote("http://rm:8000", Vllm("my-reward-model", tokenizer))`.

    Connection errors, timeouts, status 408, 429 and 5xx are tried again, after a time that doubles and is shaken, or
    longer if the server asks for it (Retry-After); anything else is an error at once. The token, sent as
    `Authorization: Bearer`, is in no repr, error, log or fingerprint, nor are a password, a query or unusual words in
    the path of the url; the address is in no fingerprint: the dialect's model names the scorer.
    """

    url: str
    """The address of requests, as it stands; a bare host gets the dialect's path. $NAME: an environment variable."""
    dialect: Dialect
    batch_size: int = 32
    """Pairs in a request."""
    concurrency: int = 8
    """Requests in flight at once."""
    timeout: float = 120.0
    """Seconds for each step of a request: to connect, to send, to wait for an answer."""
    retries: int = 5
    """Number of times that a request is tried again."""
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
        """Score each completion of its prompt."""
        prompts, completions = check_pairs(prompts, completions)
        items = self.dialect.inputs(prompts, completions) if prompts else []
        scores = np.empty(len(items), np.float32)
        batches = list(self._batches(items))
        if not batches:
            return scores
        stop, connected = threading.Event(), open_client(self._place, self.timeout, self.concurrency)
        request = Request(self, Post(self._place, connected, self.retries, self.backoff, stop))
        jobs = [[items[i] for i in batch] for batch in batches]
        answers = RequestThreads(request, jobs, self.concurrency, stop, connected.close).results()
        doubtful, trusted = 0, False
        # As models.batches.progress_bar, which needs torch.
        look: dict[str, Any] = {"unit": " completions", "desc": "scoring", "delay": 3}
        show = None if self.show_progress else True
        with tqdm(total=len(items), disable=show, **look) as bar, closing(answers):
            for job, (answer, doubt) in answers:
                batch = batches[job]
                scores[batch] = answer
                bar.update(len(batch))
                doubtful, trusted = doubtful + len(batch), trusted or not doubt
                if doubtful >= ENOUGH and not trusted:
                    raise ValueError(f"{self.shown} gave answers to {doubtful} inputs of which all look alike: {doubt}")
        return scores

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on, as far as this side knows."""
        return {"kind": "remote", **self.dialect.fingerprint()}

    @property
    def address(self) -> str:
        """The address that requests are posted to."""
        return self._place.posted(self.dialect.path)

    @property
    def shown(self) -> str:
        """The address as errors show it."""
        return redact_url(self.address)

    @property
    def _place(self) -> Address:
        return Address(self.url, self.token)

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
class Request:
    """A function of some inputs that asks the server for their scores."""

    remote: Remote
    post: Post

    def __call__(self, items: list[Any]) -> tuple[Float32[np.ndarray, " n"], str]:
        """Return the scores, checked, and why they look like something else, or ""."""
        shown, dialect = self.remote.shown, self.remote.dialect
        response = self.post(self.remote.address, dialect.payload(items))
        start = self.post.quote(response)
        try:
            answer = response.json()
            with np.errstate(over="ignore"):
                scores = np.asarray(dialect.scores(answer, len(items))).astype(np.float32)
            doubt = dialect.doubt(answer)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            why = self.post.place.redacted(repr(error))
            raise ValueError(f"{shown} gave an answer that has no scores to read, {why}: {start}") from None
        if scores.shape != (len(items),) or not np.isfinite(scores).all():
            raise ValueError(f"{shown} gives a finite number for each of {len(items)} inputs, got {start}")
        return scores, doubt


@dataclass(frozen=True)
class OpenRlhf:
    """The dialect of OpenRLHF's /get_reward, and servers made after it: texts, rendered here, and a list of rewards.

    Its own server takes EOS and padding off the end of a text and adds one EOS. Chats need the tokenizer of the reward
    model (or of the policy, if the server was made for its texts) for its template.
    """

    model: str
    """The name of the model served there, for the fingerprint; it is not sent."""
    tokenizer: Any = None
    text: Text = field(default_factory=Text)
    path: str = "/get_reward"

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            check_plain(self.text)

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Render the whole text of each pair, and that of the prompt."""
        if self.tokenizer is None and (chat := next((p for p in prompts if not isinstance(p, str)), None)) is not None:
            raise ValueError(
                f"OpenRlhf sends text, got messages: {start_of(chat)}. Give a tokenizer, OpenRlhf(tokenizer=...), "
                "whose chat template renders them"
            )
        render, opening = self.text.render, self.text.opening
        return [
            (render(self.tokenizer, p, c)[0], opening(self.tokenizer, p)[0])
            for p, c in zip(prompts, completions, strict=True)
        ]

    def alone(self, item: Any) -> bool:
        """Return False: any inputs go together."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """Build the body of a request for these inputs."""
        queries, prompts = map(list, zip(*items, strict=True))
        return {"query": queries, "prompts": prompts, "labels": [""] * len(items)}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """Read the rewards, each a number or a list of one."""
        return parse_numbers(answer["rewards"])

    def doubt(self, answer: Any) -> str:
        """Return "": one number has no such sign."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on, but for what the server is."""
        return {"dialect": "openrlhf", "model": self.model, "text": text_fingerprint(self.text, self.tokenizer)}


@dataclass(frozen=True)
class Native:
    """The dialect of this library's own server: prompts and completions as they are, raw scores."""

    model: str
    """The name of the model served there, for the fingerprint; it is not sent."""
    path: str = "/score"

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Return texts, and messages as plain JSON."""
        return [(to_plain(p), to_plain(c)) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Return False: any inputs go together."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """Build the body of a request for these inputs."""
        prompts, completions = map(list, zip(*items, strict=True))
        return {"prompts": prompts, "completions": completions}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """Read the raw scores from an answer."""
        return parse_numbers(answer["raw"])

    def doubt(self, answer: Any) -> str:
        """Return "": one number has no such sign."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on, but for what the server is."""
        return {"dialect": "native", "model": self.model}
