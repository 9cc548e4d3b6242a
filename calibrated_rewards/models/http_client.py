"""Ask a server over HTTP: retries with backoff, several requests in flight, and no secret in logs or errors.

A failure that may pass is waited for; one that would not is an error at once. `RequestThreads` works through a list of
requests and yields the answers as they come.
"""

import json
import logging
import math
import random
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "a server is asked by httpx, it is not installed: pip install 'calibrated-rewards[http]'"
    ) from error

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from queue import Empty, SimpleQueue

from calibrated_rewards.models.server_address import (
    PORTS,
    Address,
    explain_token,
    origin_of,
    redact_url,
    resolve_url,
    split_url,
)
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import start_of

LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


@dataclass(frozen=True, eq=False)
class Redacting:
    """A filter of the loggers of httpx and httpcore, which redacts the addresses that are asked."""

    places: set[Address] = field(default_factory=set)

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record where it has a secret; it is logged in any case."""
        if isinstance(record.args, tuple):
            record.args = tuple(map(self._redact, record.args))
        redacted = message = record.getMessage()
        for address in tuple(self.places):
            redacted = address.redacted(redacted)
        if redacted != message:
            record.msg, record.args = redacted, ()
        return True

    def _redact(self, value: Any) -> Any:
        """Write an url of httpx as errors show it, if its host is one of ours."""
        if not isinstance(value, httpx.URL):
            return value
        ours = any(split_url(address.url).hostname == value.host for address in tuple(self.places))
        return redact_url(str(value)) if ours else value


_REDACTING = Redacting()


def redact_in_logs(address: Address) -> None:
    """Redact an address in logs from now on."""
    address = Address(resolve_url(address.url), address.token)  # a variable of the environment may change
    if address in _REDACTING.places:
        return
    _REDACTING.places.add(address)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_REDACTING)


# Longest wait in seconds between two tries, whatever a server asks for.
LONGEST_WAIT = 60.0


def retry_delay(backoff: float, tried: int) -> float:
    """Compute the seconds before a retry: twice as many each time, and random, to keep many clients apart."""
    return min(LONGEST_WAIT, backoff * 2.0 ** min(tried, 60)) * random.uniform(0.5, 1.0)


def parse_retry_after(header: str) -> float:
    """Parse the seconds that a server asks to wait by a Retry-After, a number or a date; 0 if it does not ask.

    >>> [parse_retry_after(text) for text in ("7", "Wed, 21 Oct 2015 07:28:00 GMT", "")]
    [7.0, 0.0, 0.0]
    """
    try:
        date = None if header.isdigit() else parsedate_to_datetime(header)
        seconds = float(header) if date is None else (date - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
    return min(LONGEST_WAIT, max(0.0, seconds))


REQUEST_TIMEOUT, TOO_MANY_REQUESTS, NOT_IMPLEMENTED = 408, 429, 501
# Characters of an answer that an error shows.
SHOWN = 300


class Refused(ValueError):
    """A server refuses a request, and would refuse it again: its status is a 4xx, 501, or a redirect."""


@dataclass(frozen=True, eq=False)
class Post:
    """A function that sends a request, again where it may help; its errors have no secrets."""

    place: Address
    """The server, with the secrets to redact."""
    client: httpx.Client
    retries: int
    backoff: float
    """Seconds before the first retry; then twice as many each time."""
    stop: threading.Event
    """Event that is set when nobody waits for an answer any more."""

    def __call__(self, address: str, payload: Any, method: str = "POST") -> httpx.Response:
        """Send a request until its status is one of success; return the answer."""
        # httpx's own json= writes UTF-8, which a lone surrogate, half an emoji of a cut completion, has none of.
        body = None if payload is None else json.dumps(payload).encode()
        for tried in range(self.retries + 1):
            wait = 0.0
            try:
                response = self.client.request(method, address, content=body)
            except httpx.RequestError as error:
                trouble = self.place.redacted(f"{type(error).__name__}: {error}")
                if is_permanent(error):
                    raise ConnectionError(f"{redact_url(address)} cannot be asked, {trouble}") from None
            else:
                if response.is_success:
                    return response
                trouble = f"status {response.status_code}, {self.quote(response)}"
                wait = parse_retry_after(response.headers.get("Retry-After", ""))
                if not is_transient(response.status_code):
                    hint = explain_token(response.status_code, self.place.url, self.place.token)
                    hint = f"{self._redirect_hint(response)}{hint}"
                    raise Refused(f"{redact_url(address)} refuses the request: {trouble}{hint}")
            if tried == self.retries or self.stop.wait(max(wait, retry_delay(self.backoff, tried))):
                break
        raise ConnectionError(f"{redact_url(address)} gave no answer in {tried + 1} tries, {trouble}")

    def quote(self, response: httpx.Response) -> str:
        """Quote the start of an answer, for an error."""
        return start_of(self.place.redacted(response.text), SHOWN)

    def _redirect_hint(self, response: httpx.Response) -> str:
        try:
            target = self.place.redacted(redact_url(response.headers.get("Location", "")))
        except ValueError:
            return ""
        return f"; it points to {target}, give that address if it is right" if target else ""


def open_client(place: Address, timeout: float, connections: int) -> httpx.Client:
    """Open a client for JSON that sends the token as `Authorization: Bearer` and follows no redirect."""
    headers = {"Content-Type": "application/json"}
    if place.token is not None:
        headers["Authorization"] = f"Bearer {place.token}"
    url = httpx.URL(place.posted("/"))
    if (url.scheme, url.host, url.port or PORTS[url.scheme]) != origin_of(place.url):
        raise ValueError(f"{redact_url(place.url)} is read as another server by httpx, {url.host}: write it otherwise")
    redact_in_logs(place)
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.Client(headers=headers, timeout=timeout, limits=limits, verify=_certificates(), follow_redirects=False)


@cache
def _certificates() -> ssl.SSLContext:
    """Read the certificates that httpx trusts, once, for it takes longer than a request."""
    return httpx.create_ssl_context()


def check_numbers(who: str, whole: Mapping[str, tuple[Any, int]], timeout: Any, backoff: Any) -> None:
    """Refuse settings that are no numbers of their kind: `whole` has values with the smallest allowed of each.

    >>> check_numbers("Remote", {"retries": (-1, 0)}, 60.0, 0.5)
    Traceback (most recent call last):
    ValueError: Remote needs a whole number retries >= 0, got retries=-1
    """
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{who} needs a whole number {name} >= {least}, got {name}={value!r}")
    for name, value in (("timeout", timeout), ("backoff", backoff)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (name == "timeout" and value == 0):
            raise ValueError(f"{who} needs timeout > 0 and backoff >= 0, finite, got {name}={value!r}")


def is_transient(status: int) -> bool:
    """Tell if a status may be another one when the request comes again.

    >>> [status for status in (400, 404, 408, 429, 500, 501, 503) if is_transient(status)]
    [408, 429, 500, 503]
    """
    return status in (REQUEST_TIMEOUT, TOO_MANY_REQUESTS) or (status >= 500 and status != NOT_IMPLEMENTED)


def is_permanent(error: httpx.RequestError) -> bool:
    """Tell if a request that failed so would fail again: the certificate, the protocol or an encoding is wrong."""
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.DecodingError):
        return True
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@dataclass(frozen=True, eq=False)
class RequestThreads:
    """Threads that work through the jobs of one call.

    Not a pool of concurrent.futures: that one is waited for, at the latest when Python ends, and a request may take
    minutes. After an error or Ctrl-C nobody waits for these, nor do they ask for more.
    """

    work: Callable[[Any], Any]
    jobs: Sequence[Any]
    size: int
    """The number of threads."""
    stop: threading.Event
    """Event that is set after an error, when whatever waits inside of `work` gives up."""
    close: Callable[[], object]
    """A function to call after the last thread has ended."""

    def results(self) -> Generator[tuple[int, Any], None, None]:
        """Yield the number of each job and its result as they come; the first error ends it."""
        todo: SimpleQueue[int] = SimpleQueue()
        for number in range(len(self.jobs)):
            todo.put(number)
        done: SimpleQueue[Any] = SimpleQueue()
        count = min(self.size, len(self.jobs))
        threads = [threading.Thread(target=self._work, args=(todo, done), daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for _ in self.jobs:
                number, result, error = done.get()
                if error is not None:
                    raise error
                yield number, result
        except BaseException:
            self.stop.set()
            # Whoever still waits for an answer needs what is closed; it is closed after the last of them.
            threading.Thread(target=self._close_after, args=(threads,), daemon=True).start()
            raise
        self._close_after(threads)

    def _work(self, todo: "SimpleQueue[int]", done: "SimpleQueue[Any]") -> None:
        while not self.stop.is_set():
            try:
                number = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((number, self.work(self.jobs[number]), None))
            except BaseException as error:  # noqa: BLE001 (it is raised where the results are waited for)
                done.put((number, None, error))

    def _close_after(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        self.close()


def check_plain(text: Text) -> None:
    """Refuse settings that need a tokenizer, where there is none: only `strip` and `chat` do not."""
    if text != Text(strip=text.strip, chat=text.chat):
        raise ValueError(f"without a tokenizer the server makes tokens its own way, got {text}: give tokenizer=")


def text_fingerprint(text: Text, tokenizer: Any) -> dict[str, Any]:
    """Describe the settings; with a tokenizer, also what it does to text."""
    if tokenizer is None:
        return asdict(text)
    from calibrated_rewards.models.fingerprint import tokenizer_digest

    return {**text.fingerprint(tokenizer), "tokenizer": tokenizer_digest(tokenizer)}


def parse_numbers(answer: Any) -> list[float]:
    """Parse a JSON list of numbers, each alone or in a list of its own; ValueError for what only looks like one.

    >>> parse_numbers([1, [2.5]])
    [1.0, 2.5]
    >>> parse_numbers("12")
    Traceback (most recent call last):
    ValueError: scores are a list of numbers, got '12'
    """
    items: list[Any] = answer if isinstance(answer, list) else [None]
    items = [x[0] if isinstance(x, list) and len(x) == 1 else x for x in items]
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in items):
        raise ValueError(f"scores are a list of numbers, got {start_of(answer)}")
    return [float(x) for x in items]
