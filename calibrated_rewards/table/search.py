"""What a table holds, and how it is searched: keys among sorted keys, scores in sorted rows, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64, Shaped, UInt64

# The positions, probes and answers of one chunk stay in the second-level cache; see benchmarks/lookup.py.
_CHUNK = 2048
_BLOCK_SCORES = 1 << 18


@runtime_checkable
class Content(Protocol):
    """The arrays of a table, in memory or mapped; `touch` comes before any use of `scores`."""

    @property
    def path(self) -> str | None:
        """The directory that it is mapped from."""

    @property
    def prompts(self) -> int:
        """P."""

    @property
    def total(self) -> int:
        """The number of all scores."""

    @property
    def meta(self) -> str:
        """The caller's meta, as JSON."""

    @property
    def scores(self) -> np.ndarray:
        """All rows, one after the other."""

    def column(self, name: str) -> np.ndarray:
        """One of `table_format.COLUMNS`, empty where the table has none."""

    def touch(self, rows: np.ndarray) -> None:
        """Make sure that the scores of these rows are what was written."""

    def read(self, first: int, last: int) -> np.ndarray:
        """The scores of rows first to last - 1, for a pass over all rows."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """The content of a table that was built without a path."""

    columns: Mapping[str, np.ndarray]
    scores: Float32[np.ndarray, " T"]
    meta: str
    path: None = None

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.columns["keys_high"])

    @property
    def total(self) -> int:
        """The number of all scores."""
        return len(self.scores)

    def column(self, name: str) -> Shaped[np.ndarray, " _"]:
        """One of `table_format.COLUMNS`, empty where the table has none."""
        return self.columns[name]

    def touch(self, rows: Int[np.ndarray, " B"]) -> None:
        """Nothing to check: nobody else has these arrays."""

    def read(self, first: int, last: int) -> Float32[np.ndarray, " _"]:
        """The scores of rows first to last - 1."""
        begin, end = (int(start) for start in starts(self, np.array([first, last])))
        return self.scores[begin:end]


def halves(keys: Sequence[bytes] | bytearray) -> tuple[UInt64[np.ndarray, " P"], UInt64[np.ndarray, " P"]]:
    """Keys of 16 bytes as two big-endian integers each, whose order is the order of the bytes.

    >>> halves([bytes(15) + bytes([2])])
    (array([0], dtype=uint64), array([2], dtype=uint64))
    """
    data = keys if isinstance(keys, bytearray) else b"".join(keys)
    pairs = np.frombuffer(data, dtype=">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def locate(
    high: UInt64[np.ndarray, " P"],
    low: UInt64[np.ndarray, " P"],
    wanted_high: UInt64[np.ndarray, " G"],
    wanted_low: UInt64[np.ndarray, " G"],
) -> Int64[np.ndarray, " G"]:
    """The position of each wanted key among the sorted keys, -1 where it is not there."""
    if not len(high):
        return np.full(len(wanted_high), -1)
    order = np.argsort(
        wanted_high
    )  # neighbours end their search in the same cache lines: twice as fast in large tables
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.searchsorted(high, wanted_high[order])
    while True:
        at = np.minimum(position, len(high) - 1)
        same = (position < len(high)) & (high[at] == wanted_high)
        smaller = same & (low[at] < wanted_low)  # another key with the same high half: rare, but it must not be missed
        if not smaller.any():
            return np.where(same & (low[at] == wanted_low), position, -1)
        position = position + smaller


def starts(content: Content, rows: Int[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
    """Where each row starts in the flat scores; row P starts at their end."""
    offsets = content.column("offsets")
    return offsets[rows] if len(offsets) else rows * (content.total // content.prompts)


def sizes(content: Content, rows: Int[np.ndarray, " B"]) -> Int64[np.ndarray, "*B"]:
    """K of each row, or one K where all rows have the same."""
    offsets = content.column("offsets")
    return offsets[rows + 1] - offsets[rows] if len(offsets) else np.array(content.total // content.prompts)


def aligned(
    prompts: int, rows: Any, values: Any
) -> tuple[Int64[np.ndarray, " B"], Shaped[np.ndarray, " B"], tuple[int, ...]]:
    """Row numbers in range and a value for each, from (P,) with (P,) or with (P, G), and the shape of the values."""
    values, rows = np.asarray(values), checked_rows(rows, prompts)
    if values.shape[:1] != rows.shape:
        raise ValueError(f"rows of shape (P,) go with (P,) or (P, G), got {rows.shape} with {values.shape}")
    if values.dtype.kind not in "fiub":
        raise TypeError(f"scores and quantiles must be real numbers, got {values.dtype}")
    return np.repeat(rows, values[0].size) if values.ndim > 1 and len(rows) else rows, values.ravel(), values.shape


def checked_rows(rows: Any, prompts: int) -> Int64[np.ndarray, " B"]:
    """Row numbers as int64, refused out of 0..P-1: -1 is what `find` says of an unknown prompt, not the last row."""
    given = np.asarray(rows)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TypeError(f"rows must be a list of whole numbers, got shape {given.shape} of {given.dtype}")
    given = given.astype(np.int64, copy=False)
    if given.size and not 0 <= given.min() <= given.max() < prompts:
        place = int(np.flatnonzero((given < 0) | (given >= prompts))[0])
        raise IndexError(f"rows must be within 0..{prompts - 1}, got {given[place]} at position {place}")
    return given


def finite(scores: Shaped[np.ndarray, " B"], shape: tuple[int, ...]) -> Float32[np.ndarray, " B"]:
    """Scores as the float32 that they are compared in."""
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused
        single = scores.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise ValueError(f"scores must be finite in float32, got {_first(scores, ~np.isfinite(single), shape)}")
    return single


def quantiles(u: Shaped[np.ndarray, " B"], shape: tuple[int, ...]) -> Float64[np.ndarray, " B"]:
    """Quantiles as float64, refused outside of [0, 1]."""
    within = (u >= 0) & (u <= 1)
    if not within.all():
        raise ValueError(f"u must be within [0, 1], got {_first(u, ~within, shape)}")
    return u.astype(np.float64, copy=False)


def _first(values: Any, wrong: Any, shape: tuple[int, ...]) -> str:
    place = int(np.flatnonzero(wrong)[0])
    return f"{values[place]} at position {', '.join(str(int(i)) for i in np.unravel_index(place, shape))}"


def counts(content: Content, rows: Any) -> Int64[np.ndarray, " B"]:
    """K of each row."""
    rows = checked_rows(rows, content.prompts)
    return np.broadcast_to(sizes(content, rows), rows.shape).copy()


def ranks(content: Content, rows: Any, scores: Any) -> tuple[Int64[np.ndarray, "*B"], Int64[np.ndarray, "*B"]]:
    """How many references of its row each score is above, and how many it equals."""
    rows, scores, shape = aligned(content.prompts, rows, scores)
    scores = finite(scores, shape)
    content.touch(rows)
    below, equal = np.empty(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for begin in range(0, len(rows), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        _rank_chunk(content, rows[part], scores[part], below[part], equal[part])
    return below.reshape(shape), equal.reshape(shape)


def cdf(content: Content, rows: Any, scores: Any) -> Float64[np.ndarray, "*B"]:
    """Eq. 12: the share of the references that a score is above, ties counting one half."""
    below, equal = ranks(content, rows, scores)
    size = sizes(content, np.asarray(rows, dtype=np.int64))
    share: Float64[np.ndarray, "*B"] = (below + equal / 2) / (
        size.reshape(-1, *[1] * (below.ndim - 1)) if size.ndim else size
    )
    return share


def icdf(content: Content, rows: Any, u: Any) -> Float32[np.ndarray, "*B"]:
    """The smallest reference that has a share of at least u at or below it."""
    rows, u, shape = aligned(content.prompts, rows, u)
    u = quantiles(u, shape)
    content.touch(rows)
    size = sizes(content, rows)
    place = np.ceil(size * u)
    # K u is rounded: 100 (7/100) is above 7 and its ceiling would be 8, though the 7th of 100 has a share of 7/100.
    place -= (place - 1) / size >= u
    place += place / size < u
    found: Float32[np.ndarray, " B"] = content.scores.take(
        starts(content, rows) + np.maximum(place, 1).astype(np.int64) - 1
    )
    return found.reshape(shape)


def blocks(content: Content, rows: Any) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[np.ndarray, "b K"]]]:
    """Chunks of equal K as (positions in `rows`, their scores), of 1 MiB of scores, or one row, at most."""
    rows = checked_rows(rows, content.prompts)
    content.touch(rows)
    size = np.broadcast_to(sizes(content, rows), rows.shape)
    order = np.argsort(size, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(size[order])) + 1) if len(order) else ():
        k = int(size[group[0]])
        step = max(1, _BLOCK_SCORES // k)
        for begin in range(0, len(group), step):
            positions = group[begin : begin + step]
            yield positions, content.scores[starts(content, rows[positions])[:, None] + np.arange(k)]


def _rank_chunk(content: Content, rows: Any, scores: Any, below: Any, equal: Any) -> None:
    start, size = starts(content, rows), sizes(content, rows)
    below[:] = _count(content.scores, start, size, scores, np.less)
    # Most scores equal no reference; only where the next one up is equal is there a second count to make.
    following = content.scores.take(start + np.minimum(below, size - 1))
    tied = np.flatnonzero(following == scores)
    if len(tied):
        size = np.broadcast_to(size, start.shape)[tied]
        upto = _count(content.scores, start[tied], size, scores[tied], np.less_equal)
        equal[tied] = upto - below[tied]


def _count(flat: Any, start: Any, size: Any, scores: Any, before: np.ufunc) -> Any:
    """How many of the `size` sorted numbers from `start` on come before the score: binary search without branches.

    The answer lies in a window that halves, rounding up, with every probe; a window of one is not probed until the end,
    which lets rows of different lengths walk together.
    """
    base, window = start.copy(), size.copy()
    for _ in range(int(window.max() - 1).bit_length()):
        half = window >> 1
        # half = 0 probes the number before the row, or clipped the first of all, to no effect.
        base += before(flat.take(base + (half - 1), mode="clip"), scores) * half
        window = window - half
    return base - start + before(flat.take(base), scores)
