"""A reward model behind HTTP: several requests in flight, retried with care, scores in the order of the pairs."""

import json
import math
import ssl
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.reading.batches import progress
from calibrated_rewards.scorers.protocol import paired
from calibrated_rewards.scorers.remote_address import Address, shown
from calibrated_rewards.scorers.remote_retry import asked_wait, pause

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "a remote scorer needs httpx, it is not installed: pip install 'calibrated-rewards[http]'"
    ) from error

REQUEST_TIMEOUT, TOO_MANY_REQUESTS = 408, 429
# How much of an answer an error shows.
SHOWN = 300
# A call fails if so many inputs, and all that came before them, had answers that a dialect doubts.
ENOUGH = 4


class Refused(ValueError):
    """A server does not take a request, and would not if it came again: its status is a 4xx, or a redirect."""


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
    `Authorization: Bearer`, is in no repr, error or fingerprint, nor are a password or a query of the url; the address
    is in no fingerprint: the dialect's model names the scorer.
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
        _ = self._place
        for name, least in (("batch_size", 1), ("concurrency", 1), ("retries", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Remote needs a whole number {name} >= {least}, got {name}={value!r}")
        for name in ("timeout", "backoff"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf or (name == "timeout" and value == 0):
                raise ValueError(f"Remote needs timeout > 0 and backoff >= 0, finite, got {name}={value!r}")

    def __repr__(self) -> str:
        usual = {"batch_size": 32, "concurrency": 8, "timeout": 120.0, "retries": 5, "backoff": 0.5}
        changed = "".join(
            f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value
        )
        return f"Remote({shown(self.url)!r}, {self.dialect!r}{changed})"

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
        with progress(len(items), self.show_progress) as bar, closing(Crew(self, items, batches).answers()) as answers:
            for batch, found, doubt in answers:
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
        return shown(self.address)

    def redacted(self, said: str) -> str:
        """A text less the secrets that this side has sent, which servers may quote."""
        return self._place.redacted(said)

    @property
    def _place(self) -> Address:
        return Address(self.url, self.token)

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
class Crew:
    """Threads that ask for batches, and what they are answered as it comes; lives as long as a call of Remote.

    Not a pool of concurrent.futures: that one is waited for, at the latest when Python ends, and a request may take
    minutes. After an error or Ctrl-C nobody waits for these, nor do they ask for more.
    """

    remote: Remote
    items: list[Any]
    batches: list[list[int]]

    def answers(self) -> Generator[tuple[list[int], Float32[np.ndarray, " n"], str], None, None]:
        """Each batch with its scores and what is to be doubted of them; the first trouble ends it."""
        todo: SimpleQueue[list[int]] = SimpleQueue()
        for batch in self.batches:
            todo.put(batch)
        done: SimpleQueue[Any] = SimpleQueue()
        stop, client = threading.Event(), self.remote._client()
        count = min(self.remote.concurrency, len(self.batches))
        options: dict[str, Any] = {"args": (Asking(self.remote, client, stop), todo, done), "daemon": True}
        threads = [threading.Thread(target=self._work, **options) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for _ in self.batches:
                batch, found, trouble = done.get()
                if trouble is not None:
                    raise trouble
                yield batch, *found
        except BaseException:
            stop.set()
            # Whoever still waits for an answer needs the client; it is closed after the last of them.
            threading.Thread(target=_close_after, args=(threads, client), daemon=True).start()
            raise
        _close_after(threads, client)

    def _work(self, ask: "Asking", todo: "SimpleQueue[list[int]]", done: "SimpleQueue[Any]") -> None:
        while not ask.stop.is_set():
            try:
                batch = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((batch, ask([self.items[i] for i in batch]), None))
            except BaseException as trouble:  # noqa: BLE001 (it is raised where the scores are waited for)
                done.put((batch, None, trouble))


def _close_after(threads: list[threading.Thread], client: httpx.Client) -> None:
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    client.close()


@dataclass(frozen=True, eq=False)
class Asking:
    """Asks for the scores of some inputs, as often as it takes."""

    remote: Remote
    client: httpx.Client
    stop: threading.Event
    """Set when the others have given up."""

    def __call__(self, items: list[Any]) -> tuple[Float32[np.ndarray, " n"], str]:
        """The scores, checked, and what is to be doubted of them."""
        # httpx's own json= writes UTF-8, which a lone surrogate, half an emoji of a cut completion, has none of.
        body = json.dumps(self.remote.dialect.payload(items)).encode()
        response = self._response(body)
        try:
            answer = response.json()
            with np.errstate(over="ignore"):
                scores = np.asarray(self.remote.dialect.scores(answer, len(items))).astype(np.float32)
            doubt = self.remote.dialect.doubt(answer)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            why = self.remote.redacted(repr(error))
            raise ValueError(
                f"{self.remote.shown} gave an answer that has no scores to read, {why}: {self._said(response)}"
            ) from None
        if scores.shape != (len(items),) or not np.isfinite(scores).all():
            raise ValueError(
                f"{self.remote.shown} gives a finite number for each of {len(items)} inputs, got {self._said(response)}"
            )
        return scores, doubt

    def _response(self, body: bytes) -> httpx.Response:
        for tried in range(self.remote.retries + 1):
            wait = 0.0
            try:
                response = self.client.post(self.remote.address, content=body)
            except httpx.RequestError as error:
                trouble = self.remote.redacted(f"{type(error).__name__}: {error}")
                if final(error):
                    raise ConnectionError(f"{self.remote.shown} cannot be asked, {trouble}") from None
            else:
                if response.is_success:
                    return response
                trouble = f"status {response.status_code}, {self._said(response)}"
                wait = asked_wait(response.headers.get("Retry-After", ""))
                if response.status_code not in (REQUEST_TIMEOUT, TOO_MANY_REQUESTS) and not response.is_server_error:
                    raise Refused(f"{self.remote.shown} refuses the request: {trouble}{self._elsewhere(response)}")
            if tried == self.remote.retries or self.stop.wait(max(wait, pause(self.remote.backoff, tried))):
                break
        raise ConnectionError(f"{self.remote.shown} gave no answer in {tried + 1} tries, {trouble}")

    def _said(self, response: httpx.Response) -> str:
        return start_of(self.remote.redacted(response.text), SHOWN)

    def _elsewhere(self, response: httpx.Response) -> str:
        place = self.remote.redacted(shown(response.headers.get("Location", "")))
        return f"; it points to {place}, give that address if it is right" if place else ""


def final(error: httpx.RequestError) -> bool:
    """Whether a request that failed so would fail again: the certificate, the protocol or an encoding is wrong."""
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.DecodingError):
        return True
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
