"""Prompts as they arrive, whatever their form: their rows in the table, and what the reward model should read.

Suggest why the table has no row for a prompt: in which other form it knows it, or what was added to it.

>>> table = ReferenceTable.build([("2+2=", [1.0]), ([{"role": "user", "content": "Hi"}], [1.0])])
>>> hint(table, [{"role": "user", "content": "2+2="}])
'the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)'
>>> hint(table, "2+2= ")
'the table has it without the white space around it'
>>> hint(table, [{"role": "user", "content": "Hi. The board is empty."}])
"the table has it without '. The board is empty.' at the end of its last message (does an environment add it? ..."
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Prompt, UnknownPromptError, as_key, id_key, start_of
from calibrated_rewards.table.reference_table import ReferenceTable

# In place of the key of a prompt of which only the id arrives.
_NO_PROMPT = bytes(16)
# The prompt of each row, None where that is not known.
Reading = Callable[[Int64[np.ndarray, " G"]], list[Prompt | None]]


class Located(NamedTuple):
    """Where prompts are."""

    rows: Int64[np.ndarray, " G"]
    """In the table; -1 for a prompt that it does not know."""
    prompts: list[Prompt]
    """As they were calibrated, whatever they arrived as."""


def located(
    table: ReferenceTable, prompts: Sequence[Prompt | None], ids: Sequence[Any] | None, originals: Reading | None
) -> Located:
    """Find prompts by their ids, or by themselves; an error if one has to be read otherwise, and nobody knows how.

    A prompt that is None is one that its id alone stands for.
    """
    prompts = list(prompts)
    keys = keys_of(prompts)
    rows = rows_of(table, keys, ids)
    known = np.flatnonzero(rows >= 0)
    own = table.keys(rows[known])
    named: list[Any] = [None] * len(prompts) if ids is None else list(ids)
    # A row that is known by an id and no more has no other text than the one that arrives with it.
    as_it_is = [
        key == keys[at] or (prompts[at] is not None and named[at] is not None and key == id_key(named[at]))
        for at, key in zip(known.tolist(), own, strict=True)
    ]
    other = known[~np.array(as_it_is, np.bool_)]
    read = dict(enumerate(prompts))
    if len(other):
        read |= zip(other.tolist(), _originals(prompts[other[0]], rows[other], originals), strict=True)
        # A file of prompts that is of another table would have the reward model read somebody else's.
        own_rows = table.find([as_key(read[at] or "") for at in other.tolist()])
        for at, row in zip(other.tolist(), own_rows.tolist(), strict=True):
            by_id_only = row < 0 and named[at] is not None and table.keys(rows[[at]])[0] == id_key(named[at])
            if row != rows[at] and not by_id_only:
                raise ValueError(f"the originals are of another table: row {rows[at]} is {start_of(read[at])} in them")
            if isinstance(read[at], str) and not isinstance(prompts[at], str | None):
                raise UnknownPromptError(
                    f"the table was calibrated on a text, and a chat came with its id {named[at]!r}: the policy reads "
                    f"the two otherwise, so completions are others. Calibrate the chats; got {start_of(prompts[at])}"
                )
    lost = [at for at, prompt in read.items() if prompt is None]
    if lost:
        at = lost[0]
        raise UnknownPromptError(f"prompt {at} came as the id {named[at]!r} and nothing else, which the table has not")
    return Located(rows, [prompt for prompt in read.values() if prompt is not None])


def split_texts(table: ReferenceTable, texts: Sequence[str], known: bool) -> list[tuple[str, str]]:
    """Each text as its prompt and what follows it; unless all have to be `known`, others are prompts as a whole."""
    cut = []
    for text in texts:
        try:
            split = int(table.rows_by_prefix([text])[1][0])
        except UnknownPromptError:
            if known:
                raise
            split = len(text)
        cut.append((text[:split], text[split:]))
    return cut


def ids_in(columns: Mapping[str, Any], id_column: str | None) -> Sequence[Any] | None:
    """The ids among a trainer's columns; None for a reward that finds prompts by themselves."""
    if id_column is None:
        return None
    if id_column not in columns:
        raise ValueError(
            f"this reward finds prompts by the column {id_column!r}, the trainer passed {sorted(columns)}: "
            "in TRL, remove_unused_columns=False"
        )
    found: Sequence[Any] = columns[id_column]
    return found


def rows_of(table: ReferenceTable, keys: Sequence[bytes], ids: Sequence[Any] | None) -> Int64[np.ndarray, " G"]:
    """The row of each key, or of its id where that is known; an error where both are, and are not the same."""
    rows = table.find(list(keys), ids)
    if ids is None:
        return rows
    by_key = table.find(list(keys))
    apart = np.flatnonzero((by_key >= 0) & (by_key != rows))
    if len(apart):
        raise UnknownPromptError(
            f"the prompt and its id are of two prompts of the table, for {len(apart)} of {len(rows)}: the first is "
            f"number {apart[0]}, with the id {list(ids)[apart[0]]!r}. Is the column of ids in the order of the prompts?"
        )
    return rows


def keys_of(prompts: Iterable[Prompt | None]) -> list[bytes]:
    """The key of each prompt; of those that come many times over, worked out once."""
    prompts = list(prompts)  # held, so that no two of them have the same id() one after the other
    texts: dict[Any, bytes] = {id(None): _NO_PROMPT}
    keys = []
    for prompt in prompts:
        name = prompt if isinstance(prompt, str) else id(prompt)
        if name not in texts:
            texts[name] = as_key(prompt)  # type: ignore[arg-type]  # None is there from the beginning
        keys.append(texts[name])
    return keys


def _originals(first: Prompt | None, rows: Int64[np.ndarray, " G"], originals: Reading | None) -> list[Prompt]:
    found = originals(rows) if originals is not None else [None]
    if any(original is None for original in found):
        raise UnknownPromptError(
            f"the table knows {start_of(first)} as another name of a prompt (its rendered template, an id), and the "
            "reward model has to read the prompt itself: give originals=, or a table in its calibration run's directory"
        )
    return [original for original in found if original is not None]


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
