"""One request to a server, tried again with care: what may pass is waited for, what would not is an error at once."""

import json
import math
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.remote_address import PORTS, Address, origin, shown
from calibrated_rewards.scorers.remote_retry import asked_wait, pause
from calibrated_rewards.scorers.remote_token import unsent

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "a server is asked by httpx, it is not installed: pip install 'calibrated-rewards[http]'"
    ) from error

from calibrated_rewards.scorers.request_logs import hide

REQUEST_TIMEOUT, TOO_MANY_REQUESTS, NOT_IMPLEMENTED = 408, 429, 501
# How much of an answer an error shows.
SHOWN = 300


class Refused(ValueError):
    """A server does not take a request, and would not if it came again: its status is a 4xx, 501, or a redirect."""


@dataclass(frozen=True, eq=False)
class Post:
    """Asks a server, as often as it takes; its errors have no secrets."""

    place: Address
    """Where, and what is secret in that."""
    client: httpx.Client
    retries: int
    backoff: float
    """Seconds before the first retry; then twice as many each time."""
    stop: threading.Event
    """Set when nobody waits for an answer any more."""

    def __call__(self, address: str, payload: Any, method: str = "POST") -> httpx.Response:
        """The answer, if its status is one of success."""
        # httpx's own json= writes UTF-8, which a lone surrogate, half an emoji of a cut completion, has none of.
        body = None if payload is None else json.dumps(payload).encode()
        for tried in range(self.retries + 1):
            wait = 0.0
            try:
                response = self.client.request(method, address, content=body)
            except httpx.RequestError as error:
                trouble = self.place.redacted(f"{type(error).__name__}: {error}")
                if final(error):
                    raise ConnectionError(f"{shown(address)} cannot be asked, {trouble}") from None
            else:
                if response.is_success:
                    return response
                trouble = f"status {response.status_code}, {self.said(response)}"
                wait = asked_wait(response.headers.get("Retry-After", ""))
                if not may_pass(response.status_code):
                    told = self._elsewhere(response) + unsent(response.status_code, self.place.url, self.place.token)
                    raise Refused(f"{shown(address)} refuses the request: {trouble}{told}")
            if tried == self.retries or self.stop.wait(max(wait, pause(self.backoff, tried))):
                break
        raise ConnectionError(f"{shown(address)} gave no answer in {tried + 1} tries, {trouble}")

    def said(self, response: httpx.Response) -> str:
        """The start of an answer, for an error."""
        return start_of(self.place.redacted(response.text), SHOWN)

    def _elsewhere(self, response: httpx.Response) -> str:
        try:
            place = self.place.redacted(shown(response.headers.get("Location", "")))
        except ValueError:
            return ""
        return f"; it points to {place}, give that address if it is right" if place else ""


def client(place: Address, timeout: float, connections: int) -> httpx.Client:
    """A client for JSON that sends the token as `Authorization: Bearer`, follows no redirect and logs no secret."""
    headers = {"Content-Type": "application/json"}
    if place.token is not None:
        headers["Authorization"] = f"Bearer {place.token}"
    asked, meant = httpx.URL(place.posted("/")), origin(place.url)
    if (asked.scheme, asked.host, asked.port or PORTS[asked.scheme]) != meant:
        raise ValueError(f"{shown(place.url)} is read as another server by httpx, {asked.host}: write it otherwise")
    hide(place)
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.Client(headers=headers, timeout=timeout, limits=limits, verify=_certificates(), follow_redirects=False)


@cache
def _certificates() -> ssl.SSLContext:
    """Those that httpx trusts: read once, which takes longer than a request."""
    return httpx.create_ssl_context()


def check_numbers(who: str, whole: Mapping[str, tuple[Any, int]], timeout: Any, backoff: Any) -> None:
    """Refuse settings that are no numbers of their kind: `whole` has values and the least of each.

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


def may_pass(status: int) -> bool:
    """Whether a status may be another one when the request comes again.

    >>> [status for status in (400, 404, 408, 429, 500, 501, 503) if may_pass(status)]
    [408, 429, 500, 503]
    """
    return status in (REQUEST_TIMEOUT, TOO_MANY_REQUESTS) or (status >= 500 and status != NOT_IMPLEMENTED)


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
