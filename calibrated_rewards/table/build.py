"""Build a table from rows in any order, in memory that does not grow with the scores."""

from __future__ import annotations

import io
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

from calibrated_rewards.prompts import Prompt, as_key, start_of
from calibrated_rewards.table.search import Content, InMemory, halves, locate, starts
from calibrated_rewards.table.storage import reopen, write_table

_SPOOL_BYTES = 1 << 20


class Row(NamedTuple):
    """One prompt, the scores of its reference rollouts, and its aliases: other prompts that lead to the same row.

    A prompt, and an alias, is a text, a message list, or a key already (16 bytes): the alias of an id is `id_key(7)`,
    that of a rendered chat template is the rendered text.
    """

    prompt: Prompt | bytes
    scores: Any
    aliases: Sequence[Prompt | bytes] = ()


def build(
    rows: Iterable[Any],
    path: str | os.PathLike[str] | None,
    meta: Mapping[str, Any],
    duplicates: str,
    lengths: Iterable[int] = (),
) -> Content:
    """Build the content of a table of these rows: in memory, or on disk at `path`, through a temporary file there."""
    if duplicates not in ("error", "pool"):
        raise ValueError(f"duplicates is 'error' or 'pool', got {duplicates!r}")
    meta_text = _as_json(meta)
    if path is None:
        with io.BytesIO() as file:
            gathered = _gather(_spool(rows, file, lengths), duplicates)
            scores = gathered.read(0, len(gathered.groups) - 1)
            for column in (scores, *gathered.columns.values()):
                column.flags.writeable = False  # views of it are handed out
            return InMemory(gathered.columns, scores, meta_text)
    Path(path).mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=path, buffering=0) as file:
        gathered = _gather(_spool(rows, file, lengths, os.fspath(path)), duplicates)
        digest = write_table(path, gathered.columns, int(gathered.offsets[-1]), meta_text, gathered.read)
    return reopen(os.fspath(path), digest, None)  # another writer may have replaced it already


def _as_json(meta: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(meta), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must be what JSON can say, got {start_of(meta)}: {error}") from None


def as_row(item: Any, position: int) -> Row:
    """Read one item of a caller's rows as a Row."""
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise TypeError(f"row {position} must be (prompt, scores) or (prompt, scores, aliases), got {start_of(item)}")
    return Row(*item)


def rows_of(content: Content) -> Iterator[Row]:
    """Yield the rows of a table by ascending key, with their aliases, read a megabyte at a time."""
    keys = np.stack([content.column("keys_high"), content.column("keys_low")], axis=1)
    aliases = np.stack([content.column("alias_high"), content.column("alias_low")], axis=1)
    by_row = np.argsort(content.column("alias_rows"), kind="stable")
    owners = content.column("alias_rows")[by_row]
    step = max(1, _SPOOL_BYTES * content.prompts // (4 * content.total))
    for first in range(0, content.prompts, step):
        numbers = np.arange(first, min(first + step, content.prompts))
        flat = content.read(first, first + len(numbers))
        begins = starts(content, np.append(numbers, numbers[-1] + 1))
        spans = np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right")
        for number, begin, end, *span in zip(numbers, begins - begins[0], begins[1:] - begins[0], *spans, strict=False):
            others = tuple(key.astype(">u8").tobytes() for key in aliases[by_row[slice(*span)]])
            yield Row(keys[number].astype(">u8").tobytes(), flat[begin:end], others)


def lengths_of(*contents: Content) -> set[int]:
    """Return the lengths of all text prompts of some tables."""
    return {length for content in contents for length in content.column("lengths").tolist()}


def sorted_scores(scores: Any) -> Float32[np.ndarray, " K"]:
    """Sort one prompt's reference scores into a row of a table: float32, finite, without -0.0.

    >>> sorted_scores([2, -1.5, -0.0]).tolist()
    [-1.5, 0.0, 2.0]
    """
    if "torch" in sys.modules and isinstance(scores, sys.modules["torch"].Tensor):
        scores = scores.detach().float().cpu().numpy()
    if isinstance(scores, np.ma.MaskedArray):
        raise TypeError("scores must not be a masked array: give the unmasked ones")
    numbers = np.asarray(scores)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "fiub":
        raise ValueError(f"a row needs a list of K >= 1 numbers, got shape {numbers.shape} of {numbers.dtype}")
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is refused below
        row = numbers.astype(np.float32)
    row += 0.0  # -0.0 becomes 0.0: they are equal, and equal content is equal bytes
    row.sort()
    if not (np.isfinite(row[0]) and np.isfinite(row[-1])):  # nan is sorted last
        with np.errstate(over="ignore"):
            position = int(np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))[0])
        raise ValueError(f"scores must be finite in float32, got {numbers[position]} at position {position}")
    return row


@dataclass
class _Spool:
    """Rows in order of arrival: their sorted scores in `file`, and all else in memory, some 50 bytes a row."""

    file: io.BytesIO | io.FileIO
    lengths: set[int]
    place: str = ""
    """The directory that the file is in."""
    keys: bytearray = field(default_factory=bytearray)
    counts: array[int] = field(default_factory=lambda: array("q"))
    alias_keys: bytearray = field(default_factory=bytearray)
    alias_owners: array[int] = field(default_factory=lambda: array("q"))
    pending: bytearray = field(default_factory=bytearray)

    def add(self, row: Row) -> None:
        if isinstance(row.aliases, str | bytes):
            raise TypeError(f"aliases are a list of prompts or keys, got {start_of(row.aliases)}")
        names = list(row.aliases)
        key, aliases, scores = as_key(row.prompt), [as_key(alias) for alias in names], sorted_scores(row.scores)
        for text in (row.prompt, *names):
            if isinstance(text, str):
                self.lengths.add(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")))
        self.alias_keys += b"".join(aliases)
        self.alias_owners.extend([len(self.counts)] * len(aliases))
        self.keys += key
        self.counts.append(len(scores))
        self.pending += scores.data.cast("B")
        if len(self.pending) >= _SPOOL_BYTES:
            self.flush()

    def flush(self) -> None:
        rest = memoryview(self.pending)
        try:
            while rest:  # a raw file may take less than all of it, and say why at the next try
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, f"a table cannot be written: {error.strerror}", self.place) from error
        self.pending = bytearray()


def _spool(rows: Iterable[Any], file: io.BytesIO | io.FileIO, lengths: Iterable[int], place: str = "") -> _Spool:
    """Take all rows one at a time; an error about a row names its position and the start of its prompt."""
    from tqdm import tqdm

    spool = _Spool(file, set(lengths), place)
    for position, item in enumerate(tqdm(rows, desc="reference table", unit=" prompts", delay=3, disable=None)):
        row = as_row(item, position)
        try:
            spool.add(row)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"row {position}, {start_of(row.prompt)}: {error}") from error
    spool.flush()
    if not spool.counts:
        raise ValueError("a table needs at least one prompt, got none")
    return spool


@dataclass(frozen=True)
class _Gathered:
    """The rows of a spool by ascending key: row i is made of the arrivals `order[groups[i]:groups[i + 1]]`."""

    file: io.BytesIO | io.FileIO
    columns: dict[str, np.ndarray]
    order: Int64[np.ndarray, " A"]
    groups: Int64[np.ndarray, " edges"]
    begins: Int64[np.ndarray, " begins"]
    offsets: Int64[np.ndarray, " edges"]

    def read(self, first: int, last: int) -> Float32[np.ndarray, " _"]:
        """Return the scores of rows first to last - 1, read and not mapped: mapped pages would count as our memory."""
        offsets = (self.offsets[first : last + 1] - self.offsets[first]).tolist()
        groups = self.groups[first : last + 1].tolist()
        flat = np.empty(offsets[-1], np.float32)
        arrivals = self.order[groups[0] : groups[-1]]
        begins, sizes = self.begins[arrivals], self.begins[arrivals + 1] - self.begins[arrivals]
        at, memory = 0, flat.data.cast("B")
        for begin, size in zip((4 * begins).tolist(), (4 * sizes).tolist(), strict=True):
            self.file.seek(begin)
            at += self.file.readinto(memory[at : at + size])
        if at != flat.nbytes:
            raise OSError(f"the temporary file of a table must keep its {flat.nbytes} bytes, got {at} back")
        if len(self.order) != len(self.groups) - 1:
            for row in np.flatnonzero(np.diff(groups) > 1):
                flat[offsets[row] : offsets[row + 1]].sort()
        return flat


def _gather(spool: _Spool, duplicates: str) -> _Gathered:
    high, low = halves(spool.keys)
    spool.keys.clear()
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    new = _mark_first(high, low)
    if duplicates == "error" and not new.all():
        twice = int(np.flatnonzero(~new)[0])
        first, second = sorted(order[twice - 1 : twice + 1].tolist())
        key = f"{high[twice]:016x}{low[twice]:016x}"
        raise ValueError(
            f"rows {first} and {second} have the same prompt, key {key}; duplicates='pool' would pool them"
        )
    groups = np.append(np.flatnonzero(new), len(order))
    counts = np.frombuffer(spool.counts, dtype=np.int64)
    sizes = np.add.reduceat(counts[order], groups[:-1])
    offsets = np.append(0, np.cumsum(sizes))
    high, low = high[new], low[new]
    columns = {
        "keys_high": high,
        "keys_low": low,
        "offsets": offsets if (sizes != sizes[0]).any() else offsets[:0],
        "lengths": np.array(sorted(spool.lengths), dtype=np.int64),
    }
    columns |= _alias_columns(spool, high, low, order, new)
    return _Gathered(spool.file, columns, order, groups, np.append(0, np.cumsum(counts)), offsets)


def _alias_columns(
    spool: _Spool, high: Any, low: Any, order: Int64[np.ndarray, " A"], first: Bool[np.ndarray, " A"]
) -> dict[str, np.ndarray]:
    """Sort the aliases and drop those that add nothing; an alias that leads to two prompts is refused."""
    alias_high, alias_low = halves(spool.alias_keys)
    if not len(alias_high):
        return {"alias_high": alias_high, "alias_low": alias_low, "alias_rows": np.empty(0, dtype=np.int64)}
    row_of = np.empty(len(order), dtype=np.int64)
    row_of[order] = np.cumsum(first) - 1
    rows = row_of[np.frombuffer(spool.alias_owners, dtype=np.int64)]
    by_key = np.lexsort((rows, alias_low, alias_high))
    alias_high, alias_low, rows = alias_high[by_key], alias_low[by_key], rows[by_key]
    new = _mark_first(alias_high, alias_low)
    prompt = locate(high, low, alias_high, alias_low)
    targets = np.where(prompt < 0, rows[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))], prompt)
    if (clash := np.flatnonzero(targets != rows)).size:
        owners = [int(np.flatnonzero(row_of == row)[0]) for row in (targets[clash[0]], rows[clash[0]])]
        key = f"{alias_high[clash[0]]:016x}{alias_low[clash[0]]:016x}"
        raise ValueError(
            f"an alias must lead to one prompt, got key {key} for those of rows {min(owners)} and {max(owners)}"
        )
    keep = new & (prompt < 0)
    return {"alias_high": alias_high[keep], "alias_low": alias_low[keep], "alias_rows": rows[keep]}


def _mark_first(high: Any, low: Any) -> Bool[np.ndarray, " A"]:
    """Mark the sorted keys that differ from the one before."""
    new = np.ones(len(high), dtype=bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return new
