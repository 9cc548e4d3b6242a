"""What the OpenAPI schema says of a request and its answer: one endpoint, five bodies, an example of each."""

from typing import Any

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
