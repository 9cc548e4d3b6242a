"""A prompt that the table does not know, in a form in which it would: the hint in an error.

>>> table = ReferenceTable.build([("2+2=", [1.0]), ([{"role": "user", "content": "Hi"}], [1.0])])
>>> hint(table, [{"role": "user", "content": "2+2="}])
'the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)'
>>> hint(table, "2+2= ")
'the table has it without the white space around it'
"""

import re
from collections.abc import Iterator
from typing import Any

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reading.messages import plain_messages
from calibrated_rewards.table import ReferenceTable

_SPECIAL = re.compile(r"^(<[^<>\s]{1,30}>|\[[A-Z]{2,8}\])+")
ADVICE = (
    "calibrate it (the same command with more prompts does only what is missing), or choose what unknown prompts get"
)


def hint(table: ReferenceTable, prompt: Any) -> str:
    """In which other form the table knows the prompt; if in none, what can be done."""
    return next((said for said, other in _others(prompt) if int(table.find([other])[0]) >= 0), ADVICE)


def _others(prompt: Any) -> Iterator[tuple[str, Prompt]]:
    if isinstance(prompt, str):
        chat = "the table has it as a chat of one message: calibrate the text, or find prompts by ids (id_column)"
        yield chat, [{"role": "user", "content": prompt}]
        yield "the table has it without the white space around it", prompt.strip()
        special = _SPECIAL.match(prompt)
        if special:
            yield f"the table has it without {special[0]!r} at its beginning", prompt[special.end() :]
        return
    try:
        messages = plain_messages(prompt)
    except (TypeError, ValueError, KeyError, AttributeError):
        return
    if messages:
        text = "the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)"
        yield text, messages[-1]["content"]
        yield "the table has it without its first message (a system prompt?)", messages[1:] or messages
        yield "the table has it without its last message (a completion?)", messages[:-1] or messages
