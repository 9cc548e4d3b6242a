"""Messages as a chat template takes them: plain dicts, in the order and with the values that they were given."""

import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from json import loads
from typing import Any

import numpy as np

from calibrated_rewards.prompts import Completion, canonical_chat, start_of

# What templates call to write the date.
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Each message as a dict: keys that are None (Arrow adds them) are gone, text parts joined, no content is "".

    Unlike in the canonical form of a prompt's key, arguments of tool calls keep their order and their numbers.

    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    given = messages.tolist() if isinstance(messages, np.ndarray) else messages
    if isinstance(given, list | tuple):
        for i, message in enumerate(given):
            if isinstance(message, Mapping):
                _check_text(message.get("content"), f"message {i}")
    canonical = canonical_chat(given)  # refuses what is no chat
    if not all(isinstance(message, Mapping) for message in given):
        given = loads(canonical)
    return [_plain(message) for message in given]


def answer(completion: Completion) -> list[dict[str, Any]]:
    """The messages of a completion; a text is what the assistant says."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return plain_messages(completion) if len(completion) else []


@lru_cache(64)
def dated(template: str, today: str) -> str:
    """The template with a date that stays: one that writes today's would score otherwise tomorrow.

    >>> dated("It is {{ strftime_now('%d %b %Y') }}.", "2024-07-26")
    "It is {{ '26 Jul 2024' }}."
    """
    day = datetime.fromisoformat(today)
    return NOW.sub(lambda call: repr(day.strftime(call[2])), template)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = _without_none(message)
    content = kept.get("content", "")
    text = content if isinstance(content, str) else "".join(map(_text_of, content))
    rest = {name: member for name, member in kept.items() if name not in ("role", "content")}
    return {"role": kept["role"], "content": text, **rest}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(member) for name, member in value.items() if member is not None}
    return [_without_none(member) for member in value] if isinstance(value, list | tuple | np.ndarray) else value


def _text_of(part: Any) -> str:
    return part if isinstance(part, str) else str(part["text"])


def _check_text(content: Any, place: str) -> None:
    """Refuse content that is not text: a template would write out what Python calls it, and it would be scored."""
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list | tuple | np.ndarray) else [content]
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if kind != "text" or (isinstance(part, Mapping) and not isinstance(part.get("text"), str)):
            raise ValueError(f"a scorer reads text, {place} has content of another kind: {start_of(part)}")
