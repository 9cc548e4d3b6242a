"""What each row of a table is like, in a dozen numbers: one pass, in memory that does not grow with K."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt64

from calibrated_rewards.table.reference_table import ReferenceTable


class RowStatistics(NamedTuple):
    """A number for each row of the table, in its order."""

    size: Int64[np.ndarray, " P"]
    lowest: Float32[np.ndarray, " P"]
    lower_quartile: Float32[np.ndarray, " P"]
    median: Float32[np.ndarray, " P"]
    upper_quartile: Float32[np.ndarray, " P"]
    highest: Float32[np.ndarray, " P"]
    mean: Float64[np.ndarray, " P"]
    variance: Float64[np.ndarray, " P"]
    """Unbiased; nan where K = 1."""
    at_lowest: Int64[np.ndarray, " P"]
    """How many references equal the row's lowest."""
    at_highest: Int64[np.ndarray, " P"]
    distinct: Int64[np.ndarray, " P"]
    """How many values there are among the references."""
    u_variance: Float64[np.ndarray, " P"]
    """K times the variance of a calibrated reward, on the mean over the row's own responses: 1/6 without ties."""
    u_middle: Float64[np.ndarray, " P"]
    """The same, of the response in the row's middle: 1/4 without ties."""
    digest: UInt64[np.ndarray, " P"]
    """Rows of other scores have another one, but for one pair in 2^64."""

    @property
    def discrete(self) -> bool:
        """Whether ties are the rule: half of the prompts or more have at most half as many values as references."""
        return bool(np.median(self.distinct / self.size) <= 0.5)


def row_statistics(table: ReferenceTable) -> RowStatistics:
    """Reads every row once, a megabyte at a time.

    >>> table = ReferenceTable.build([("a", [0.0, 1.0, 1.0, 5.0])])
    >>> found = row_statistics(table)
    >>> [float(x[0]) for x in (found.median, found.highest, found.at_highest, found.distinct)]
    [1.0, 5.0, 1.0, 3.0]
    """
    columns: list[np.ndarray] = [np.empty(len(table), _dtype(name)) for name in RowStatistics._fields]
    for rows, scores in table.blocks(np.arange(len(table))):
        for column, values in zip(columns, _of(scores), strict=True):
            column[rows] = values
    return RowStatistics(*columns)


_WIDE = ("mean", "variance", "u_variance", "u_middle")


def _dtype(name: str) -> type:
    if name in ("size", "at_lowest", "at_highest", "distinct"):
        return np.int64
    return {"digest": np.uint64, **dict.fromkeys(_WIDE, np.float64)}.get(name, np.float32)


def _of(scores: Float32[np.ndarray, "b K"]) -> RowStatistics:
    """The statistics of rows of one size."""
    K, wide = scores.shape[1], scores.astype(np.float64)
    means = wide.mean(axis=1)
    squares = ((wide - means[:, None]) ** 2).sum(axis=1)
    u_variance = _u_variance(scores)
    return RowStatistics(
        np.full(len(scores), K),
        scores[:, 0],
        _quantile(wide, 0.25),
        _quantile(wide, 0.5),
        _quantile(wide, 0.75),
        scores[:, -1],
        means,
        squares / (K - 1) if K > 1 else np.full(len(scores), np.nan),
        (scores == scores[:, :1]).sum(axis=1),
        (scores == scores[:, -1:]).sum(axis=1),
        1 + (scores[:, 1:] != scores[:, :-1]).sum(axis=1),
        u_variance.mean(axis=1),
        u_variance[:, K // 2],
        _digests(scores),
    )


def _u_variance(scores: Float32[np.ndarray, "b K"]) -> Float64[np.ndarray, "b K"]:
    """K times the variance of (below + equal / 2) / K, for each reference as a response: a tie counts a half in it.

    Of a response that ties with the share p of the others and beats the share F that is F + p/4 - (F + p/2)^2. One
    that ties with none has the middle of its K-th of [0, 1] for its F.
    """
    K = scores.shape[1]
    place = np.broadcast_to(np.arange(K), scores.shape)
    differs, edge = scores[:, 1:] != scores[:, :-1], np.ones((len(scores), 1), bool)
    below = np.maximum.accumulate(np.where(np.hstack([edge, differs]), place, 0), axis=1)
    last = np.where(np.hstack([differs, edge]), place + 1, K)
    equal = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1] - below
    u, tied = (below + equal / 2) / K, np.where(equal > 1, equal / K, 0.0)
    # Without ties the mean of u (1 - u) is 1/6 exactly: over a K-th it is its middle's less 1 / 12 K^2.
    spread: Float64[np.ndarray, "b K"] = u * (1 - u) - tied / 4 - (equal == 1) / (12 * K * K)
    return spread


def _quantile(scores: Float64[np.ndarray, "b K"], u: float) -> Float32[np.ndarray, " b"]:
    """Between the order statistics on both sides of it, as numpy's; never beyond float32's largest on the way."""
    at = u * (scores.shape[1] - 1)
    low, high = scores[:, int(at)], scores[:, int(np.ceil(at))]
    between: Float32[np.ndarray, " b"] = (low + (high - low) * (at - int(at))).astype(np.float32)
    return between


def _digests(scores: Float32[np.ndarray, "b K"]) -> UInt64[np.ndarray, " b"]:
    """A random linear form of the bits of each row, modulo 2^64."""
    factors = np.random.default_rng(0).integers(1 << 63, size=scores.shape[1], dtype=np.uint64) * 2 + 1
    bits = np.ascontiguousarray(scores).view(np.uint32)
    mixed: UInt64[np.ndarray, " b"] = bits.astype(np.uint64) @ factors
    return mixed
