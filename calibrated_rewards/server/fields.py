"""The types of the fields of requests, each checked against the server's limits, and the errors about them.

>>> from pydantic import TypeAdapter
>>> try:
...     TypeAdapter(Texts).validate_python(["2+2=4", 7], strict=True, context=Limits())
... except ValidationError as error:
...     print(refuse_malformed({"query": ["2+2=4", 7]}, error))
[1] is a text, got int 7
"""

from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from calibrated_rewards.prompts import canonical_chat, start_of
from calibrated_rewards.server.limits import Limits, Refused

# pydantic's errors, as rules that follow the name of the field; those of its other errors are given in its own words.
RULES = {
    "string_type": "is a text",
    "string_unicode": "is a text of whole characters",
    "int_type": "is a whole number",
    "float_type": "is a number",
    "bool_type": "is true or false",
    "list_type": "is a list",
    "dict_type": "is an object",
    "model_type": "is an object",
    "chat_type": "is a text or a list of messages",
}
MESSAGE_RULE = "is a message with a role and content"
# The errors that are raised here, whose texts are rules with the value got.
BROKEN, TOO_LARGE = "broken_rule", "too_large"


def check_text(text: str, info: Any) -> str:
    """Refuse a text that is too long, or has half a character."""
    limits: Limits = info.context
    if len(text) > limits.text:
        raise PydanticCustomError(TOO_LARGE, f"has at most {limits.text} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(BROKEN, f"has half a character (a lone surrogate) at {error.start}") from None
    return text


def check_count(items: Any, info: Any) -> Any:
    """Refuse a list that is too long, before its items are looked at."""
    limits: Limits = info.context
    if isinstance(items, list) and len(items) > limits.pairs:
        raise PydanticCustomError(TOO_LARGE, f"has at most {limits.pairs} items, got {len(items)}")
    return items


def check_message(message: Any) -> Any:
    """Refuse a message that no chat template reads."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise PydanticCustomError(BROKEN, f"{MESSAGE_RULE}, got {show(message)}")
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else []
    are_parts = all(isinstance(p, str) or (isinstance(p, dict) and isinstance(p.get("type"), str)) for p in parts)
    if not isinstance(content, str | list | None) or not are_parts:
        raise PydanticCustomError(
            BROKEN, f"has content that is a text or a list of parts with a type, got {show(content)}"
        )
    if not (calls is None or (isinstance(calls, list) and all(isinstance(call, dict) for call in calls))):
        raise PydanticCustomError(BROKEN, f"has tool_calls that are a list of objects, got {show(calls)}")
    return message


def check_chat(messages: list[Any], info: Any) -> list[Any]:
    """Refuse messages that have no canonical form, or a too long one."""
    try:
        text = canonical_chat(messages)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError(BROKEN, f"is a chat: {error}") from None
    check_text(text, info)
    return messages


def _choose_form(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) and value else None


def show(value: Any) -> str:
    """Write the type and the beginning of a value, for an error."""
    return "nothing" if value is None else f"{type(value).__name__} {start_of(value)}"


Item = TypeVar("Item")
Items: TypeAlias = Annotated[list[Item], BeforeValidator(check_count)]
"""A list with at most as many items as a request may have completions: `Items[Question]` for a model of yours."""
Text: TypeAlias = Annotated[str, AfterValidator(check_text)]
Texts: TypeAlias = Items[Text]
MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    "required": ["role", "content"],
}
# Messages stay the dicts that came: the scorer's chat template may read any of their members.
Message: TypeAlias = Annotated[dict[Any, Any], BeforeValidator(check_message), WithJsonSchema(MESSAGE)]
Messages: TypeAlias = Annotated[list[Message], Field(min_length=1), AfterValidator(check_chat)]
Chat: TypeAlias = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Messages, Tag("messages")],
    Discriminator(_choose_form, custom_error_type="chat_type", custom_error_message=RULES["chat_type"]),
]
Chats: TypeAlias = Items[Chat]
Ids: TypeAlias = Annotated[
    list[Any] | None, Field(description="Each prompt's id, if it is a string or an integer; anything else is none.")
]


def refuse_malformed(payload: dict[str, Any], invalid: ValidationError) -> Refused:
    """Turn the first of pydantic's errors into the answer: the field, its rule and the value got."""
    error = invalid.errors(include_url=False, include_context=False)[0]
    kind, name, value = error["type"], _name_field(payload, error), f", got {show(error['input'])}"
    if kind == "missing":
        message = "is missing from the request"
    elif kind in (BROKEN, TOO_LARGE):
        message = error["msg"]
    else:
        message = f"{RULES.get(kind, 'is malformed: ' + error['msg'])}{value}"
    return Refused(413 if kind == TOO_LARGE else 422, f"{name} {message}")


def _name_field(payload: dict[str, Any], error: Any) -> str:
    """Write the path to a field, such as `query[1]`; pydantic also names the chosen member of a union in it."""
    name = ""
    value: Any = payload
    for part in error["loc"]:
        if isinstance(part, int):
            name, value = f"{name}[{part}]", value[part] if isinstance(value, list) and part < len(value) else None
        elif isinstance(value, dict) and (part in value or (error["type"] == "missing" and part == error["loc"][-1])):
            name, value = f"{name}.{part}" if name else part, value.get(part)
    return name or "the request"
