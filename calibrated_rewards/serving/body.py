"""A request's body: read within its limits, and parsed as JSON and nothing that merely looks like it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from calibrated_rewards.serving.limits import Limits, Refused

Receive = Callable[[], Awaitable[Any]]


@dataclass(eq=False)
class Bodies:
    """Reads bodies, and counts the bytes of those that are not answered yet."""

    limits: Limits
    held: int = field(default=0, init=False)

    @asynccontextmanager
    async def read(self, headers: Any, receive: Receive) -> AsyncIterator[bytes]:
        """The body of a request, counted until the request is answered."""
        check_headers(headers, self.limits)
        chunks: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    await self._gather(receive, chunks)
            except TimeoutError:
                raise Refused(408, f"the body took more than {self.limits.body_seconds:g} seconds to arrive") from None
            yield b"".join(chunks)
        finally:
            self.held -= sum(map(len, chunks))

    async def _gather(self, receive: Receive, chunks: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client hung up before its body had arrived")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > self.limits.body:
                raise too_large(self.limits)
            if self.held + len(chunk) > self.limits.held:
                raise Refused(503, f"{self.held} bytes of other requests are waiting: try again later", 1)
            self.held += len(chunk)
            chunks.append(chunk)


def check_headers(headers: Any, limits: Limits) -> None:
    """Refuse what the headers already tell: a body that is too large, or compressed."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body:
        raise too_large(limits)
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise Refused(415, "a body is sent as it is, not compressed: leave Content-Encoding out")


def too_large(limits: Limits) -> Refused:
    """The refusal of a body."""
    return Refused(413, f"a body has at most {limits.body} bytes: send fewer completions at a time")


def parsed(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object that a body holds.

    >>> parsed(b'{"prompts": [], "completions": []}', Limits())
    {'prompts': [], 'completions': []}
    >>> parsed(b'{"prompt": NaN}', Limits())
    Traceback (most recent call last):
    calibrated_rewards.serving.limits.Refused: the body is no JSON: NaN is no number of JSON
    """
    try:
        payload = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once_each)
    except RecursionError:
        raise _too_deep(limits) from None
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(payload, dict):
        raise Refused(422, f"the body is a JSON object, got {type(payload).__name__}")
    check_depth(payload, limits)
    return payload


def check_depth(payload: Any, limits: Limits) -> None:
    """Refuse what nests deeper than anything that is asked for: code that walks it calls itself."""
    level = [payload]
    for _ in range(limits.depth):
        level = [
            each
            for item in level
            for each in (item.values() if isinstance(item, dict) else item)
            if isinstance(each, dict | list)
        ]
        if not level:
            return
    raise _too_deep(limits)


def _too_deep(limits: Limits) -> Refused:
    return Refused(422, f"the body nests at most {limits.depth} lists and objects, got more")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two members of one name one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Refused(400, "the body has an object with two members of one name")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
