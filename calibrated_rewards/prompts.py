"""Keys of prompts: a text or messages to 16 stable bytes, on which all processes agree.

The canonical form that is hashed is specified in docs/reference/table_format.md, so that a program in another language
can compute the same keys. Whatever changes it is a new format version.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from json.encoder import encode_basestring as _quote
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

Prompt: TypeAlias = str | Sequence[Any] | np.ndarray
"""A text, or a list (tuple, object array) of messages: mappings or objects that have a role and content."""
Completion: TypeAlias = str | Sequence[Any] | np.ndarray
"""A text, or the messages that follow the prompt's (tool calls and their results included)."""

KEY_BYTES = 16
_TEXT, _CHAT, _ID = b"text:", b"chat:", b"id:"
_CONTROLS = bytes(range(32))
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
# A float with a whole value below this is written as an integer: Arrow turns a column of 1 and 0.7 into 1.0 and 0.7.
_WHOLE_FLOATS = 2.0**53


class UnknownPromptError(KeyError):
    """A prompt that a table does not have, or has in another form only; reward/find_prompts.py writes the hints."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message in quotes


def prompt_key(prompt: Prompt) -> bytes:
    """Compute the key of a prompt: 16 bytes, the same in every process and on every machine.

    >>> prompt_key("Hi").hex()
    '44964cc7191d530031ce76f9f6d73f74'
    >>> chat = [{"role": "user", "content": "Hi"}]
    >>> prompt_key(chat) == prompt_key([{"content": [{"type": "text", "text": "Hi"}], "role": "user", "name": None}])
    True
    >>> prompt_key(chat) == prompt_key("Hi")
    False
    """
    if isinstance(prompt, str):
        data = _TEXT + prompt.encode("utf-8", "surrogatepass")
    else:
        data = _CHAT + (_plain_chat(prompt) or canonical_chat(prompt).encode("utf-8", "surrogatepass"))
    return blake2b(data, digest_size=KEY_BYTES).digest()


def id_key(identifier: str | int | np.integer) -> bytes:
    """Compute the key of an explicit prompt id; "7" and 7 are the same id, and no id is ever a prompt's key.

    >>> id_key(7) == id_key("7") != prompt_key("7")
    True
    """
    whole = isinstance(identifier, int | np.integer) and not isinstance(identifier, bool)
    if not whole and not isinstance(identifier, str):
        raise TypeError(f"a prompt id is a str or an int, got {type(identifier).__name__}: {start_of(identifier)}")
    text = str(int(identifier)) if whole else str.__str__(identifier)  # enum members are their values
    return _digest(_ID + text.encode("utf-8", "surrogatepass"))


def as_key(prompt: Prompt | bytes) -> bytes:
    """Return the key of a prompt, or the key itself where the caller has it already (16 raw bytes)."""
    if not isinstance(prompt, bytes):
        return prompt_key(prompt)
    if len(prompt) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(prompt)}: {start_of(prompt)}")
    return prompt


def longest_prefix(
    text: str, lengths: Sequence[int], known: Callable[[list[bytes]], Sequence[bool] | np.ndarray]
) -> tuple[bytes, int] | None:
    """Find the longest known prompt that `text` starts with, as (key, number of characters), or None.

    `lengths` are the ascending UTF-8 lengths of the known text prompts, `known` says which of a list of keys are known.
    For training loops that pass prompt and response as one text.

    >>> table = {prompt_key("2+2="), prompt_key("2+2=4 because ")}
    >>> key, split = longest_prefix("2+2=4, easily", [4, 14], lambda keys: [key in table for key in keys])
    >>> split, key == prompt_key("2+2=")
    (4, True)
    """
    data = text.encode("utf-8", "surrogatepass")
    keys, ends = _prefix_keys(data, lengths)
    hits = np.flatnonzero(known(keys)) if keys else np.empty(0, dtype=np.int64)
    if not len(hits):
        return None
    longest = int(hits[-1])
    return keys[longest], len(data[: ends[longest]].decode("utf-8", "surrogatepass"))


def _prefix_keys(data: bytes, lengths: Sequence[int]) -> tuple[list[bytes], list[int]]:
    """Compute the text key of every prefix of `data` that has one of the lengths, hashing each byte once."""
    state, done = blake2b(_TEXT, digest_size=KEY_BYTES), 0
    keys: list[bytes] = []
    ends: list[int] = []
    for end in map(int, lengths):
        if end > len(data):
            break
        if end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
            continue
        state.update(data[done:end])
        done = end
        keys.append(state.copy().digest())
        ends.append(end)
    return keys, ends


def canonical_chat(messages: Any) -> str:
    """Write the text of messages that is hashed: compact JSON with sorted keys, None dropped and text parts joined.

    >>> canonical_chat([{"role": "user", "name": None, "content": [{"type": "text", "text": "Hi"}]}])
    '[{"content":"Hi","role":"user"}]'
    """
    if not _is_list(messages):
        raise TypeError(
            f"a prompt is a string or a list of messages, got {type(messages).__name__}: {start_of(messages)}"
        )
    if not len(messages):
        raise ValueError("a prompt needs at least one message, got an empty list")
    try:
        return "[" + ",".join([_message(message, f"message {i}") for i, message in enumerate(messages)]) + "]"
    except RecursionError:
        raise ValueError("a message must not contain itself or nest without end") from None


def _plain_chat(messages: Any) -> bytes | None:
    """Write the canonical chat in half the time if every message is {"role": str, "content": str}; else None."""
    written = []
    for message in messages if type(messages) is list else ():
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        if "\\" in content:
            content = content.replace("\\", "\\\\")
        if '"' in content:
            content = content.replace('"', '\\"')
        if "\n" in content:
            content = content.replace("\n", "\\n")
        written.append(f'{{"content":"{content}","role":{_quote(role)}}}')
    data = f"[{','.join(written)}]".encode("utf-8", "surrogatepass")
    # Any other control character is rare enough to be left to the full writer.
    return data if written and len(data.translate(None, _CONTROLS)) == len(data) else None


def _message(message: object, place: str) -> str:
    fields = _members(message, _MESSAGE_FIELDS)
    if fields is None or not isinstance(fields.get("role"), str):
        raise TypeError(f"{place} needs a role that is a string, got {start_of(message)}")
    if _is_list(fields.get("content")):
        fields = {**fields, "content": _join_texts(fields["content"])}
    return _object(fields, place)


def _join_texts(parts: Sequence[Any]) -> str | list[Any]:
    """Join runs of adjacent text parts of a content; a string where there is nothing but text."""
    joined: list[Any] = []
    for part in parts:
        text = _text_of(part)
        if text is not None and joined and isinstance(joined[-1], _Text):
            joined[-1] = _Text(joined[-1].text + text)
        else:
            joined.append(part if text is None else _Text(text))
    if all(isinstance(part, _Text) for part in joined):
        return "".join(part.text for part in joined)
    return joined


@dataclasses.dataclass(frozen=True)
class _Text:
    """A text part in one form, in which ever way it was written."""

    text: str
    type: str = "text"


def _text_of(part: object) -> str | None:
    """Return the text of a part that is nothing but text; None for any other part."""
    if isinstance(part, str):
        return part
    fields = {name: value for name, value in (_members(part) or {}).items() if value is not None}
    text = fields.get("text")
    return text if isinstance(text, str) and fields == {"type": "text", "text": text} else None


def _members(value: Any, wanted: Sequence[str] = ()) -> Mapping[Any, Any] | None:
    """Return the named values of a mapping, dataclass, pydantic model or namespace, and the `wanted` ones of an object.

    None for all else, and for objects with private attributes: two of them might differ only in those.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type) or callable(value):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return dict(dump())
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ()), *getattr(value, "_fields", ())]
    if any(name.startswith("_") for name in names) or not (wanted or isinstance(value, SimpleNamespace)):
        return None
    return {name: getattr(value, name, None) for name in (*names, *wanted)}


def _canonical(value: Any, place: str) -> str:
    """Write a value as canonical JSON; bytes and pixels become an unquoted token, which no JSON value is."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        return _quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return _number(value, place)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"bytes({_digest(bytes(value)).hex()})"
    if _is_list(value):
        return "[" + ",".join([_canonical(item, f"{place}[{i}]") for i, item in enumerate(value)]) + "]"
    return _image(value) or _object(_members(value), place, value)


def _object(fields: Mapping[Any, Any] | None, place: str, value: object = None) -> str:
    if fields is None:
        raise TypeError(f"{place} has no canonical form: {type(value).__name__} {start_of(value)}")
    for name in fields:
        if not isinstance(name, str):
            raise TypeError(f"{place} needs names that are strings, got {start_of(name)}")
    members = sorted((str.__str__(name), item) for name, item in fields.items() if item is not None)
    return "{" + ",".join([f"{_quote(name)}:{_canonical(item, f'{place}.{name}')}" for name, item in members]) + "}"


def _number(value: float, place: str) -> str:
    if isinstance(value, int):
        return str(int(value))
    if not math.isfinite(value):
        raise ValueError(f"{place} has no canonical form: {value}")
    return str(int(value)) if value.is_integer() and abs(value) < _WHOLE_FLOATS else repr(float(value))


def _image(value: Any) -> str | None:
    """Write the token of an array of two axes or more, or of a PIL image; None for anything else."""
    if isinstance(value, np.ndarray):
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return f"array({value.dtype.name},{'x'.join(map(str, value.shape))},{_digest(little.tobytes()).hex()})"
    pil = sys.modules.get("PIL.Image")  # an image cannot be here unless its library is
    if pil is None or not isinstance(value, pil.Image):
        return None
    if getattr(value, "n_frames", 1) > 1:
        raise TypeError(f"an image in a prompt has one frame, got {value.n_frames}")
    palette = value.getpalette(value.palette.mode) if value.palette else ()
    clear = value.info.get("transparency")
    pixels = value.tobytes() + bytes(palette or ()) + (b"" if clear is None else repr(clear).encode())
    return f"image({value.mode},{value.width}x{value.height},{_digest(pixels).hex()})"


def _is_list(value: object) -> bool:
    """Return whether a value is a list, a tuple, or an array that a parquet reader puts in place of one."""
    if isinstance(value, (list, tuple)):
        return True
    return isinstance(value, np.ndarray) and (value.ndim == 1 or (value.ndim > 1 and value.dtype == object))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=KEY_BYTES).digest()


def name_of(thing: Any) -> str:
    """Return the name by which errors call a function, a class, or an object: that of its class; with its module.

    >>> name_of(len), name_of(1)
    ('builtins.len', 'builtins.int')
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def start_of(prompt: object, width: int = 60) -> str:
    """Write the start of a prompt, or its key, for an error message; of a chat, its roles and its last message.

    >>> start_of("Once upon a time there was a king who had three daughters, and")
    "'Once upon a time there was a king who had three daughter..."
    >>> start_of([{"role": "system", "content": "You are a calculator."}, {"role": "user", "content": "2+2="}])
    "2 messages (system, user: '2+2=')"
    """
    if isinstance(prompt, bytes) and len(prompt) == KEY_BYTES:
        return f"key {prompt.hex()}"
    if isinstance(prompt, list | tuple | np.ndarray) and _is_list(prompt):
        messages = [_members(message, _MESSAGE_FIELDS) or {} for message in prompt]
        roles = [role for message in messages if isinstance(role := message.get("role"), str)]
        if messages and len(roles) == len(messages):
            count = f"{len(roles)} message{'s' * (len(roles) > 1)}"
            shown = ", ".join(roles if len(roles) <= 4 else [roles[0], "...", roles[-1]])
            return f"{count} ({shown}: {_cut(repr(messages[-1].get('content')), width)})"
    return _cut(repr(prompt), width)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
