"""Rows from anywhere, one at a time, each with the place that an error names: files, folders, datasets, iterables."""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import start_of

# As datasets names the files of a split: train-00000-of-00002.parquet.
_SHARD = re.compile(r"(.+?)-\d+-of-\d+")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Few, since a row may be a prompt with a hundred completions.
_BATCH = 256


class Row(NamedTuple):
    """Something that a source holds, and where: `prompts.jsonl, line 17`, or `row 16`, counted from 0."""

    place: str
    value: Any


def rows(source: Any, split: str | None = None) -> Iterator[Row]:
    """What a source holds, read as it is needed; only a .json file that is one list is read at once.

    A source is the path of a file (.jsonl, .json, .csv or .txt, also with .gz, or .parquet), a folder of such files or
    one that datasets saved, the name of a dataset on the Hub (owner/name, or owner/name:subset), a dataset, a pandas
    DataFrame, or any iterable.

    >>> [*rows(["Hi", "Hello"])]
    [Row(place='row 0', value='Hi'), Row(place='row 1', value='Hello')]
    """
    if isinstance(source, str | os.PathLike):
        return _called(os.fspath(source), split)
    if _one_of(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        source, split = _chosen(source, split), None
    if split is not None:
        _check_split(split, [], f"a {type(source).__name__}")
    if _one_of(source, "datasets", "Dataset", "IterableDataset"):
        source = source.with_format(None)  # plain values, whatever its user has set
    elif _one_of(source, "pandas", "DataFrame"):
        source = _rows_of_frame(source)
    elif isinstance(source, Mapping | bytes | Set):
        raise TypeError(
            "a source is a path, a dataset or an iterable of rows (a mapping is one row, a set has no order, bytes are "
            f"no path), got {start_of(source)}"
        )
    return _numbered(_iterator(source))


def readable_again(source: Any) -> bool:
    """Whether `rows` of a source can be read a second time; an iterator is used up by the first."""
    return not isinstance(source, Iterator)


def _called(name: str, split: str | None) -> Iterator[Row]:
    """The rows of what has this name: a folder, a file, or a dataset on the Hub."""
    path = Path(name)
    if os.path.isdir(name):  # unlike Path's, these say no to a text too long for a name
        return _folder(path, split)
    if os.path.exists(name):
        if split is not None:
            _check_split(split, [], f"the file {name}")
        return _file(path)
    if _reader(path) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{start_of(name)} is no file or folder with prompts, and no name on the Hub")
    return _on_hub(name, split)


def _on_hub(name: str, split: str | None) -> Iterator[Row]:
    import datasets

    repository, _, subset = name.partition(":")
    try:
        found = datasets.load_dataset(repository, name=subset or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        error.add_note(f"{name} is no file or folder here, so it was looked for on the Hub (owner/name:subset)")
        raise
    return (Row(f"{name}, {place}", value) for place, value in rows(found))


def _folder(path: Path, split: str | None) -> Iterator[Row]:
    if any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        import datasets

        return (Row(f"{path}, {place}", value) for place, value in rows(datasets.load_from_disk(str(path)), split))
    if (path / "run.json").exists():
        raise ValueError(
            f"a run of calibrate has its prompts in {path / 'prompts'} and its rollouts beside, got {path}"
        )
    files = sorted(file for file in path.iterdir() if _reader(file) and not file.name.startswith("."))
    if not files:
        raise ValueError(f"a folder of rows has files that end in {', '.join(_READERS)}, got none in {path}")
    shards = [_SHARD.match(file.name) for file in files]
    splits = sorted({shard[1] for shard in shards if shard})
    if split is not None or len(splits) > 1:
        _check_split(split, splits, str(path))
        files = [file for file, shard in zip(files, shards, strict=True) if shard and shard[1] == split]
    return (row for file in files for row in _file(file))


def _chosen(splits: Mapping[Any, Any], split: str | None) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    _check_split(split, [*map(str, splits)], f"a {type(splits).__name__}")
    return splits[split]


def _check_split(split: str | None, splits: list[str], where: str) -> None:
    if not splits:
        raise ValueError(Message(f"{where} has no splits: leave out {setting('split', str(split))}"))
    if split not in splits:
        raise ValueError(
            Message(f"{where} has the splits {', '.join(splits)}, name one of them; got {setting('split', str(split))}")
        )


def _file(path: Path) -> Iterator[Row]:
    reader = _reader(path)
    if reader is None:
        raise ValueError(f"a file of rows ends in {', '.join(_READERS)} (or one of these and .gz), got {path}")
    return reader(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    name = path.name.lower()
    packed = name.endswith(".gz")
    reader = _READERS.get(Path(name.removesuffix(".gz")).suffix)
    return None if packed and reader is _rows_of_parquet else reader


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(gzip.open(path)) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a UTF-8 text without their ends; only a line feed ends one, since others may stand in a prompt."""
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


def _rows_of_lines(path: Path) -> Iterator[Row]:
    return (Row(place, _parsed(text, place)) for place, text in _lines(path) if text.strip())


def _rows_of_json(path: Path) -> Iterator[Row]:
    """A list of rows, or what many tools write under this name as well: a row a line."""
    first = next((text for _, text in _lines(path) if text.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _rows_of_lines(path)
        return
    listed = _parsed("\n".join(text for _, text in _lines(path)), f"{path} (a file with a list a line is .jsonl)")
    for i, value in enumerate(listed):
        yield Row(f"{path}, row {i}", value)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}: {start_of(text)}") from error


def _rows_of_csv(path: Path) -> Iterator[Row]:
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


def _rows_of_parquet(path: Path) -> Iterator[Row]:
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
    ".jsonl": _rows_of_lines,
    ".json": _rows_of_json,
    ".parquet": _rows_of_parquet,
    ".csv": _rows_of_csv,
    ".txt": _lines,
}


def _rows_of_frame(frame: Any) -> Iterator[Any]:
    return (dict(zip(frame.columns, values, strict=True)) for values in frame.itertuples(index=False, name=None))


def _iterator(source: Any) -> Iterator[Any]:
    try:
        return iter(source)
    except TypeError:
        raise TypeError(
            f"a source is a path, a dataset, a DataFrame or an iterable of rows, got {start_of(source)}"
        ) from None


def _numbered(values: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"row {i}", value) for i, value in enumerate(values))


def _one_of(source: object, library: str, *names: str) -> bool:
    """Whether a thing is of a library, which is loaded if it is."""
    module = sys.modules.get(library)
    loaded = vars(module) if module else {}
    return isinstance(source, tuple(loaded[name] for name in names if name in loaded))
