"""A table's arrays: find keys and scores in them, many at a time, and describe them all in ten numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64, Shaped, UInt64

from calibrated_rewards.table.storage import MappedTable

# The positions, probes and answers of one chunk stay in the second-level cache; see benchmarks/lookup.py.
_CHUNK = 2048
_BLOCK_SCORES = 1 << 18
# `describe` reads so many scores at a time, and compares so many scores and prompts.
_CHUNK_SCORES = 1 << 20
_POOLED_SCORES = 1 << 20
_COMPARED_PROMPTS = 4096


@dataclass(frozen=True, eq=False)
class InMemory:
    """The content of a table that was built without a path."""

    columns: Mapping[str, np.ndarray]
    scores: Float32[np.ndarray, " T"]
    meta: str
    path: None = None

    @property
    def prompts(self) -> int:
        """The number of prompts, P, and of rows."""
        return len(self.columns["keys_high"])

    @property
    def total(self) -> int:
        """The number of scores of all prompts."""
        return len(self.scores)

    def column(self, name: str) -> Shaped[np.ndarray, " _"]:
        """Return one of `storage.COLUMNS`, empty where the table has none."""
        return self.columns[name]

    def touch(self, rows: Int[np.ndarray, " B"]) -> None:
        """Check nothing: nobody else has these arrays."""

    def read(self, first: int, last: int) -> Float32[np.ndarray, " _"]:
        """Return the scores of rows first to last - 1."""
        begin, end = (int(start) for start in starts(self, np.array([first, last])))
        return self.scores[begin:end]


Content: TypeAlias = InMemory | MappedTable
"""The arrays of a table; `touch` comes before any use of `scores`."""


def halves(keys: Sequence[bytes] | bytearray) -> tuple[UInt64[np.ndarray, " P"], UInt64[np.ndarray, " P"]]:
    """Split keys of 16 bytes into two big-endian integers each, whose order is the order of the bytes.

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
    """Find the position of each wanted key among the sorted keys, -1 where it is not there."""
    if not len(high):
        return np.full(len(wanted_high), -1)
    order = np.argsort(wanted_high)  # neighbours end their search in the same cache lines: twice as fast
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
    """Return the start of each row in the flat scores; row P starts at their end."""
    offsets = content.column("offsets")
    return offsets[rows] if len(offsets) else rows * (content.total // content.prompts)


def sizes(content: Content, rows: Int[np.ndarray, " B"]) -> Int64[np.ndarray, "*B"]:
    """Return the K of each row, or one K where all rows have the same."""
    offsets = content.column("offsets")
    return offsets[rows + 1] - offsets[rows] if len(offsets) else np.array(content.total // content.prompts)


def align(
    prompts: int, rows: Any, values: Any
) -> tuple[Int64[np.ndarray, " B"], Shaped[np.ndarray, " B"], tuple[int, ...]]:
    """Pair rows of shape (P,) with values of shape (P,) or (P, G): flat rows, flat values, the shape of the values."""
    values, rows = np.asarray(values), check_rows(rows, prompts)
    if values.shape[:1] != rows.shape:
        raise ValueError(f"rows of shape (P,) go with (P,) or (P, G), got {rows.shape} with {values.shape}")
    if values.dtype.kind not in "fiub":
        raise TypeError(f"scores and quantiles must be real numbers, got {values.dtype}")
    return np.repeat(rows, values[0].size) if values.ndim > 1 and len(rows) else rows, values.ravel(), values.shape


def check_rows(rows: Any, prompts: int) -> Int64[np.ndarray, " B"]:
    """Return row numbers as int64, refused out of 0..P-1: -1 means an unknown prompt, not the last row."""
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise TypeError(f"rows must be a list of whole numbers, got shape {rows.shape} of {rows.dtype}")
    rows = rows.astype(np.int64, copy=False)
    if rows.size and not 0 <= rows.min() <= rows.max() < prompts:
        position = int(np.flatnonzero((rows < 0) | (rows >= prompts))[0])
        raise IndexError(f"rows must be within 0..{prompts - 1}, got {rows[position]} at position {position}")
    return np.asarray(rows)


def as_float32(scores: Shaped[np.ndarray, " B"], shape: tuple[int, ...]) -> Float32[np.ndarray, " B"]:
    """Convert scores to the float32 that they are compared in; refuse those that are not finite."""
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused
        single = scores.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise ValueError(f"scores must be finite in float32, got {_show_first(scores, ~np.isfinite(single), shape)}")
    return single


def as_quantiles(u: Shaped[np.ndarray, " B"], shape: tuple[int, ...]) -> Float64[np.ndarray, " B"]:
    """Convert quantiles to float64, refused outside of [0, 1]."""
    within = (u >= 0) & (u <= 1)
    if not within.all():
        raise ValueError(f"u must be within [0, 1], got {_show_first(u, ~within, shape)}")
    return u.astype(np.float64, copy=False)


def _show_first(values: Any, wrong: Any, shape: tuple[int, ...]) -> str:
    position = int(np.flatnonzero(wrong)[0])
    return f"{values[position]} at position {', '.join(str(int(i)) for i in np.unravel_index(position, shape))}"


def counts(content: Content, rows: Any) -> Int64[np.ndarray, " B"]:
    """Return K, the number of references, of each row."""
    rows = check_rows(rows, content.prompts)
    return np.broadcast_to(sizes(content, rows), rows.shape).copy()


def ranks(content: Content, rows: Any, scores: Any) -> tuple[Int64[np.ndarray, "*B"], Int64[np.ndarray, "*B"]]:
    """Count the references of its row that each score is above, and those that it equals."""
    rows, scores, shape = align(content.prompts, rows, scores)
    scores = as_float32(scores, shape)
    content.touch(rows)
    below, equal = np.empty(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for begin in range(0, len(rows), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        _rank_chunk(content, rows[part], scores[part], below[part], equal[part])
    return below.reshape(shape), equal.reshape(shape)


def cdf(content: Content, rows: Any, scores: Any) -> Float64[np.ndarray, "*B"]:
    """Return the share of its references that each score is above, ties counting one half (Eq. 12)."""
    below, equal = ranks(content, rows, scores)
    size = sizes(content, np.asarray(rows, dtype=np.int64))
    return np.asarray((below + equal / 2) / (size.reshape(-1, *[1] * (below.ndim - 1)) if size.ndim else size))


def icdf(content: Content, rows: Any, u: Any) -> Float32[np.ndarray, "*B"]:
    """Return the smallest reference that has a share of at least u at or below it."""
    rows, u, shape = align(content.prompts, rows, u)
    u = as_quantiles(u, shape)
    content.touch(rows)
    size = sizes(content, rows)
    rank = np.ceil(size * u)
    # K u is rounded: 100 (7/100) is above 7 and its ceiling would be 8, though the 7th of 100 has a share of 7/100.
    rank -= (rank - 1) / size >= u
    rank += rank / size < u
    flat = starts(content, rows) + np.maximum(rank, 1).astype(np.int64) - 1
    return np.asarray(content.scores.take(flat)).reshape(shape)


def blocks(content: Content, rows: Any) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[np.ndarray, "b K"]]]:
    """Yield chunks of equal K as (positions in `rows`, their scores), of 1 MiB of scores or one row at most."""
    rows = check_rows(rows, content.prompts)
    content.touch(rows)
    size = np.broadcast_to(sizes(content, rows), rows.shape)
    order = np.argsort(size, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(size[order])) + 1) if len(order) else ():
        k = int(size[group[0]])
        step = max(1, _BLOCK_SCORES // k)
        for begin in range(0, len(group), step):
            positions = group[begin : begin + step]
            yield positions, content.scores[starts(content, rows[positions])[:, None] + np.arange(k)]


def tie_spans(
    ordered: Shaped[np.ndarray, "P K"],
) -> tuple[Int64[np.ndarray, "P K"], Int64[np.ndarray, "P K"]]:
    """Return where each value's run of equal values begins, and where it ends, in rows that are sorted.

    >>> begin, end = tie_spans(np.array([[0.0, 1.0, 1.0, 5.0]]))
    >>> begin.tolist(), end.tolist()
    ([[0, 1, 1, 3]], [[1, 3, 3, 4]])
    """
    differs, edge = ordered[:, 1:] != ordered[:, :-1], np.ones((len(ordered), 1), bool)
    places = np.arange(ordered.shape[1])
    begin = np.maximum.accumulate(np.where(np.hstack([edge, differs]), places, 0), axis=1)
    end = np.where(np.hstack([differs, edge]), places + 1, places.size)
    return begin, np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]


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
    """Count the sorted numbers of each row, `size` from `start` on, before its score: binary search without branches.

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


def describe(content: Content) -> dict[str, float]:
    """Describe a table in ten numbers, in memory that does not grow with the scores.

    - `prompts`; `references` in all, and `references_min`, `_median`, `_max` per prompt
    - `tied_share`: of the references that equal another one of their prompt
    - `prompts_without_resolution`: those whose references are all equal
    - `within_prompt_sd`: the mean standard deviation within a prompt; `between_prompts_sd`: that of the prompts' means
    - `kolmogorov_distance`: the mean over prompts of the largest gap between the prompt's distribution and that of all
      references pooled, which is what a raw score is miscalibrated by. With K references of one and the same
      distribution it is about 0.87 / sqrt(K). From 4,096 prompts or a million references on it is of a sample.
    """
    size = np.broadcast_to(sizes(content, np.arange(content.prompts)), content.prompts)
    columns = zip(*(_statistics(begins, scores) for begins, scores in _chunks(content, size)), strict=True)
    means, variances, tied, constant = map(np.concatenate, columns)
    return {
        "prompts": content.prompts,
        "references": content.total,
        "references_min": int(size.min()),
        "references_median": float(np.median(size)),
        "references_max": int(size.max()),
        "tied_share": int(tied.sum()) / content.total,
        "prompts_without_resolution": int(constant.sum()),
        "within_prompt_sd": float(np.sqrt(variances).mean()) if len(variances) else 0.0,
        "between_prompts_sd": float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        "kolmogorov_distance": _mean_distance(content),
    }


def _chunks(
    content: Content, size: Int64[np.ndarray, " P"]
) -> Iterator[tuple[Int64[np.ndarray, " edges"], Float32[np.ndarray, " _"]]]:
    """Yield runs of rows: the begins of each row with the end of the last, and their scores."""
    step = max(1, _CHUNK_SCORES * content.prompts // content.total)
    for first in range(0, content.prompts, step):
        ends = np.cumsum(size[first : first + step])
        yield np.append(0, ends), content.read(first, first + len(ends))


def _statistics(begins: Int64[np.ndarray, " edges"], scores: Float32[np.ndarray, " _"]) -> tuple[np.ndarray, ...]:
    """Return the mean of each row, the unbiased variance of each with K >= 2, and which scores tie, which rows do."""
    size = np.diff(begins)
    means = np.add.reduceat(scores, begins[:-1], dtype=np.float64) / size
    squares = np.add.reduceat((scores - np.repeat(means, size)) ** 2, begins[:-1])
    like_next = np.append(scores[1:] == scores[:-1], False)
    like_next[begins[1:] - 1] = False  # the next row's first score is no neighbour
    like_previous = np.append(False, like_next[:-1])
    constant = scores[begins[:-1]] == scores[begins[1:] - 1]
    several = size > 1
    variances = squares[several] / (size[several] - 1)
    return means, variances, like_next | like_previous, constant


def _mean_distance(content: Content) -> float:
    """Return the mean of sup |F_prompt - F_pooled|; keys are hashes, so every n-th prompt is a fair sample."""
    pooled_rows = _spread(content.prompts, max(1, _POOLED_SCORES * content.prompts // content.total))
    pooled = np.sort(np.concatenate([matrix.ravel() for _, matrix in blocks(content, pooled_rows)]))
    distances = [
        _distances(matrix, pooled) for _, matrix in blocks(content, _spread(content.prompts, _COMPARED_PROMPTS))
    ]
    return float(np.concatenate(distances).mean())


def _spread(prompts: int, most: int) -> Int64[np.ndarray, " _"]:
    return np.arange(prompts) if prompts <= most else np.linspace(0, prompts - 1, most).astype(np.int64)


def _distances(matrix: Float32[np.ndarray, "b K"], pooled: Float32[np.ndarray, " _"]) -> Float64[np.ndarray, " b"]:
    """Return Kolmogorov distances, which are largest at one of the row's scores or just before it."""
    k = matrix.shape[1]
    last = np.ones(matrix.shape, dtype=bool)
    last[:, :-1] = matrix[:, 1:] != matrix[:, :-1]
    first = np.ones(matrix.shape, dtype=bool)
    first[:, 1:] = last[:, :-1]
    at = np.searchsorted(pooled, matrix, side="right") / len(pooled)
    before = np.searchsorted(pooled, matrix, side="left") / len(pooled)
    rank = np.arange(k)
    above = np.where(last, np.abs(at - (rank + 1) / k), 0.0)
    below = np.where(first, np.abs(before - rank / k), 0.0)
    return np.asarray(np.maximum(above, below).max(axis=1))
