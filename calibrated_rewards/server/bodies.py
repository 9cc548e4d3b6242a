"""A request's body: read within its limits, and parsed as JSON and nothing that merely looks like it.

What the OpenAPI schema says of a request and its answer: one endpoint, five bodies, an example of each."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from calibrated_rewards.server.limits import Limits, Refused

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
    calibrated_rewards.server.limits.Refused: the body is no JSON: NaN is no number of JSON
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


TEXTS = {"type": "array", "items": {"type": "string"}}
NUMBERS = {"type": "array", "items": {"type": "number"}}
MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    "required": ["role", "content"],
}
CHAT = {"anyOf": [{"type": "string"}, {"type": "array", "items": MESSAGE, "minItems": 1}]}
CHATS = {"type": "array", "items": CHAT}
ID = {"description": "The prompt's id, if it is a string or an integer; anything else is none."}
LABEL = {"description": "If the reward has an id_column: the prompt's id, or an object with that column."}


def _object(title: str, required: list[str], **properties: Any) -> dict[str, Any]:
    return {"title": title, "type": "object", "properties": properties, "required": required}


BODIES = {
    "native": _object(
        "native", ["prompts", "completions"], prompts=CHATS, completions=CHATS, ids={"type": "array", "items": ID}
    ),
    "openrlhf": _object("OpenRLHF", ["query"], query=TEXTS, prompts=TEXTS, labels={"type": "array", "items": LABEL}),
    "lightrft": _object("LightRFT", ["queries"], queries=TEXTS, prompts=TEXTS),
    "slime": _object("slime", ["prompt", "response"], prompt=CHAT, response={"type": "string"}, label=LABEL),
    "llamafactory": _object("LLaMA-Factory", ["messages"], model={"type": "string"}, messages=TEXTS),
}
EXAMPLES = {
    "native": {"prompts": ["2+2="], "completions": ["4"], "ids": [None]},
    "openrlhf": {"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]},
    "lightrft": {"queries": ["2+2=4"], "prompts": ["2+2="]},
    "slime": {"prompt": "2+2=", "response": "4", "label": ""},
    "llamafactory": {"model": "model", "messages": ["2+2=4"]},
}
LISTS = dict.fromkeys(("raw", "u", "hit"), NUMBERS)
ANSWERS = [
    _object("native", ["reward", "raw", "u", "hit"], reward={"type": "array"}, **LISTS),
    _object(
        "OpenRLHF",
        ["rewards", "scores", "extra_logs"],
        rewards=NUMBERS,
        scores=NUMBERS,
        extra_logs=_object("logs", ["raw", "u", "hit"], **LISTS),
    ),
    _object("LightRFT", ["rewards"], rewards=NUMBERS),
    {"title": "slime", "type": "number"},
    _object("LLaMA-Factory", ["scores"], scores=NUMBERS),
]
ERROR = _object("error", ["error"], error={"type": "string"})
ERRORS = {
    400: "The body is no JSON.",
    401: "The token is missing or wrong.",
    404: "The table does not have a prompt.",
    408: "The body took too long to arrive.",
    413: "The body, a text or the number of completions is above the server's limit.",
    415: "The body is compressed.",
    422: "A field is missing or malformed.",
    500: "The reward model failed on a completion of this request.",
    503: "Too much is waiting, or the server is closing: ask again after Retry-After seconds.",
    504: "The reward model did not answer in time.",
}


def request_body() -> dict[str, Any]:
    """What is posted."""
    examples = {name: {"value": value} for name, value in EXAMPLES.items()}
    content = {"schema": {"anyOf": list(BODIES.values())}, "examples": examples}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def responses() -> dict[int | str, dict[str, Any]]:
    """What is answered."""
    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": "In the dialect of the request.", "content": _json({"anyOf": ANSWERS})}
    }
    return {**answers, **{status: {"description": said, "content": _json(ERROR)} for status, said in ERRORS.items()}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
