"""Find a trainer's prompts in the table, give them back as they were calibrated, and explain unknown ones.

A prompt may arrive as it was calibrated, as its rendered template, or as an id. The table has all of these as names of
a row, but not the prompt's text, which the reward model has to read: `Originals` has it, or the run directory.

For an unknown prompt `table.find`, `find_rows` and `find_prompts` return the row -1. `table.rows` and
`raise_unknown_prompt` raise UnknownPromptError; `CalibratedReward` does, unless its `on_missing` says otherwise.

>>> table = ReferenceTable.build([("2+2=", [1.0]), ([{"role": "user", "content": "Hi"}], [1.0])])
>>> suggest_fix(table, [{"role": "user", "content": "2+2="}])
'the table has the text of its last message as a plain prompt: calibrate these messages as they are'
>>> suggest_fix(table, "2+2= ")
'the table has it without the white space around it'
>>> suggest_fix(table, [{"role": "user", "content": "Hi. The board is empty."}])
"the table has it without '. The board is empty.' at the end of its last message (does an environment add it? ..."
>>> import tempfile
>>> chat = [{"role": "user", "content": "Hi"}]
>>> table = ReferenceTable.build([(chat, [0.5], ["<user>Hi</user>"])])
>>> originals = Originals.write(tempfile.mkdtemp() + "/prompts.jsonl", table, [chat])
>>> originals(table.rows(["<user>Hi</user>"]))
[[{'role': 'user', 'content': 'Hi'}]]
"""

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from jaxtyping import Int64

from calibrated_rewards.files import write_file
from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Prompt, UnknownPromptError, as_key, id_key, start_of
from calibrated_rewards.table.reference_table import ReferenceTable, format_unknown

# Stands for the key of a prompt that is None, because only its id arrived.
_NO_PROMPT = bytes(16)
PromptsByRow: TypeAlias = Callable[[Int64[np.ndarray, " G"]], list[Prompt | None]]
"""The calibrated prompt of each row, None where that is not known."""


class FoundPrompts(NamedTuple):
    """The row of each prompt in the table, and the prompt for the reward model to read."""

    rows: Int64[np.ndarray, " G"]
    """-1 for a prompt that the table does not know."""
    prompts: list[Prompt]
    """The prompt as it was calibrated; one that the table does not know as it arrived."""


def find_prompts(
    table: ReferenceTable, prompts: Sequence[Prompt | None], ids: Sequence[Any] | None, originals: PromptsByRow | None
) -> FoundPrompts:
    """Find the row of each prompt, by its id or by itself, and its calibrated form; an unknown prompt has the row -1.

    A prompt is None if only its id arrived. UnknownPromptError if a prompt arrived in another form than the calibrated
    one and `originals` lacks that, or if a chat arrived for a calibrated text. Other changes that an id hides, such as
    an added system message, are not noticed.
    """
    prompts = list(prompts)
    keys = compute_keys(prompts)
    rows = find_rows(table, keys, ids)
    known = np.flatnonzero(rows >= 0)
    table_keys = table.keys(rows[known])
    names: list[Any] = [None] * len(prompts) if ids is None else list(ids)
    # A row whose only name is an id: the prompt that arrives with the id is the calibrated one.
    as_calibrated = [
        key == keys[at] or (prompts[at] is not None and names[at] is not None and key == id_key(names[at]))
        for at, key in zip(known.tolist(), table_keys, strict=True)
    ]
    other = known[~np.array(as_calibrated, np.bool_)]
    by_place = dict(enumerate(prompts))
    if len(other):
        by_place |= zip(other.tolist(), _read_originals(prompts[other[0]], rows[other], originals), strict=True)
        # From another table's file of prompts the reward model would read the wrong ones.
        rows_of_originals = table.find([as_key(by_place[at] or "") for at in other.tolist()])
        for at, row in zip(other.tolist(), rows_of_originals.tolist(), strict=True):
            original = by_place[at]
            by_id_only = row < 0 and names[at] is not None and table.keys(rows[[at]])[0] == id_key(names[at])
            if row != rows[at] and not by_id_only:
                raise ValueError(
                    f"the originals belong to another table: they have {start_of(original)} in row {rows[at]}"
                )
            if isinstance(original, str) and not isinstance(prompts[at], str | None):
                raise UnknownPromptError(
                    f"the id {names[at]!r} is of a text in the table, and a chat came with it: the policy reads a chat "
                    f"differently, and its completions differ. Calibrate the chats; got {start_of(prompts[at])}"
                )
    missing = next((at for at, prompt in by_place.items() if prompt is None), None)
    if missing is not None:
        raise UnknownPromptError(f"prompt {missing} is None, and the table does not have its id {names[missing]!r}")
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
    """Find the row of each prompt by its id, or by its key where the id is unknown; -1 where both are.

    UnknownPromptError if id and key lead to two rows: the ids are those of other prompts.
    """
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
        except UnknownPromptError as error:
            if raise_unknown:
                raise UnknownPromptError(f"{error}: {suggest_fix(table, text, as_prefix=True)}") from None
            end = len(text)
        parts.append((text[:end], text[end:]))
    return parts


def raise_unknown_prompt(
    table: ReferenceTable, rows: Int64[np.ndarray, " G"], prompts: Sequence[Any], ids: Sequence[Any] | None
) -> NoReturn:
    """Raise for the first prompt whose row is -1: what the table lacks, under which key, and how to mend it."""
    unknown = np.flatnonzero(rows < 0)
    first = int(unknown[0])
    prompt, identifier = prompts[first], None if ids is None else list(ids)[first]
    if prompt is not None:
        name, key = start_of(prompt), as_key(prompt)
    elif identifier is not None:
        name, key = f"the id {identifier!r}", id_key(identifier)
    else:
        name, key = f"prompt {first}, which is None and has no id", _NO_PROMPT
    message = format_unknown(table, name, key, unknown=len(unknown), of=len(rows))
    raise UnknownPromptError(f"{message}: {suggest_fix(table, prompt)}")


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
    "no similar form is in the table. Compare the prompts that the trainer passes with those that you calibrated; "
    "calibrate what is missing (`calibrated-rewards calibrate` with more prompts draws only that), or choose what "
    "unknown prompts get (on_missing)"
)
# The longest beginning of a message that is looked up, in characters: each is hashed on its own.
LONGEST_BEGINNING = 4096


def suggest_fix(table: ReferenceTable, prompt: Any, as_prefix: bool = False) -> str:
    """Suggest why a prompt is missing: look up similar forms, name the one that the table has, and what to do.

    A text is tried as a chat, and without white space around it or special tokens before it. A chat is tried as the
    text of its last message, without its first or last message, and with up to `LONGEST_BEGINNING` characters of its
    last message. `as_prefix` is for a text that goes on after its prompt.
    """
    for suggestion, other in _other_forms(prompt):
        if as_prefix and isinstance(other, str):
            try:
                table.rows_by_prefix([other])
            except UnknownPromptError:
                continue
            return suggestion
        if int(table.find([other])[0]) >= 0:
            return suggestion
    return _suggest_addition(table, prompt) or ADVICE


def _other_forms(prompt: Any) -> Iterator[tuple[str, Prompt]]:
    if isinstance(prompt, str):
        chat = "the table has it as a chat of one message: calibrate the text, or pass the messages"
        yield chat, [{"role": "user", "content": prompt}]
        yield "the table has it without the white space around it", prompt.strip()
        special = _SPECIAL_AT_START.match(prompt)
        if special:
            yield f"the table has it without {special[0]!r} at its beginning", prompt[special.end() :]
        return
    messages = _as_messages(prompt)
    if messages:
        text = "the table has the text of its last message as a plain prompt: calibrate these messages as they are"
        yield text, messages[-1]["content"]
        first, last = (start_of(messages[at]["content"], 40) for at in (0, -1))
        added = f"the table has it without its first message ({first}): calibrate with this message, or stop the "
        yield f"{added}trainer from adding it", messages[1:] or messages
        completion = f"the table has it without its last message ({last}): if that is a completion, pass it apart"
        yield completion, messages[:-1] or messages


def _suggest_addition(table: ReferenceTable, prompt: Any) -> str | None:
    """Look up beginnings of a chat's last message, the longest first, and name what was added to the one that is known.

    TRL appends what an environment's `reset()` returns to the last message before it generates.
    """
    messages = _as_messages(prompt)
    if not messages:
        return None
    *before, last = messages
    content: str = last["content"]
    beginnings = [content[:end] for end in range(min(len(content) - 1, LONGEST_BEGINNING), -1, -1)]
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
    """Convert a chat to plain messages; an empty list for a text, or what cannot be converted."""
    try:
        return [] if isinstance(prompt, str) else plain_messages(prompt)
    except (TypeError, ValueError, KeyError, AttributeError):
        return []


@dataclass(frozen=True)
class Originals:
    """A file of prompts as JSON, line i for row i of a table; null for a row whose prompt is not known."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.abspath(self.path))

    @classmethod
    def write(cls, path: str | os.PathLike[str], table: ReferenceTable, prompts: Iterable[Prompt]) -> "Originals":
        """Write those prompts that the table knows; of several with the same row, the first."""
        lines = ["null"] * len(table)
        for prompt in prompts:
            row = int(table.find([prompt])[0])
            if row >= 0 and lines[row] == "null":
                lines[row] = json.dumps(prompt if isinstance(prompt, str) else plain_messages(prompt))
        write_file(path, "".join(f"{line}\n" for line in lines))
        return cls(os.path.abspath(path))

    def __call__(self, rows: Int64[np.ndarray, " G"]) -> list[Prompt | None]:
        """Read the calibrated prompt of each row."""
        data, ends = self._file
        begins = np.concatenate([[0], ends[:-1] + 1])
        if len(rows) and not rows.max() < len(ends):
            raise ValueError(f"{self.path} has {len(ends)} prompts, got row {rows.max()}: it is of another table")
        return [json.loads(data[begins[row] : ends[row]]) for row in rows.tolist()]

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    @cached_property
    def _file(self) -> tuple[mmap.mmap, Int64[np.ndarray, " P"]]:
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data, np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))


@dataclass(frozen=True, eq=False)
class RunPrompts:
    """The calibrated prompts of a table that lies in its run directory: from the Parquet files there."""

    table: ReferenceTable
    directory: Path

    @classmethod
    def beside(cls, table: ReferenceTable) -> "RunPrompts | None":
        """Find the run directory that a table lies in, by its run.json; None for a table that stands alone."""
        if not table.path:
            return None
        at = Path(table.path)
        return next((cls(table, folder) for folder in (at, at.parent) if (folder / "run.json").is_file()), None)

    def __call__(self, rows: Int64[np.ndarray, " G"]) -> list[Prompt | None]:
        """Look up the prompt of each row."""
        return [self._prompts.get(key) for key in self.table.keys(rows)]

    def items(self) -> Iterator[tuple[bytes, Prompt]]:
        """Read key and prompt of each from the columns that calibration writes; a chat is there as JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Other names, such as "00000 (1).parquet", are copies that somebody synchronises.
        for file in sorted(path for path in self.directory.glob("prompts/*.parquet") if path.stem.isdecimal()):
            try:
                names = ["key", "prompt", "chat"]
                columns = pq.ParquetFile(file, page_checksum_verification=True).read(names).to_pydict()
            except (pa.ArrowException, OSError, KeyError) as error:
                raise ValueError(
                    f"{file} must hold a run's prompts, got a file that cannot be read ({error})"
                ) from error
            for key, text, is_chat in zip(columns["key"], columns["prompt"], columns["chat"], strict=True):
                yield key, json.loads(text) if is_chat else text

    @cached_property
    def _prompts(self) -> dict[bytes, Prompt]:
        return dict(self.items())
