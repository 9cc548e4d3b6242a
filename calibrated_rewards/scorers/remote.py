"""A reward model behind HTTP: several requests in flight, retried with care, scores in the order of the pairs."""

import json
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.reading.batches import progress

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "a remote scorer needs httpx, it is not installed: pip install 'calibrated-rewards[http]'"
    ) from error

# Nobody waits longer than this many seconds between two tries, whatever a server asks for.
LONGEST_WAIT = 60.0
TOO_MANY_REQUESTS = 429
# How much of an answer an error shows.
SHOWN = 300


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

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, as far as the asking side knows."""


@dataclass(frozen=True)
class Remote:
    """Scores with a server: `Remote("http://rm:8000", Vllm("my-reward-model", tokenizer))`.

    Connection errors, timeouts, status 429 and 5xx are tried again, after a time that doubles and is shaken, or longer
    if the server asks for it (Retry-After); anything else is an error at once. The token, sent as
    `Authorization: Bearer`, is in no repr and no fingerprint; nor is the address: the dialect's model names the scorer.
    """

    url: str
    """Where requests are posted, as it stands; a bare host gets the dialect's path."""
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

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ValueError(f"Remote needs an url such as http://host:8000, got url={self.url!r}")
        for name in ("batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"Remote needs {name} >= 1, got {name}={getattr(self, name)}")
        if self.retries < 0 or not self.backoff >= 0 or not self.timeout > 0:
            raise ValueError(
                "Remote needs retries >= 0, backoff >= 0 and timeout > 0, "
                f"got retries={self.retries}, backoff={self.backoff} and timeout={self.timeout}"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        items = self.dialect.inputs(prompts, completions) if len(prompts) else []
        scores = np.empty(len(items), np.float32)
        stop = threading.Event()
        with self._client() as client, ThreadPoolExecutor(self.concurrency) as pool:
            ask = Asking(self, client, stop)
            asked = {pool.submit(ask, [items[i] for i in batch]): batch for batch in self._batches(items)}
            try:
                with progress(len(items), self.show_progress) as bar:
                    for answered in as_completed(asked):
                        scores[asked[answered]] = answered.result()
                        bar.update(len(asked[answered]))
            finally:
                # After an error nobody waits for, or asks for, the rest.
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return scores

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, as far as this side knows."""
        return {"kind": "remote", **self.dialect.fingerprint()}

    @property
    def address(self) -> str:
        """Where requests are posted."""
        bare = urlsplit(self.url).path in ("", "/") and not urlsplit(self.url).query
        return self.url.rstrip("/") + self.dialect.path if bare else self.url

    def _client(self) -> httpx.Client:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        return httpx.Client(headers=headers, timeout=self.timeout, limits=limits)

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
    """Asks for the scores of some inputs, as often as it takes; lives as long as a call of Remote."""

    remote: Remote
    client: httpx.Client
    stop: threading.Event
    """Set when the others have given up."""

    def __call__(self, items: list[Any]) -> Float32[np.ndarray, " n"]:
        """The scores, checked."""
        # httpx's own json= writes UTF-8, which a lone surrogate, half an emoji of a cut completion, has none of.
        body = json.dumps(self.remote.dialect.payload(items)).encode()
        response = self._response(body)
        try:
            scores = np.asarray(self.remote.dialect.scores(response.json(), len(items)), np.float32)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"{self.remote.address} gave an answer that has no scores to read, {error!r}: {_shown(response)}"
            ) from error
        if scores.shape != (len(items),) or not np.isfinite(scores).all():
            raise ValueError(
                f"{self.remote.address} gives a finite number for each of {len(items)} inputs, got {_shown(response)}"
            )
        return scores

    def _response(self, body: bytes) -> httpx.Response:
        for tried in range(self.remote.retries + 1):
            cause, wait = None, 0.0
            try:
                response = self.client.post(self.remote.address, content=body)
            except httpx.TransportError as error:
                cause, trouble = error, f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response
                trouble, wait = (
                    f"status {response.status_code}, {_shown(response)}",
                    asked_wait(response.headers.get("Retry-After", "")),
                )
                if response.status_code != TOO_MANY_REQUESTS and not response.is_server_error:
                    raise ValueError(f"{self.remote.address} refuses the request: {trouble}")
            if tried == self.remote.retries or self.stop.wait(max(wait, self._pause(tried))):
                break
        raise ConnectionError(f"{self.remote.address} gave no answer in {tried + 1} tries, {trouble}") from cause

    def _pause(self, tried: int) -> float:
        """Twice as long each time, and shaken, so that many clients do not come back together."""
        return min(LONGEST_WAIT, self.remote.backoff * 2.0**tried) * random.uniform(0.5, 1.0)


def asked_wait(said: str) -> float:
    """How many seconds a server asks to wait by a Retry-After, a number or a date; 0 if it does not ask.

    >>> asked_wait("7"), asked_wait("Wed, 21 Oct 2015 07:28:00 GMT"), asked_wait("")
    (7.0, 0.0, 0.0)
    """
    try:
        seconds = float(said) if said.isdigit() else (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
    return min(LONGEST_WAIT, max(0.0, seconds))


def _shown(response: httpx.Response) -> str:
    return start_of(response.text, SHOWN)
