"""Prompts from any source: files, folders, datasets and iterables, each prompt as a trainer would read it.

The key of a prompt must be that of what a trainer hands to its reward function, so the prompt of a row is what TRL
makes of the row. Rows are read one at a time, each with the place that an error names.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import KEY_BYTES, Prompt, canonical_chat, start_of

ID_COLUMN = "prompt_id"
# As datasets names the files of a split: train-00000-of-00002.parquet.
_SPLIT_FILE = re.compile(r"(.+?)-\d+-of-\d+")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Few, since a row may be a prompt with a hundred completions.
_BATCH = 256


class Asked(NamedTuple):
    """A prompt, and the id by which the trainer's data know it, if they do."""

    prompt: Prompt
    id: Any = None


class Row(NamedTuple):
    """A row of a source and its place: `prompts.jsonl, line 17`, or `row 16`, counted from 0."""

    place: str
    value: Any


def prompts_from(
    source: Any,
    *,
    column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Iterator[Asked]:
    """Read the prompts of a source one at a time, the first `limit` of them; refuse a row without one, by its place.

    A source is anything that `read_rows` takes. It holds texts, lists of messages, `Asked`s, or rows. The prompt of a
    row is by default what TRL would make of it: of `chosen` and `rejected` messages without a prompt of that kind, the
    turns that both begin with; else the column `prompt`; else `messages` up to the assistant's last. The id is that of
    `id_column`, or of `prompt_id` where there is such a column. A repeated prompt is yielded again.

    >>> [*prompts_from([{"question": "2+2=", "n": 7}], column="question", id_column="n")]
    [Asked(prompt='2+2=', id=7)]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"prompts_from needs limit >= 1, got limit={limit}")
    return islice((parse_row(row, column, id_column) for row in read_rows(source, split)), limit)


def parse_row(row: Row, column: str | None = None, id_column: str | None = None) -> Asked:
    """Take the prompt and its id out of a row.

    >>> parse_row(Row("row 0", {"prompt": "Hi", "prompt_id": "a"}))
    Asked(prompt='Hi', id='a')
    """
    place, value = row
    if isinstance(value, Mapping):
        for name in ("image", "images"):
            if has_value(value.get(name)):
                raise TypeError(f"{place}: prompts are kept as JSON, which has no pictures, got column {name!r}")
        prompt = parse_prompt(_find_prompt(value, column, place), place)
        identifier = value.get(ID_COLUMN) if id_column is None else get_column(value, id_column, place)
        if id_column is not None and not has_value(identifier):
            raise ValueError(f"{place} needs an id in its column {id_column!r}, got {identifier!r}")
        return Asked(prompt, _parse_id(identifier, place))
    if column is not None or id_column is not None:
        raise TypeError(f"{place} has no column {column or id_column!r}, it is {start_of(value)}")
    if isinstance(value, Asked):
        return Asked(parse_prompt(value.prompt, place), _parse_id(value.id, place))
    return Asked(parse_prompt(value, place))


def parse_prompt(value: Any, place: str) -> Prompt:
    """Convert a text or messages to plain JSON values; refuse what is neither, and a prompt without content."""
    listed = isinstance(value, list | tuple | np.ndarray)
    if not isinstance(value, str) and (not listed or (len(value) and isinstance(value[0], str | list | tuple))):
        hint = " (a row is one prompt; one that has an id is Asked(prompt, id))" if listed else ""
        raise TypeError(f"{place}: a prompt is a text or a list of messages, got {start_of(value)}{hint}")
    prompt: str | list[dict[str, Any]] = parse_messages(value, place) if listed else to_json(value, place)
    if not (prompt.strip() if isinstance(prompt, str) else any(map(_has_content, prompt))):
        raise ValueError(f"{place}: a prompt says something, got {start_of(value)}")
    return prompt


def parse_messages(value: Any, place: str) -> list[dict[str, Any]]:
    """Convert messages to plain JSON values; name the place of what is no message."""
    if not len(value):
        return []
    if isinstance(value[0], Mapping) and "role" not in value[0] and "from" in value[0]:
        raise ValueError(f"{place}: messages have role and content, got from and value (trl.maybe_convert_to_chatml)")
    try:
        canonical = canonical_chat(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None
    mappings = all(isinstance(message, Mapping) for message in value)
    return [to_json(message, place) for message in (value if mappings else json.loads(canonical))]


def to_json(value: Any, place: str) -> Any:
    """Convert a value to plain JSON: without members that are None, which Arrow adds, and arrays as lists.

    >>> to_json({"role": "user", "content": "Hi", "name": None}, "row 0")
    {'role': 'user', 'content': 'Hi'}
    """
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{place}: a text has whole characters, got half of one in {start_of(value)}")
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {to_json(name, place): to_json(member, place) for name, member in value.items() if member is not None}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return [to_json(member, place) for member in value]
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None or isinstance(plain, bool | int | float):
        return plain
    raise TypeError(f"{place}: rollouts are kept as JSON, which has no {type(value).__name__}: {start_of(value)}")


def get_column(row: Mapping[str, Any], column: str, place: str) -> Any:
    """Look up a column of a row; list the row's columns if it is not there."""
    if column not in row:
        raise ValueError(f"{place} has no column {column!r}, it has {', '.join(map(str, row))}")
    return row[column]


def has_value(value: Any) -> bool:
    """Tell a value from what stands for a missing one.

    >>> [has_value(value) for value in (None, [], float("nan"), 0)]
    [False, False, False, True]
    """
    missing = value is None or (isinstance(value, float) and value != value)
    return not missing and not (isinstance(value, list | tuple | np.ndarray) and not len(value))


def _find_prompt(row: Mapping[str, Any], column: str | None, place: str) -> Any:
    """Choose the prompt of a row by its columns, as TRL does."""
    if column is None and "chosen" in row and "rejected" in row:
        return _shared_turns(row, place)
    if column is None and not {"prompt", "messages"} & {*row}:
        hint = "; a list of messages is one row" if "role" in row and "content" in row else ""
        raise ValueError(
            Message(
                f"{place} has no column prompt, chosen and rejected, or messages, it has {', '.join(map(str, row))}: "
                f"name the prompt's with {setting('column')}{hint}"
            )
        )
    column = column or ("prompt" if "prompt" in row else "messages")
    value = get_column(row, column, place)
    if column == "messages":  # without the assistant's last words, if the chat ends with them
        last = value[-1] if _is_chat(value) else None
        return value[:-1] if isinstance(last, Mapping) and last.get("role") == "assistant" else value
    # A file of this library has messages as JSON.
    key = row.get("key")
    ours = isinstance(key, bytes) and len(key) == KEY_BYTES and row.get("chat") is True
    return json.loads(value) if ours and isinstance(value, str) else value


def _shared_turns(row: Mapping[str, Any], place: str) -> Any:
    """Find the prompt of a preference pair, as `trl.maybe_extract_prompt` does.

    Refused are texts without a prompt: TRL would cut them where their letters differ, in the middle of a word.
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
    one, other = (parse_messages(messages, place) for messages in (chosen, rejected))
    shortest = min(len(one), len(other))
    shared = next((i for i in range(shortest) if one[i] != other[i]), shortest - 1)
    if not shared:
        raise ValueError(
            f"{place}: chosen and rejected begin with the same turns, got {start_of(one[:1])} in one of them"
        )
    return one[:shared]


def _parse_id(identifier: Any, place: str) -> Any:
    if not has_value(identifier):
        return None
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | np.integer):
        raise TypeError(f"{place}: a prompt id is a str or an int, got {start_of(identifier)}")
    return to_json(identifier, place)


def _is_chat(value: Any) -> bool:
    """Recognise messages as TRL does: a list whose first member has a role."""
    listed = isinstance(value, list | tuple | np.ndarray) and len(value) > 0
    return listed and isinstance(value[0], Mapping) and "role" in value[0]


def _has_content(message: Mapping[str, Any]) -> bool:
    """Find a text that is not blank, a part that is no text, or a tool call in a message."""
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if text.strip() if isinstance(text, str) else text:
            return True
    return bool(message.get("tool_calls"))


def read_rows(source: Any, split: str | None = None) -> Iterator[Row]:
    """Read the rows of a source as they are needed; only a .json file that is one list is read at once.

    A source is the path of a file (.jsonl, .json, .csv or .txt, also with .gz, or .parquet), a folder of such files or
    one that datasets saved, the name of a dataset on the Hub (owner/name, or owner/name:subset), a dataset, a pandas
    DataFrame, or any iterable.

    >>> [*read_rows(["Hi", "Hello"])]
    [Row(place='row 0', value='Hi'), Row(place='row 1', value='Hello')]
    """
    if isinstance(source, str | os.PathLike):
        return _read_named(os.fspath(source), split)
    if _is_instance(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        if split is not None or len(source) != 1:
            _check_split(split, [*map(str, source)], f"a {type(source).__name__}")
        source, split = next(iter(source.values())) if split is None else source[split], None
    if split is not None:
        _check_split(split, [], f"a {type(source).__name__}")
    if _is_instance(source, "datasets", "Dataset", "IterableDataset"):
        source = source.with_format(None)  # plain values, whatever its user has set
    elif _is_instance(source, "pandas", "DataFrame"):
        names, values = source.columns, source.itertuples(index=False, name=None)
        source = (dict(zip(names, row, strict=True)) for row in values)
    elif isinstance(source, Mapping | bytes | Set):
        raise TypeError(
            "a source is a path, a dataset or an iterable of rows (a mapping is one row, a set has no order, bytes are "
            f"no path), got {start_of(source)}"
        )
    try:
        rows: Iterable[Any] = iter(source)
    except TypeError:
        raise TypeError(
            f"a source is a path, a dataset, a DataFrame or an iterable of rows, got {start_of(source)}"
        ) from None
    return (Row(f"row {i}", value) for i, value in enumerate(rows))


def _read_named(name: str, split: str | None) -> Iterator[Row]:
    """Read a folder, a file, or a dataset on the Hub, whichever has this name."""
    path = Path(name)
    if os.path.isdir(name):  # unlike Path's, these say no to a text too long for a name
        return _read_folder(path, split)
    if os.path.exists(name):
        if split is not None:
            _check_split(split, [], f"the file {name}")
        return _read_file(path)
    if _find_reader(path) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{start_of(name)} is no file or folder with prompts, and no name on the Hub")
    import datasets

    repository, _, subset = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, name=subset or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        error.add_note(f"{name} is no file or folder here, so it was looked for on the Hub (owner/name:subset)")
        raise
    return (Row(f"{name}, {place}", value) for place, value in read_rows(dataset))


def _read_folder(path: Path, split: str | None) -> Iterator[Row]:
    if any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        import datasets

        return (Row(f"{path}, {place}", value) for place, value in read_rows(datasets.load_from_disk(str(path)), split))
    if (path / "run.json").exists():
        raise ValueError(
            f"a run of calibrate has its prompts in {path / 'prompts'} and its rollouts beside, got {path}"
        )
    own = (file for file in path.iterdir() if not file.name.startswith(".") and file.name != "export.json")
    files = sorted(file for file in own if _find_reader(file))  # an export is described beside its rows
    if not files:
        raise ValueError(f"a folder of rows has files that end in {', '.join(_READERS)}, got none in {path}")
    matches = [_SPLIT_FILE.match(file.name) for file in files]
    splits = sorted({match[1] for match in matches if match})
    if split is not None or len(splits) > 1:
        _check_split(split, splits, str(path))
        files = [file for file, match in zip(files, matches, strict=True) if match and match[1] == split]
    return chain.from_iterable(map(_read_file, files))


def _check_split(split: str | None, splits: list[str], source: str) -> None:
    if not splits:
        raise ValueError(Message(f"{source} has no splits: leave out {setting('split', str(split))}"))
    if split not in splits:
        choices = ", ".join(splits)
        raise ValueError(
            Message(f"{source} has the splits {choices}, name one of them; got {setting('split', str(split))}")
        )


def _read_file(path: Path) -> Iterator[Row]:
    reader = _find_reader(path)
    if reader is None:
        raise ValueError(f"a file of rows ends in {', '.join(_READERS)} (or one of these and .gz), got {path}")
    return reader(path)


def _find_reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    name = path.name.lower()
    reader = _READERS.get(Path(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and reader is _read_parquet else reader


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(gzip.open(path)) if path.name.lower().endswith(".gz") else open(path, "rb")


def _read_lines(path: Path) -> Iterator[Row]:
    """Read the lines of a UTF-8 text; only a line feed ends one, since other separators may stand in a prompt."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield Row(f"{path}, line {number}", text.removesuffix("\n").removesuffix("\r"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number} is not UTF-8: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: no whole gzip file, {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    return (Row(place, _parse_json(text, place)) for place, text in _read_lines(path) if text.strip())


def _read_json(path: Path) -> Iterator[Row]:
    """Read a list of rows, or, as many tools write under this name, a row a line."""
    first = next((text for _, text in _read_lines(path) if text.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    text = "\n".join(line for _, line in _read_lines(path))
    for i, value in enumerate(_parse_json(text, f"{path} (a file with a list a line is .jsonl)")):
        yield Row(f"{path}, row {i}", value)


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}: {start_of(text)}") from error


def _read_csv(path: Path) -> Iterator[Row]:
    # Quoted values run over several lines, so the reader of lines will not do.
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{len(reader.fieldnames or ())} values in the header, other than here")
                yield Row(f"{path}, line {reader.line_num}", row)
        except (csv.Error, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, line {reader.line_num} is no CSV in UTF-8: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for value in batch.to_pylist():
                    yield Row(f"{path}, row {number}", value)
                    number += 1
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet from row {number} on: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_lines,
}


def _is_instance(source: object, library: str, *classes: str) -> bool:
    """Compare with classes of a library without loading it: an object of it means that it is loaded."""
    module = sys.modules.get(library)
    members = vars(module) if module else {}
    return isinstance(source, tuple(members[name] for name in classes if name in members))
