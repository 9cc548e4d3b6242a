"""Suggest why the table has no row for a prompt: in which other form it knows it, or what was added to it.

>>> table = ReferenceTable.build([("2+2=", [1.0]), ([{"role": "user", "content": "Hi"}], [1.0])])
>>> hint(table, [{"role": "user", "content": "2+2="}])
'the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)'
>>> hint(table, "2+2= ")
'the table has it without the white space around it'
>>> hint(table, [{"role": "user", "content": "Hi. The board is empty."}])
"the table has it without '. The board is empty.' at the end of its last message (does an environment add it? ..."
"""

import re
from collections.abc import Iterator
from typing import Any

from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.table.reference_table import ReferenceTable

_SPECIAL = re.compile(r"^(<[^<>\s]{1,30}>|\[[A-Z]{2,8}\])+")
ADVICE = (
    "calibrate it (the same command with more prompts does only what is missing), or choose what unknown prompts get"
)
# The longest beginning of a message that is tried: each try is a look-up.
TRIED = 4096


def hint(table: ReferenceTable, prompt: Any) -> str:
    """The other form in which the table knows the prompt; if there is none, what can be done."""
    for suggestion, other in _other_forms(prompt):
        if int(table.find([other])[0]) >= 0:
            return suggestion
    return _suggest_addition(table, prompt) or ADVICE


def _other_forms(prompt: Any) -> Iterator[tuple[str, Prompt]]:
    if isinstance(prompt, str):
        chat = "the table has it as a chat of one message: calibrate the text, or find prompts by ids (id_column)"
        yield chat, [{"role": "user", "content": prompt}]
        yield "the table has it without the white space around it", prompt.strip()
        special = _SPECIAL.match(prompt)
        if special:
            yield f"the table has it without {special[0]!r} at its beginning", prompt[special.end() :]
        return
    messages = _messages(prompt)
    if messages:
        text = "the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)"
        yield text, messages[-1]["content"]
        yield "the table has it without its first message (a system prompt?)", messages[1:] or messages
        yield "the table has it without its last message (a completion?)", messages[:-1] or messages


def _suggest_addition(table: ReferenceTable, prompt: Any) -> str | None:
    """Find the longest beginning of the last message with which the table knows the chat.

    TRL appends what an environment's `reset()` returns to the last message before it generates.
    """
    messages = _messages(prompt)
    if not messages:
        return None
    *before, last = messages
    content: str = last["content"]
    beginnings = [content[:end] for end in range(min(len(content), TRIED) - 1, -1, -1)]
    rows = table.find([[*before, {**last, "content": beginning}] for beginning in beginnings])
    known = [beginning for beginning, row in zip(beginnings, rows.tolist(), strict=True) if row >= 0]
    if not known:
        return None
    added = content[len(known[0]) :]
    return (
        f"the table has it without {added[:40]!r} at the end of its last message (does an environment add it? find "
        "prompts by a column of the dataset, id_column, if the references were drawn with it too)"
    )


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """The prompt as plain messages; none where it has no such form."""
    try:
        return [] if isinstance(prompt, str) else plain_messages(prompt)
    except (TypeError, ValueError, KeyError, AttributeError):
        return []
