"""Prompts from anywhere, as a trainer would see them: what reaches its reward function is what has the key."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from calibrated_rewards.calibration.records import Row, rows
from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import KEY_BYTES, Prompt, canonical_chat, start_of

ID_COLUMN = "prompt_id"
_IMAGES = ("image", "images")


class Asked(NamedTuple):
    """A prompt, and the id by which the trainer's data know it, if they do."""

    prompt: Prompt
    id: Any = None


def prompts_from(
    source: Any,
    *,
    column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Iterator[Asked]:
    """The prompts of a source, the first `limit` of them, one at a time; what is no prompt is an error with its place.

    A source is what `rows` takes. It holds texts, lists of messages, `Asked`s, or rows, whose prompt is by default
    what TRL would make of them: of `chosen` and `rejected` messages without a prompt of that kind, the turns that both
    begin with; else the column `prompt`; else `messages` up to the assistant's last. The id is that of `id_column`,
    or of `prompt_id` where there is such a column. A prompt that comes twice is given twice.

    >>> [*prompts_from([{"question": "2+2=", "n": 7}], column="question", id_column="n")]
    [Asked(prompt='2+2=', id=7)]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"prompts_from needs limit >= 1, got limit={limit}")
    return islice((asked_of(row, column, id_column) for row in rows(source, split)), limit)


def asked_of(row: Row, column: str | None = None, id_column: str | None = None) -> Asked:
    """The prompt of a row, and its id.

    >>> asked_of(Row("row 0", {"prompt": "Hi", "prompt_id": "a"}))
    Asked(prompt='Hi', id='a')
    """
    place, value = row
    if isinstance(value, Mapping):
        for name in _IMAGES:
            if is_given(value.get(name)):
                raise TypeError(f"{place}: prompts are kept as JSON, which has no pictures, got column {name!r}")
        return Asked(as_prompt(_prompt_in(value, column, place), place), _id_in(value, id_column, place))
    if column is not None or id_column is not None:
        raise TypeError(f"{place} has no column {column or id_column!r}, it is {start_of(value)}")
    if isinstance(value, Asked):
        return Asked(as_prompt(value.prompt, place), _as_id(value.id, place))
    return Asked(as_prompt(value, place))


def as_prompt(value: Any, place: str) -> Prompt:
    """A text or messages as they will be kept, if they say something; else an error that names the place."""
    listed = isinstance(value, list | tuple | np.ndarray)
    if not isinstance(value, str) and (not listed or (len(value) and isinstance(value[0], str | list | tuple))):
        hint = " (a row is one prompt; one that has an id is Asked(prompt, id))" if listed else ""
        raise TypeError(f"{place}: a prompt is a text or a list of messages, got {start_of(value)}{hint}")
    prompt: str | list[dict[str, Any]] = as_messages(value, place) if listed else kept(value, place)
    if not (prompt.strip() if isinstance(prompt, str) else any(map(_says, prompt))):
        raise ValueError(f"{place}: a prompt says something, got {start_of(value)}")
    return prompt


def as_messages(value: Any, place: str) -> list[dict[str, Any]]:
    """Messages as JSON keeps them; else an error that names the place."""
    if not len(value):
        return []
    if isinstance(value[0], Mapping) and "role" not in value[0] and "from" in value[0]:
        raise ValueError(f"{place}: messages have role and content, got from and value (trl.maybe_convert_to_chatml)")
    try:
        canonical = canonical_chat(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None
    mappings = all(isinstance(message, Mapping) for message in value)
    return [kept(message, place) for message in (value if mappings else json.loads(canonical))]


def kept(value: Any, place: str) -> Any:
    """A value as JSON keeps it: members that are None, which Arrow adds, are gone, and arrays are lists.

    >>> kept({"role": "user", "content": "Hi", "name": None}, "row 0")
    {'role': 'user', 'content': 'Hi'}
    """
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{place}: a text has whole characters, got half of one in {start_of(value)}")
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {kept(name, place): kept(member, place) for name, member in value.items() if member is not None}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return [kept(member, place) for member in value]
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None or isinstance(plain, bool | int | float):
        return plain
    raise TypeError(f"{place}: rollouts are kept as JSON, which has no {type(value).__name__}: {start_of(value)}")


def member(row: Mapping[str, Any], column: str, place: str) -> Any:
    """What a row has in a column; if there is none, an error that says which there are."""
    if column not in row:
        raise ValueError(f"{place} has no column {column!r}, it has {_columns(row)}")
    return row[column]


def is_given(value: Any) -> bool:
    """Whether a row has something there, rather than what stands for nothing.

    >>> [is_given(value) for value in (None, [], float("nan"), 0)]
    [False, False, False, True]
    """
    missing = value is None or (isinstance(value, float) and value != value)
    return not missing and not (isinstance(value, list | tuple | np.ndarray) and not len(value))


def _prompt_in(row: Mapping[str, Any], column: str | None, place: str) -> Any:
    if column is not None:
        value = member(row, column, place)
        return _until_answer(value) if column == "messages" else _loaded(row, value)
    if "chosen" in row and "rejected" in row:
        return _preferred(row, place)
    if "prompt" in row:
        return _loaded(row, row["prompt"])
    if "messages" in row:
        return _until_answer(row["messages"])
    hint = "; a list of messages is one row" if "role" in row and "content" in row else ""
    raise ValueError(
        Message(
            f"{place} has no column prompt, chosen and rejected, or messages, it has {_columns(row)}: "
            f"name the prompt's with {setting('column')}{hint}"
        )
    )


def _preferred(row: Mapping[str, Any], place: str) -> Any:
    """The prompt of a pair of which one is preferred, as `trl.maybe_extract_prompt` gives it.

    Only where that would cut texts where their letters differ, in the middle of a word, it is refused.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row and _is_chat(row["prompt"]) == _is_chat(chosen):
        return row["prompt"]
    if not _is_chat(chosen) or not _is_chat(rejected):
        raise ValueError(
            Message(
                f"{place} has no prompt of the kind of its answers, and where texts stop to be prompt cannot be told: "
                f"chosen and rejected are messages, or the prompt's column is named with {setting('column')}, got "
                f"{start_of(chosen)}"
            )
        )
    one, other = (as_messages(messages, place) for messages in (chosen, rejected))
    shortest = min(len(one), len(other))
    shared = next((i for i in range(shortest) if one[i] != other[i]), shortest - 1)
    if not shared:
        raise ValueError(
            f"{place}: chosen and rejected begin with the same turns, got {start_of(one[:1])} in one of them"
        )
    return one[:shared]


def _until_answer(messages: Any) -> Any:
    """A chat without the assistant's last words, if it ends with them."""
    ends = _is_chat(messages) and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"
    return messages[:-1] if ends else messages


def _loaded(row: Mapping[str, Any], value: Any) -> Any:
    """The prompt of a row that this library wrote, which has messages as JSON."""
    key = row.get("key")
    ours = isinstance(key, bytes) and len(key) == KEY_BYTES and row.get("chat") is True
    return json.loads(value) if ours and isinstance(value, str) else value


def _id_in(row: Mapping[str, Any], column: str | None, place: str) -> Any:
    if column is None:
        return _as_id(row.get(ID_COLUMN), place)
    identifier = member(row, column, place)
    if not is_given(identifier):
        raise ValueError(f"{place} needs an id in its column {column!r}, got {identifier!r}")
    return _as_id(identifier, place)


def _as_id(identifier: Any, place: str) -> Any:
    if not is_given(identifier):
        return None
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | np.integer):
        raise TypeError(f"{place}: a prompt id is a str or an int, got {start_of(identifier)}")
    return kept(identifier, place)


def _is_chat(value: Any) -> bool:
    """Whether TRL takes it for messages: a list whose first member has a role."""
    listed = isinstance(value, list | tuple | np.ndarray) and len(value) > 0
    return listed and isinstance(value[0], Mapping) and "role" in value[0]


def _says(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return any(map(_is_said, parts)) or bool(message.get("tool_calls"))


def _is_said(part: Any) -> bool:
    """Whether a part is a text that is not blank, or something else than text."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    return bool(text.strip() if isinstance(text, str) else text)


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row))
