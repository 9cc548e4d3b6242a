"""The dialects of the frameworks' clients: what each sends, as a pydantic model, and what it reads of the answer.

One endpoint takes all of them, and tells them apart by a field that only one has.

>>> parse_request({"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]}, Limits()).name
'openrlhf'
>>> parse_request({"query": ["2+2=4", 7]}, Limits())
Traceback (most recent call last):
calibrated_rewards.server.limits.Refused: query[1] is a text, got int 7
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias, runtime_checkable
from uuid import uuid4

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from calibrated_rewards.prompts import canonical_chat, start_of
from calibrated_rewards.reward import frameworks
from calibrated_rewards.reward.lookup import Score
from calibrated_rewards.server.limits import Limits, Refused

# The errors of pydantic's own that can occur, as rules of a field; all others are worded below.
RULES = {
    "string_type": "is a text",
    "string_unicode": "is a text of whole characters",
    "list_type": "is a list",
    "dict_type": "is a message with a role and content",
    "missing": "is missing from the request",
}
TOO_LARGE = "too_large"


def check_text(text: str, info: Any) -> str:
    """Refuse a text that is too long, or has half a character."""
    limits: Limits = info.context
    if len(text) > limits.text:
        raise PydanticCustomError(TOO_LARGE, f"has at most {limits.text} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", f"has half a character (a lone surrogate) at {error.start}") from None
    return text


def check_count(items: Any, info: Any) -> Any:
    """Refuse a list that is too long, before its items are looked at."""
    limits: Limits = info.context
    if isinstance(items, list) and len(items) > limits.pairs:
        raise PydanticCustomError(TOO_LARGE, f"has at most {limits.pairs} completions, got {len(items)}")
    return items


def check_message(message: dict[Any, Any]) -> dict[Any, Any]:
    """Refuse a message that no chat template reads."""
    if not isinstance(message.get("role"), str):
        raise PydanticCustomError("message", f"{RULES['dict_type']}, got {_show(message)}")
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else []
    are_parts = all(isinstance(p, str) or (isinstance(p, dict) and isinstance(p.get("type"), str)) for p in parts)
    if not isinstance(content, str | list | None) or not are_parts:
        raise PydanticCustomError(
            "message", f"has content that is a text or a list of parts with a type, got {_show(content)}"
        )
    if not (calls is None or (isinstance(calls, list) and all(isinstance(call, dict) for call in calls))):
        raise PydanticCustomError("message", f"has tool_calls that are a list of objects, got {_show(calls)}")
    return message


def check_chat(messages: list[Any], info: Any) -> list[Any]:
    """Refuse messages that have no canonical form, or a too long one."""
    try:
        text = canonical_chat(messages)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError("chat", f"is a chat: {error}") from None
    check_text(text, info)
    return messages


def check_same_length(request: Any) -> Any:
    """Refuse a request with a list that is not as long as that of its dialect's own field."""
    count = len(getattr(request, request.field))
    for name in ("prompts", "ids", "labels"):
        items = getattr(request, name, None)
        if items is not None and len(items) != count:
            message = f"{name} has an item for each of {request.field}, got {len(items)} for {count}"
            raise PydanticCustomError("length", message)
    return request


def _choose_form(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) and value else None


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {start_of(value)}"


Text: TypeAlias = Annotated[str, AfterValidator(check_text)]
Texts: TypeAlias = Annotated[list[Text], BeforeValidator(check_count)]
MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    "required": ["role", "content"],
}
# Messages stay the dicts that came: the scorer's chat template may read any of their members.
Message: TypeAlias = Annotated[dict[Any, Any], AfterValidator(check_message), WithJsonSchema(MESSAGE)]
Messages: TypeAlias = Annotated[list[Message], Field(min_length=1), AfterValidator(check_chat)]
Chat: TypeAlias = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Messages, Tag("messages")],
    Discriminator(_choose_form, custom_error_type="chat", custom_error_message="is a text or a list of messages"),
]
Chats: TypeAlias = Annotated[list[Chat], BeforeValidator(check_count)]
Ids: TypeAlias = Annotated[
    list[Any] | None, Field(description="Each prompt's id, if it is a string or an integer; anything else is none.")
]
LABEL = "If the reward has an id_column: the prompt's id, or an object with that column."


@dataclass(frozen=True)
class Pair:
    """A completion to score, with its prompt; a prompt of None stands for a text that both are glued into."""

    prompt: Any
    completion: Any
    id: str | int | None = None


@runtime_checkable
class Dialect(Protocol):
    """The request of one kind of client."""

    name: ClassVar[str]
    """Its label in the metrics."""
    field: ClassVar[str]
    """The field that only this dialect has."""

    def pairs(self, id_column: str | None) -> list[Pair]:
        """List the completions to score, for a reward with this `id_column`."""

    def answer(self, scores: Sequence[Score]) -> Any:
        """Build the answer, as JSON."""


class Native(BaseModel):
    """This library's own dialect, which answers all that is known of each pair."""

    model_config = ConfigDict(strict=True, title="native")
    name: ClassVar[str] = "native"
    field: ClassVar[str] = "completions"
    prompts: Chats
    completions: Chats
    ids: Ids = None

    check_lengths = model_validator(mode="after")(check_same_length)

    def pairs(self, id_column: str | None) -> list[Pair]:
        """List pairs, and ids if there are any, which are ids whatever the reward's `id_column`."""
        ids = [None] * len(self.prompts) if self.ids is None else map(as_id, self.ids)
        return [Pair(*each) for each in zip(self.prompts, self.completions, ids, strict=True)]

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give four lists; a reward is null where the prompt is unknown and the server skips those."""
        return {"reward": [score.reward for score in scores], **collect_details(scores)}


class OpenRlhf(BaseModel):
    """OpenRLHF's `--reward.remote_url`: the quantile is its `scores`, by which it filters groups."""

    model_config = ConfigDict(strict=True, title="OpenRLHF")
    name: ClassVar[str] = "openrlhf"
    field: ClassVar[str] = "query"
    query: Texts
    prompts: Texts | None = None
    labels: Annotated[list[Any] | None, Field(description=LABEL)] = None

    check_lengths = model_validator(mode="after")(check_same_length)

    def pairs(self, id_column: str | None) -> list[Pair]:
        """Split texts after their prompts; where there are no prompts, they start with the longest known one."""
        return split_queries("query", self.query, self.prompts, self.labels, id_column)

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give rewards, scores, and lists for its log."""
        logs = collect_details(scores)
        return {"rewards": collect_numbers(scores), "scores": logs["u"], "extra_logs": logs}


class LightRft(BaseModel):
    """LightRFT's `--remote_rm_url`, which sends no labels."""

    model_config = ConfigDict(strict=True, title="LightRFT")
    name: ClassVar[str] = "lightrft"
    field: ClassVar[str] = "queries"
    queries: Texts
    prompts: Texts | None = None
    labels: Annotated[list[Any] | None, Field(description=LABEL)] = None

    check_lengths = model_validator(mode="after")(check_same_length)

    def pairs(self, id_column: str | None) -> list[Pair]:
        """Split texts after their prompts, which may come after padding."""
        return split_queries("queries", self.queries, self.prompts, self.labels, id_column)

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give rewards."""
        return {"rewards": collect_numbers(scores)}


class Slime(BaseModel):
    """slime's `--rm-type remote_rm`: one sample a request, one number an answer."""

    model_config = ConfigDict(strict=True, title="slime")
    name: ClassVar[str] = "slime"
    field: ClassVar[str] = "response"
    prompt: Chat
    response: Text
    label: Annotated[Any, Field(description=LABEL)] = None

    def pairs(self, id_column: str | None) -> list[Pair]:
        """Give the one pair."""
        return [Pair(self.prompt, self.response, as_id(frameworks.identifier(self.label, id_column)))]

    def answer(self, scores: Sequence[Score]) -> float:
        """Give a bare number."""
        return collect_numbers(scores)[0]


class LlamaFactory(BaseModel):
    """LLaMA-Factory's `reward_model_type: api`: its messages are texts, prompt and response glued."""

    model_config = ConfigDict(strict=True, title="LLaMA-Factory")
    name: ClassVar[str] = "llamafactory"
    field: ClassVar[str] = "messages"
    model: Annotated[Any, WithJsonSchema({"type": "string"})] = "model"
    messages: Texts

    def pairs(self, id_column: str | None) -> list[Pair]:
        """List texts without a prompt."""
        return [Pair(None, each) for each in self.messages]

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give scores, in the frame that its own server puts around them."""
        return {
            "id": f"scoreval-{uuid4().hex}",
            "object": "score.evaluation",
            "model": self.model if isinstance(self.model, str) else "model",
            "scores": collect_numbers(scores),
        }


DIALECTS: tuple[type[BaseModel], ...] = (Native, OpenRlhf, LightRft, Slime, LlamaFactory)


def parse_request(payload: dict[str, Any], limits: Limits) -> Dialect:
    """Read a request as the dialect whose field it has; `Refused` with field, rule and value if it is malformed."""
    models: list[Any] = [model for model in DIALECTS if model.field in payload]  # type: ignore[attr-defined]
    if len(models) != 1:
        names = " or ".join(model.field for model in DIALECTS)  # type: ignore[attr-defined]
        raise Refused(422, f"a request has one of {names}, got the fields {start_of(sorted(payload), 200)}")
    try:
        request: Dialect = models[0].model_validate(payload, context=limits)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_context=False)[0]
    else:
        return request
    first, *rest = error["loc"] or ("",)
    name = "".join([str(first), *(f"[{part}]" for part in rest if isinstance(part, int))])
    rule = RULES.get(error["type"])
    value = "" if error["type"] == "missing" else f", got {_show(error['input'])}"
    message = error["msg"] if rule is None else f"{rule}{value}"
    if error["msg"] == "is a text or a list of messages":
        message += value
    raise Refused(413 if error["type"] == TOO_LARGE else 422, f"{name} {message}".strip())


def split_queries(
    name: str, queries: list[str], prompts: list[str] | None, labels: list[Any] | None, id_column: str | None
) -> list[Pair]:
    """Split texts after the prompts in them, as the adapters do, with ids from labels; all in one without prompts."""
    if prompts is None:
        return [Pair(None, query) for query in queries]
    pairs = []
    for at, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        try:
            completion = frameworks.completion_of(query, prompt)
        except ValueError as error:
            raise Refused(422, f"{name}[{at}]: {error}") from None
        label = None if labels is None else labels[at]
        pairs.append(Pair(prompt, completion, as_id(frameworks.identifier(label, id_column))))
    return pairs


def as_id(value: Any) -> str | int | None:
    """Take a text or a whole number for an id; None for all else.

    >>> [as_id(value) for value in ("p7", 7, "", None, 0.5, True, [7])]
    ['p7', 7, None, None, None, None, None]
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None
        return value or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def collect_details(scores: Sequence[Score]) -> dict[str, list[float]]:
    """List raw scores, quantiles and hits, under the same names always."""
    return {
        "raw": [score.raw for score in scores],
        "u": [score.u for score in scores],
        "hit": [int(score.known) for score in scores],
    }


def collect_numbers(scores: Sequence[Score]) -> list[float]:
    """List the rewards, for clients that cannot read null."""
    rewards = [score.reward for score in scores if score.reward is not None]
    if len(rewards) < len(scores):
        unknown = len(scores) - len(rewards)
        raise Refused(404, f"the table has no references for {unknown} of {len(scores)} prompts, and they are skipped")
    return rewards


EXAMPLES = {
    "native": {"prompts": ["2+2="], "completions": ["4"], "ids": [None]},
    "openrlhf": {"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]},
    "lightrft": {"queries": ["2+2=4"], "prompts": ["2+2="]},
    "slime": {"prompt": "2+2=", "response": "4", "label": ""},
    "llamafactory": {"model": "model", "messages": ["2+2=4"]},
}


def _list_schema(title: str, *names: str, **properties: Any) -> dict[str, Any]:
    numbers = {name: {"type": "array", "items": {"type": "number"}} for name in names}
    return {
        "title": title,
        "type": "object",
        "properties": {**numbers, **properties},
        "required": [*numbers, *properties],
    }


ANSWERS = [
    _list_schema("native", "raw", "u", "hit", reward={"type": "array"}),
    _list_schema("OpenRLHF", "rewards", "scores", extra_logs=_list_schema("logs", "raw", "u", "hit")),
    _list_schema("LightRFT", "rewards"),
    {"title": "slime", "type": "number"},
    _list_schema("LLaMA-Factory", "scores"),
]
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


def request_schema() -> dict[str, Any]:
    """Describe the request for OpenAPI: any of the dialects, an example of each."""
    schema = {"anyOf": [model.model_json_schema() for model in DIALECTS]}
    examples = {name: {"value": value} for name, value in EXAMPLES.items()}
    content = {"application/json": {"schema": schema, "examples": examples}}
    return {"requestBody": {"required": True, "content": content}}


def response_schemas() -> dict[int | str, dict[str, Any]]:
    """Describe the answers for OpenAPI, by status."""
    error = _list_schema("error", error={"type": "string"})
    schemas = {200: ("In the dialect of the request.", {"anyOf": ANSWERS})}
    schemas |= {status: (description, error) for status, description in ERRORS.items()}
    return {
        status: {"description": description, "content": {"application/json": {"schema": schema}}}
        for status, (description, schema) in schemas.items()
    }
