"""The fields of a request, checked: each error names the field, the rule, and what came."""

from collections.abc import Sequence
from typing import Any

from calibrated_rewards.prompts import canonical_chat, start_of
from calibrated_rewards.serving.limits import Limits, Refused


def texts(payload: dict[str, Any], name: str, limits: Limits) -> list[str]:
    """A list of texts."""
    return [text(each, f"{name}[{at}]", limits) for at, each in enumerate(several(payload, name, limits))]


def chats(payload: dict[str, Any], name: str, limits: Limits) -> list[Any]:
    """A list whose items are texts or lists of messages."""
    return [chat(each, f"{name}[{at}]", limits) for at, each in enumerate(several(payload, name, limits))]


def several(payload: dict[str, Any], name: str, limits: Limits) -> list[Any]:
    """A list, not too long."""
    given = payload.get(name)
    if not isinstance(given, list):
        raise Refused(422, f"{name} is a list, got {_shown(given)}")
    if len(given) > limits.pairs:
        raise Refused(413, f"a request has at most {limits.pairs} completions, got {len(given)} {name}")
    return given


def text(given: Any, name: str, limits: Limits) -> str:
    """A text, not too long, of whole characters."""
    if not isinstance(given, str):
        raise Refused(422, f"{name} is a text, got {_shown(given)}")
    if len(given) > limits.text:
        raise Refused(413, f"{name} has at most {limits.text} characters, got {len(given)}")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise Refused(422, f"{name} has half a character (a lone surrogate) at {error.start}") from None
    return given


def chat(given: Any, name: str, limits: Limits) -> Any:
    """A text, or a list of messages."""
    if isinstance(given, str):
        return text(given, name, limits)
    if not isinstance(given, list) or not given:
        raise Refused(422, f"{name} is a text or a list of messages, got {_shown(given)}")
    for at, message in enumerate(given):
        check_message(message, f"{name}[{at}]")
    try:
        text(canonical_chat(given), name, limits)
    except (TypeError, ValueError) as error:
        raise Refused(422, f"{name}: {error}") from None
    return given


def check_message(message: Any, name: str) -> None:
    """Refuse what no chat template reads."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(422, f"{name} is a message with a role and content, got {_shown(message)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(map(_part, parts)):
        raise Refused(422, f"{name}.content is a text or a list of parts with a type, got {_shown(content)}")
    calls = message.get("tool_calls")
    if not (calls is None or (isinstance(calls, list) and all(isinstance(call, dict) for call in calls))):
        raise Refused(422, f"{name}.tool_calls is a list of objects, got {_shown(calls)}")


def as_many(given: Sequence[Any], name: str, as_: str, count: int) -> None:
    """Refuse lists of different lengths."""
    if len(given) != count:
        raise Refused(422, f"{name} has an item for each of {as_}, got {len(given)} for {count}")


def each_of(payload: dict[str, Any], name: str, as_: str, count: int) -> list[Any]:
    """A list of anything, as long as another one; of nothing where it is not there."""
    if payload.get(name) is None:
        return [None] * count
    given = payload[name]
    if not isinstance(given, list):
        raise Refused(422, f"{name} is a list, got {_shown(given)}")
    as_many(given, name, as_, count)
    return given


def identifier(given: Any) -> str | int | None:
    """An id: a text or a whole number; None for all else.

    >>> [identifier(given) for given in ("p7", 7, "", None, 0.5, True, [7])]
    ['p7', 7, None, None, None, None, None]
    """
    if isinstance(given, str):
        try:
            given.encode()
        except UnicodeEncodeError:
            return None
        return given or None
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def _part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str))


def _shown(given: Any) -> str:
    return "nothing" if given is None else f"{type(given).__name__} {start_of(given)}"
