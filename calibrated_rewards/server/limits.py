"""Read the body of a request within the server's limits, as JSON and nothing that merely looks like it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

MEBIBYTE = 2**20
Receive = Callable[[], Awaitable[Any]]


class Refused(Exception):
    """A request that is answered with an error: its status and message."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """The most that a server accepts, how it batches, and how long it waits.

    >>> Limits(pairs=0)
    Traceback (most recent call last):
    ValueError: Limits needs pairs > 0, got pairs=0
    """

    header: int = 65_536
    """Bytes of a request's first line and headers: 431, or 400 before they have all arrived."""
    headers: int = 100
    """Headers of a request: 431."""
    header_seconds: float = 10.0
    """Seconds for the headers to arrive: 408."""
    newcomers: int = 1024
    """Connections without a request yet: of more the oldest is closed; fewer where few files may be open."""
    body: int = 16 * MEBIBYTE
    """Bytes of a request's body: 413."""
    held: int = 256 * MEBIBYTE
    """Bytes of all bodies that are being read or answered: 503."""
    pairs: int = 1024
    """Items in a list of a request, and so its completions: 413."""
    text: int = 262_144
    """Characters of a text, which may be a prompt and its completion, and of a chat as JSON: 413."""
    depth: int = 32
    """Nested lists and objects: 422."""
    queue: int = 8192
    """Completions that wait for the reward model: 503."""
    batch: int = 64
    """Completions of several requests that the reward model is given at once."""
    wait: float = 0.01
    """Seconds that one completion waits for others to share a batch with."""
    body_seconds: float = 30.0
    """Seconds for a body to arrive: 408."""
    answer_seconds: float = 110.0
    """Seconds for the reward model to answer: 504. Clients give up after 120 (slime) or 180 (OpenRLHF)."""

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits needs {name} > 0, got {name}={getattr(self, name)!r}")


@dataclass(eq=False)
class Bodies:
    """Reads bodies, and counts the bytes of those that are not answered yet."""

    limits: Limits
    held: int = field(default=0, init=False)

    @asynccontextmanager
    async def read(self, headers: Any, receive: Receive) -> AsyncIterator[bytes]:
        """Read the body of a request, whose bytes count until the request is answered."""
        limits = self.limits
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.body:
            raise self._too_large()
        if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise Refused(415, "a body is sent as it is, not compressed: leave Content-Encoding out")
        chunks: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(limits.body_seconds):
                    await self._receive(receive, chunks)
            except TimeoutError:
                raise Refused(408, f"the body took more than {limits.body_seconds:g} seconds to arrive") from None
            yield b"".join(chunks)
        finally:
            self.held -= sum(map(len, chunks))

    async def _receive(self, receive: Receive, chunks: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client hung up before its body had arrived")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > self.limits.body:
                raise self._too_large()
            if self.held + len(chunk) > self.limits.held:
                raise Refused(503, f"{self.held} bytes of other requests are waiting: try again later", 1)
            self.held += len(chunk)
            chunks.append(chunk)

    def _too_large(self) -> Refused:
        return Refused(413, f"a body has at most {self.limits.body} bytes: send fewer completions at a time")


# The standard library's parser, since pydantic's takes NaN, Infinity and two members of one name.
def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """Parse a body to the JSON object in it.

    >>> parse_json(b'{"prompts": [], "completions": []}', Limits())
    {'prompts': [], 'completions': []}
    >>> parse_json(b'{"prompt": NaN}', Limits())
    Traceback (most recent call last):
    calibrated_rewards.server.limits.Refused: the body is no JSON: NaN is no number of JSON
    """
    too_deep = Refused(422, f"the body nests at most {limits.depth} lists and objects, got more")
    try:
        payload = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(payload, dict):
        raise Refused(422, f"the body is a JSON object, got {type(payload).__name__}")
    # Code that walks what nests deeper calls itself too often.
    level: list[Any] = [payload]
    for _ in range(limits.depth):
        children = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in children if isinstance(child, dict | list)]
    if level:
        raise too_deep
    return payload


def _refuse_repeats(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(members)) < len(members):
        raise Refused(400, "the body has an object with two members of one name")
    return dict(members)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
