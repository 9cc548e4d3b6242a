"""ASGI middleware: token authentication, tokens kept out of access logs, connections closed at shutdown."""

import hmac
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, urlencode

from calibrated_rewards.files import Message, setting
from calibrated_rewards.server.limits import Limits

Scope = MutableMapping[str, Any]
Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
PREFIX = "/t/"
# Statuses after which the connection is closed: of clients without a token, or with too large headers.
CLOSING = (401, 431)


@dataclass(eq=False)
class Shutdown:
    """The state of a server that stops: it answers requests on open connections, and then closes them."""

    begun: bool = field(default=False, init=False)


@dataclass(frozen=True, eq=False)
class AccessControl:
    """The middleware: without the token 401, and nothing else; no log sees the token in a path or query.

    A request that is answered before its body has arrived costs its connection: the rest is not read.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    token: str | None
    shutdown: Shutdown
    limits: Limits
    record: Callable[[str, int, float], None]
    """Called for each answered request with its dialect, "none" before it is known, its status and its seconds."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it before the application sees it."""
        if scope["type"] != "http":
            # Websockets are refused unheard; the lifespan is the application's.
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else send({"type": "websocket.close"}))
            return
        tokens = remove_tokens(scope)
        start, status = time.perf_counter(), 500
        unread = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b" 0"))
            for name, value in scope["headers"]
        )

        async def note_body() -> Any:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.shutdown.begun or unread or status in CLOSING:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        try:
            if (error := find_excess(scope, self.limits)) is not None:
                await respond(note_status, 431, {"error": error})
            elif self.token is None or any(is_same_token(each, self.token) for each in tokens):
                await self.app(scope, note_body, note_status)
            else:  # whatever was asked for, the same answer
                error = "this server wants its token"
                await respond(note_status, 401, {"error": error}, (b"www-authenticate", b"Bearer"))
        finally:
            self.record(scope.get("dialect", "none"), status, time.perf_counter() - start)


def find_excess(scope: Scope, limits: Limits) -> str | None:
    """Say how headers exceed their limits; they have all arrived, and are not looked into."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope["query_string"]) + len(scope["path"])
    if size > limits.header:
        return f"the headers of a request have at most {limits.header} bytes, got {size}"
    if len(headers) > limits.headers:
        return f"a request has at most {limits.headers} headers, got {len(headers)}"
    return None


def remove_tokens(scope: Scope) -> list[str]:
    """Collect the tokens in a request's headers, query and path, and remove them from query and path.

    The scope is changed in place: the server that called us writes it into its access log.
    """
    tokens = []
    for name, value in scope["headers"]:
        kind, _, rest = value.decode("latin-1").partition(" ")
        if name == b"authorization" and kind.lower() == "bearer":
            tokens.append(rest.strip())
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    tokens += [value for name, value in query if name == "token"]
    scope["query_string"] = urlencode([item for item in query if item[0] != "token"]).encode("latin-1")
    if scope["path"].startswith(PREFIX):
        token, _, rest = scope["path"].removeprefix(PREFIX).partition("/")
        tokens.append(token)
        scope["path"] = f"/{rest}"
        scope["raw_path"] = scope["path"].encode("utf-8", "surrogatepass")
    return tokens


def is_same_token(candidate: str, token: str) -> bool:
    """Compare two tokens in a time that does not depend on where they differ."""
    digests = (blake2b(text.encode("utf-8", "surrogatepass")).digest() for text in (candidate, token))
    return hmac.compare_digest(*digests)


def check_token(token: str | None) -> None:
    """Refuse a token that clients could not send: it stands in paths, queries and headers."""
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{8,}", token):
        raise ValueError(f"a token has 8 or more of letters, digits, and - . _ ~, got {len(token)} characters")


def check_address(host: str, token: str | None, insecure: bool) -> None:
    """Refuse an address that others can reach, unless they need a token.

    >>> check_address("0.0.0.0", None, insecure=False)
    Traceback (most recent call last):
    ValueError: others can reach 0.0.0.0: serve needs a token there, got none; to serve all who come, insecure=True
    """
    if token is None and not insecure and not is_loopback(host):
        raise ValueError(
            Message(
                f"others can reach {host}: serve needs a token there, got none; to serve all who come, "
                f"{setting('insecure', 'True')}"
            )
        )


def is_loopback(host: str) -> bool:
    """Return True for an address of this machine only; a name that is not localhost may be anything.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.2", "gpu7", "")]
    [True, True, True, False, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def respond(send: Send, status: int, content: Any, *headers: tuple[bytes, bytes]) -> None:
    """Send an answer as JSON, headers and body."""
    body = json.dumps(content).encode()
    basic = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*basic, *headers]})
    await send({"type": "http.response.body", "body": body})
