"""Match what a trainer passes with the calibration: prompts to table rows, prompts and completions to scorer input.

A prompt may arrive as it was calibrated, as its rendered template, or as an id. Completions may arrive as messages
where calibration had texts, and with special tokens at their end: a function that looks for a word in a text finds
nothing in a list of messages, and would score everything 0 in training only.

>>> table = ReferenceTable.build([("2+2=", [1.0]), ([{"role": "user", "content": "Hi"}], [1.0])])
>>> suggest_fix(table, [{"role": "user", "content": "2+2="}])
'the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)'
>>> suggest_fix(table, "2+2= ")
'the table has it without the white space around it'
>>> suggest_fix(table, [{"role": "user", "content": "Hi. The board is empty."}])
"the table has it without '. The board is empty.' at the end of its last message (does an environment add it? ..."
>>> form = CompletionForm("text")
>>> form.apply(len, ["Hi"], [[{"role": "assistant", "content": "Hello!"}]])
(['Hi'], ['Hello!'])
>>> form.apply(len, ["Hi"], [[]])
Traceback (most recent call last):
ValueError: the table was calibrated with completions that are texts, and completion 0 is not the same as a text: it ...
>>> remove_endings(("<|im_end|>", "<pad>"), "Hello!<|im_end|><pad><pad>")
'Hello!'
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int64

from calibrated_rewards.models.text import completion_messages, plain_messages
from calibrated_rewards.prompts import Completion, Prompt, UnknownPromptError, as_key, id_key, start_of
from calibrated_rewards.scorers.protocol import reads_messages
from calibrated_rewards.table.reference_table import ReferenceTable

logger = logging.getLogger("calibrated_rewards")
# In place of the key of a prompt of which only the id arrives.
_NO_PROMPT = bytes(16)
PromptsByRow: TypeAlias = Callable[[Int64[np.ndarray, " G"]], list[Prompt | None]]
"""The calibrated prompt of each row, None where that is not known."""


class FoundPrompts(NamedTuple):
    """Prompts with their rows in the table."""

    rows: Int64[np.ndarray, " G"]
    """-1 for a prompt that the table does not know."""
    prompts: list[Prompt]
    """As they were calibrated, in whatever form they arrived."""


def find_prompts(
    table: ReferenceTable, prompts: Sequence[Prompt | None], ids: Sequence[Any] | None, originals: PromptsByRow | None
) -> FoundPrompts:
    """Find prompts by ids or by themselves; raise if one has to be read in another form, and `originals` lacks it.

    A prompt that is None is represented by its id alone.
    """
    prompts = list(prompts)
    keys = compute_keys(prompts)
    rows = find_rows(table, keys, ids)
    known = np.flatnonzero(rows >= 0)
    table_keys = table.keys(rows[known])
    names: list[Any] = [None] * len(prompts) if ids is None else list(ids)
    # A row that is known by an id and no more has no other text than the one that arrives with it.
    as_calibrated = [
        key == keys[at] or (prompts[at] is not None and names[at] is not None and key == id_key(names[at]))
        for at, key in zip(known.tolist(), table_keys, strict=True)
    ]
    other = known[~np.array(as_calibrated, np.bool_)]
    by_place = dict(enumerate(prompts))
    if len(other):
        by_place |= zip(other.tolist(), _read_originals(prompts[other[0]], rows[other], originals), strict=True)
        # A file of prompts that is of another table would have the reward model read somebody else's.
        rows_of_originals = table.find([as_key(by_place[at] or "") for at in other.tolist()])
        for at, row in zip(other.tolist(), rows_of_originals.tolist(), strict=True):
            original = by_place[at]
            by_id_only = row < 0 and names[at] is not None and table.keys(rows[[at]])[0] == id_key(names[at])
            if row != rows[at] and not by_id_only:
                raise ValueError(f"the originals are of another table: row {rows[at]} is {start_of(original)} in them")
            if isinstance(original, str) and not isinstance(prompts[at], str | None):
                raise UnknownPromptError(
                    f"the table was calibrated on a text, and a chat came with its id {names[at]!r}: the policy reads "
                    f"the two otherwise, so completions are others. Calibrate the chats; got {start_of(prompts[at])}"
                )
    missing = next((at for at, prompt in by_place.items() if prompt is None), None)
    if missing is not None:
        raise UnknownPromptError(
            f"prompt {missing} came as the id {names[missing]!r} and nothing else, which the table has not"
        )
    return FoundPrompts(rows, [prompt for prompt in by_place.values() if prompt is not None])


def _read_originals(
    first: Prompt | None, rows: Int64[np.ndarray, " G"], originals: PromptsByRow | None
) -> list[Prompt]:
    prompts = originals(rows) if originals is not None else [None]
    if any(prompt is None for prompt in prompts):
        raise UnknownPromptError(
            f"the table knows {start_of(first)} as an alias of a prompt (its rendered template, an id), and the "
            "reward model has to read the prompt itself: give originals=, or a table in its calibration run's directory"
        )
    return [prompt for prompt in prompts if prompt is not None]


def find_rows(table: ReferenceTable, keys: Sequence[bytes], ids: Sequence[Any] | None) -> Int64[np.ndarray, " G"]:
    """Find the row of each id, or of its key where the table does not know the id; raise where the two disagree."""
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


def compute_keys(prompts: Iterable[Prompt | None]) -> list[bytes]:
    """Compute the key of each prompt, once for prompts that are repeated."""
    prompts = list(prompts)  # held, so that no two of them have the same id() one after the other
    known: dict[Any, bytes] = {id(None): _NO_PROMPT}
    keys = []
    for prompt in prompts:
        name = prompt if isinstance(prompt, str) else id(prompt)
        if name not in known:
            known[name] = as_key(prompt)  # type: ignore[arg-type]  # None is there from the beginning
        keys.append(known[name])
    return keys


def split_texts(table: ReferenceTable, texts: Sequence[str], raise_unknown: bool) -> list[tuple[str, str]]:
    """Split each text after the longest known prompt; one that begins with none is all prompt, or raises."""
    parts = []
    for text in texts:
        try:
            end = int(table.rows_by_prefix([text])[1][0])
        except UnknownPromptError:
            if raise_unknown:
                raise
            end = len(text)
        parts.append((text[:end], text[end:]))
    return parts


def select_ids(columns: Mapping[str, Any], id_column: str | None) -> Sequence[Any] | None:
    """Take the ids from a trainer's columns; None for a reward that finds prompts by themselves."""
    if id_column is None:
        return None
    if id_column not in columns:
        raise ValueError(
            f"this reward finds prompts by the column {id_column!r}, the trainer passed {sorted(columns)}: "
            "in TRL, remove_unused_columns=False"
        )
    ids: Sequence[Any] = columns[id_column]
    return ids


_SPECIAL_AT_START = re.compile(r"^(<[^<>\s]{1,30}>|\[[A-Z]{2,8}\])+")
ADVICE = (
    "calibrate it (the same command with more prompts does only what is missing), or choose what unknown prompts get"
)
# The longest beginning of a message that is tried: each try is a look-up.
TRIED = 4096


def suggest_fix(table: ReferenceTable, prompt: Any) -> str:
    """Suggest why a prompt is missing: try it stripped, as a chat, and without its first or last message."""
    for suggestion, other in _other_forms(prompt):
        if int(table.find([other])[0]) >= 0:
            return suggestion
    return _suggest_addition(table, prompt) or ADVICE


def _other_forms(prompt: Any) -> Iterator[tuple[str, Prompt]]:
    if isinstance(prompt, str):
        chat = "the table has it as a chat of one message: calibrate the text, or find prompts by ids (id_column)"
        yield chat, [{"role": "user", "content": prompt}]
        yield "the table has it without the white space around it", prompt.strip()
        special = _SPECIAL_AT_START.match(prompt)
        if special:
            yield f"the table has it without {special[0]!r} at its beginning", prompt[special.end() :]
        return
    messages = _as_messages(prompt)
    if messages:
        text = "the table has its text as a plain prompt: calibrate the messages, or find prompts by ids (id_column)"
        yield text, messages[-1]["content"]
        yield "the table has it without its first message (a system prompt?)", messages[1:] or messages
        yield "the table has it without its last message (a completion?)", messages[:-1] or messages


def _suggest_addition(table: ReferenceTable, prompt: Any) -> str | None:
    """Find the longest beginning of the last message with which the table knows the chat.

    TRL appends what an environment's `reset()` returns to the last message before it generates.
    """
    messages = _as_messages(prompt)
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


def _as_messages(prompt: Any) -> list[dict[str, Any]]:
    """Convert a chat to plain messages; none where it has no such form."""
    try:
        return [] if isinstance(prompt, str) else plain_messages(prompt)
    except (TypeError, ValueError, KeyError, AttributeError):
        return []


Kind = Literal["text", "messages", "both"]


@dataclass(frozen=True)
class CompletionForm:
    """The form that completions had in calibration, for scorers to read them in it again."""

    completions: Kind | None = None
    """None for a table that does not say: then all is passed on as it comes, as with "both"."""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "CompletionForm":
        """Read it from a table's metadata; a table of an older release has it in its probes."""
        kind: Kind | None = (meta.get("form") or {}).get("completions")
        if kind is not None:
            return cls(kind)
        are_texts = {isinstance(probe["completion"], str) for probe in meta.get("probes") or []}
        if not are_texts:
            return cls()
        return cls("both" if len(are_texts) == 2 else "text" if are_texts == {True} else "messages")

    def apply(
        self, scorer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[list[Prompt], list[Completion]]:
        """Convert pairs to the form that the scorer was given in calibration; raise for one that has no such form."""
        if self.completions is None:
            return [*prompts], [*completions]
        prompts = [_as_stored(prompt) for prompt in prompts]
        if self.completions == "text":
            return prompts, [self._as_text(scorer, number, each) for number, each in enumerate(completions)]
        return prompts, [completion_messages(each) if self.completions == "messages" else each for each in completions]

    def _as_text(self, scorer: Any, number: int, completion: Completion) -> Completion:
        if isinstance(completion, str):
            return completion
        reason = _find_more_than_text(completion)
        if not reason:
            return str(plain_messages(completion)[0]["content"])
        if reads_messages(scorer):
            return completion
        raise ValueError(
            f"the table was calibrated with completions that are texts, and completion {number} is not the same as a "
            f"text: it {reason}; got {start_of(completion)}. Calibrate with completions of this form (import_rollouts "
            "takes them), or give a scorer that reads messages: one of load_scorer, or with reads_messages = True"
        )


def _as_stored(prompt: Prompt) -> Prompt:
    """Convert a chat to its stored form: without the members that are None, which Arrow adds; text parts joined."""
    if isinstance(prompt, str) or prompt is None or all(map(_is_plain, prompt)):
        return prompt
    try:
        return plain_messages(prompt)
    except ValueError:
        return prompt  # with a picture, which was never calibrated: an unknown prompt, as it came


def _is_plain(message: Any) -> bool:
    return (
        type(message) is dict
        and len(message) == 2
        and type(message.get("role")) is str
        and type(message.get("content")) is str
    )


def _find_more_than_text(completion: Completion) -> str:
    """Say why messages are more, or less, than the text of an answer; "" if they are not."""
    if len(completion) != 1:
        return f"has {len(completion)} messages" if len(completion) else "has no message, not even an empty one"
    try:
        (message,) = plain_messages(completion)
    except (TypeError, ValueError) as error:
        return f"has content that is no text ({error})"
    if message["role"] != "assistant":
        return f"is a message of the role {message['role']!r}"
    others = sorted({*message} - {"role", "content"} - {name for name, value in message.items() if not value})
    return f"has more than content: {', '.join(others)}" if others else ""


_SPECIAL_AT_END = re.compile(r"(<\|[^<>|\s]{1,30}\|>|</s>|<(?:eos|pad|end_of_turn)>|\[(?:EOS|PAD|SEP)\])\s*$")


def remove_endings(endings: Sequence[str], completion: Completion) -> Completion:
    """Remove these texts from the end of a completion, however many there are; messages stay as they are."""
    while isinstance(completion, str):
        ending = next((each for each in endings if each and completion.endswith(each)), None)
        if ending is None:
            break
        completion = completion.removesuffix(ending)
    return completion


@dataclass
class EndingsWatch:
    """Warn once of completions that end with what looks like a special token: those of calibration had none."""

    warned: bool = False

    def check(self, name: str, completions: Sequence[Completion]) -> None:
        """Look at completions as the reward model is about to read them."""
        ending = None if self.warned else find_special_token(completions)
        if ending is not None:
            self.warned = True
            logger.warning(
                "%s: a completion ends with %r, which looks like a special token that the trainer left there, and "
                "the reward model will read it. If so, say endings=(%r,)",
                name,
                ending,
                ending,
            )


def find_special_token(completions: Sequence[Completion]) -> str | None:
    """Find what looks like a special token at the end of a text.

    >>> find_special_token(["Hello!", "Hi</s>"])
    '</s>'
    """
    texts = (text for text in completions if isinstance(text, str) and text.endswith((">", "]")))
    return next((match[1] for text in texts if (match := _SPECIAL_AT_END.search(text))), None)
