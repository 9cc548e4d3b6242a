"""The door of a reward server: who may come in, what is said of the door in logs, and how it is closed."""

import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, urlencode

from calibrated_rewards.server.limits import Limits
from calibrated_rewards.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
PREFIX = "/t/"
# Whoever has no token, or sends such headers, has no connection to keep.
CLOSING = (401, 431)


@dataclass(eq=False)
class Door:
    """Open, or closing: requests that come over connections that are there are answered, and the connections closed."""

    closing: bool = field(default=False, init=False)


@dataclass(frozen=True, eq=False)
class Gate:
    """ASGI middleware: without the token 401, and nothing else; no log sees the token in a path or query.

    A request that is answered before its body has arrived costs its connection: the rest is not read.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    token: str | None
    door: Door
    metrics: Metrics
    limits: Limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            # Websockets are refused unheard; the lifespan is the application's.
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else send({"type": "websocket.close"}))
            return
        given = taken_out(scope)
        began, status, unread = time.perf_counter(), 500, has_body(scope)

        async def hearing() -> Any:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.door.closing or unread or status in CLOSING:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        try:
            if (trouble := oversized(scope, self.limits)) is not None:
                await respond(noting, 431, {"error": trouble}, [(b"content-type", b"application/json")])
            elif self.token is None or any(same(each, self.token) for each in given):
                await self.app(scope, hearing, noting)
            else:
                await unauthorised(noting)
        finally:
            dialect = scope.get("dialect", "none")
            self.metrics.requests.labels(dialect, str(status)).inc()
            if dialect != "none":
                self.metrics.latency.observe(time.perf_counter() - began)


def has_body(scope: Scope) -> bool:
    """Whether a request announces a body."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b" 0"))
        for name, value in scope["headers"]
    )


def oversized(scope: Scope, limits: Limits) -> str | None:
    """What is wrong with headers that are too many or too large; they have all arrived, and are not looked into."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope["query_string"]) + len(scope["path"])
    if size > limits.header:
        return f"the headers of a request have at most {limits.header} bytes, got {size}"
    if len(headers) > limits.headers:
        return f"a request has at most {limits.headers} headers, got {len(headers)}"
    return None


def taken_out(scope: Scope) -> list[str]:
    """The tokens that a request shows in its headers, its query or its path; they are no more in its query and path.

    The scope is changed where it is: the server that called us writes it into its access log.
    """
    given = []
    for name, value in scope["headers"]:
        kind, _, said = value.decode("latin-1").partition(" ")
        if name == b"authorization" and kind.lower() == "bearer":
            given.append(said.strip())
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given += [value for name, value in query if name == "token"]
    scope["query_string"] = urlencode([item for item in query if item[0] != "token"]).encode("latin-1")
    if scope["path"].startswith(PREFIX):
        token, _, rest = scope["path"].removeprefix(PREFIX).partition("/")
        given.append(token)
        scope["path"] = f"/{rest}"
        scope["raw_path"] = scope["path"].encode("utf-8", "surrogatepass")
    return given


def same(given: str, token: str) -> bool:
    """Whether a token is the one, in a time that tells nothing of it."""
    return hmac.compare_digest(_digest(given), _digest(token))


def check_token(token: str | None) -> None:
    """Refuse a token that clients could not send: it stands in paths, queries and headers."""
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{8,}", token):
        raise ValueError(f"a token has 8 or more of letters, digits, and - . _ ~, got {len(token)} characters")


async def unauthorised(send: Send) -> None:
    """The answer to whoever has no token: whatever was asked for, the same."""
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await respond(send, 401, {"error": "this server wants its token"}, headers)


async def respond(send: Send, status: int, content: Any, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole answer."""
    body = json.dumps(content).encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass")).digest()
