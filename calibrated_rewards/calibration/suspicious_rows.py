"""Statistics of each row of a table, and the rows that do not look like the others.

Suspicious rows are faults, prompts that teach nothing, and samples of reward hacking. What counts as far out is learnt
from the table itself (`limit`), so that heavy tails alone are no fault: in a table without one, a row is listed about
one time in ten where scores or prompts' means have Student's t with 3 degrees of freedom, and hardly ever where they
are normal.
"""

from collections.abc import Iterator
from math import log2
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Float64, Int64, UInt64

from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.search import tie_spans


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
    """The number of references that equal the row's lowest."""
    at_highest: Int64[np.ndarray, " P"]
    distinct: Int64[np.ndarray, " P"]
    """The number of different values among the references."""
    u_variance: Float64[np.ndarray, " P"]
    """K times the variance of a calibrated reward, on the mean over the row's own responses: 1/6 without ties."""
    u_middle: Float64[np.ndarray, " P"]
    """The same, of the response in the row's middle: 1/4 without ties."""
    digest: UInt64[np.ndarray, " P"]
    """A digest of the scores: different rows share one with a chance of 2^-64."""

    @property
    def discrete(self) -> bool:
        """True if ties are the rule: half of the prompts or more have at most half as many values as references."""
        return bool(np.median(self.distinct / self.size) <= 0.5)


def describe_rows(table: ReferenceTable) -> RowStatistics:
    """Compute the statistics of every row, which is read once, a megabyte at a time.

    >>> table = ReferenceTable.build([("a", [0.0, 1.0, 1.0, 5.0])])
    >>> rows = describe_rows(table)
    >>> [float(x[0]) for x in (rows.median, rows.highest, rows.at_highest, rows.distinct)]
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
    """Compute the statistics of rows of one size."""
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
    """Return K times the variance of (below + equal / 2) / K for each reference as a response; a tie counts a half.

    Of a response that ties with the share p of the others and beats the share F that is F + p/4 - (F + p/2)^2. One
    that ties with none has the middle of its K-th of [0, 1] for its F.
    """
    K, (below, upto) = scores.shape[1], tie_spans(scores)
    equal = upto - below
    u, tied = (below + equal / 2) / K, np.where(equal > 1, equal / K, 0.0)
    # Without ties the mean of u (1 - u) is 1/6 exactly: over a K-th it is its middle's less 1 / 12 K^2.
    return np.asarray(u * (1 - u) - tied / 4 - (equal == 1) / (12 * K * K))


def _quantile(scores: Float64[np.ndarray, "b K"], u: float) -> Float32[np.ndarray, " b"]:
    """Interpolate between order statistics as numpy does, without overflow of float32 on the way."""
    at = u * (scores.shape[1] - 1)
    low, high = scores[:, int(at)], scores[:, int(np.ceil(at))]
    return np.asarray((low + (high - low) * (at - int(at))).astype(np.float32))


def _digests(scores: Float32[np.ndarray, "b K"]) -> UInt64[np.ndarray, " b"]:
    """Compute a random linear form of the bits of each row, modulo 2^64."""
    factors = np.random.default_rng(0).integers(1 << 63, size=scores.shape[1], dtype=np.uint64) * 2 + 1
    bits = np.ascontiguousarray(scores).view(np.uint32)
    return np.asarray(bits.astype(np.uint64) @ factors)


Array: TypeAlias = npt.NDArray[np.float64]
Column: TypeAlias = npt.NDArray[np.float32]

# Robust standard deviations of the prompts' medians, and spreads of a row, within which nothing is ever far out.
FAR_MEDIAN, FAR_SCORE = 6.0, 8.0
_FEWEST_ROWS = 100


class Suspicion(NamedTuple):
    """A row with the reason for which it is suspicious."""

    row: int
    reason: str
    """One of a few: "all equal", "far above", ..."""
    detail: str
    """The numbers behind the reason."""


def find_suspicious_rows(table: ReferenceTable, rows: RowStatistics) -> list[Suspicion]:
    """List everything that is odd about any row, reason by reason, worst first; a row can be there more than once."""
    return [
        *_far_scores("far above", rows.highest, _in_spreads(rows.highest, rows.median, rows), rows),
        *_far_scores("far below", rows.lowest, _in_spreads(rows.median, rows.lowest, rows), rows),
        *_far_medians(rows),
        *_same_scores(table, rows),
        *_few_values(rows),
        *_few_references(rows),
    ]


def limit(values: npt.ArrayLike, least: float) -> float:
    """Compute the size from which a value is an outlier among the others, `least` or more.

    The largest of P values of one law should exceed it one time in a hundred. The tail of the law is a generalised
    Pareto one from the 90 % quantile on, by the quantiles at 95 % and 97.5 %, which know nothing of what is beyond.
    From fewer than some thousands its shape is mostly taken to be 1/3, that of Student's t with 3 degrees of freedom
    (the normal's is 0); from fewer than 100 nothing can be said, and it is 5 `least`.
    """
    P = np.size(values)
    if P < _FEWEST_ROWS:
        return 5 * least
    low, middle, high = np.quantile(np.asarray(values, np.float64), [0.9, 0.95, 0.975]).tolist()
    if not low < middle:
        return least
    seen, guessed = P / 40, 100
    observed = log2((high - middle) / (middle - low)) if middle < high else 0.0
    shape = min(max((seen * observed + guessed / 3) / (seen + guessed), 0.01), 1.0)
    beyond = ((0.1 * P / 0.01) ** shape - 1) / (2**shape - 1)
    return float(max(least, low + (middle - low) * beyond))


def _far_scores(reason: str, scores: Column, far: Array, rows: RowStatistics) -> Iterator[Suspicion]:
    """Yield prompts with a score far from the rest: a sample of reward hacking, or a numeric fault."""
    for row in _beyond(far, FAR_SCORE):
        yield Suspicion(row, reason, f"{scores[row]:.6g}, the prompt's median is {rows.median[row]:.6g}")


def _far_medians(rows: RowStatistics) -> Iterator[Suspicion]:
    """Yield prompts whose median score is far from the other prompts'."""
    median = rows.median.astype(np.float64)
    middle = np.median(median)
    spread = 1.4826 * np.median(np.abs(median - middle))
    far = np.abs(median - middle) / spread if spread > 0 else np.zeros_like(median)
    for row in _beyond(far, FAR_MEDIAN):
        detail = f"{median[row]:.6g}, {far[row]:.1f} robust sd from the others' {middle:.6g}"
        yield Suspicion(row, "far median", detail)


def _same_scores(table: ReferenceTable, rows: RowStatistics) -> Iterator[Suspicion]:
    """Yield prompts whose scores are another prompt's, one by one: one prompt under two keys, or a fault in a join.

    Rows with fewer than 4 values, or ties in half of them, can be equal by chance and do not count.
    """
    order = np.argsort(rows.digest, kind="stable")
    order = order[((rows.distinct >= 4) & (rows.distinct > rows.size / 2))[order]]
    like_previous = np.append(False, rows.digest[order[1:]] == rows.digest[order[:-1]]) if len(order) else order
    for position in np.flatnonzero(like_previous):
        first, second = int(order[position - 1]), int(order[position])
        if np.array_equal(table.scores(first), table.scores(second)):
            yield Suspicion(second, "same scores", f"all {rows.size[second]} are those of row {first}")


def _few_values(rows: RowStatistics) -> Iterator[Suspicion]:
    """Yield prompts with one score, and with less than a value for 4 references, where ties are not the rule."""
    if rows.discrete:
        return
    for row in sorted(np.flatnonzero((rows.distinct == 1) & (rows.size > 1)), key=lambda row: -rows.size[row]):
        yield Suspicion(int(row), "all equal", f"{rows.size[row]} references of {rows.median[row]:.6g}")
    share = rows.distinct / rows.size
    for row in sorted(np.flatnonzero((share < 0.25) & (rows.distinct > 1)), key=lambda row: share[row]):
        usual = f"{100 * np.median(share):.0f} %"
        yield Suspicion(
            int(row), "few values", f"{rows.distinct[row]} of {rows.size[row]}; the median prompt has {usual}"
        )


def _few_references(rows: RowStatistics) -> Iterator[Suspicion]:
    """Yield prompts with less than half of the median number of references."""
    usual = np.median(rows.size)
    for row in sorted(np.flatnonzero(rows.size < usual / 2), key=lambda row: rows.size[row]):
        yield Suspicion(int(row), "few references", f"{rows.size[row]}; the median prompt has {usual:.0f}")


def _in_spreads(high: Column, low: Column, rows: RowStatistics) -> Array:
    """Return high - low in units of the row's interquartile range; or, where ties make that small, of the usual one.

    The usual one is a quarter of the median range of a row. Without either there is nothing to compare with: 0.
    """
    lowest, lower, upper, highest, a, b = (
        column.astype(np.float64)
        for column in (rows.lowest, rows.lower_quartile, rows.upper_quartile, rows.highest, low, high)
    )
    spread = np.maximum(upper - lower, np.median(highest - lowest) / 4)
    return np.divide(b - a, spread, out=np.zeros_like(spread), where=spread > 0)


def _beyond(far: Array, least: float) -> list[int]:
    """Return the rows beyond the limit, the farthest first."""
    rows = np.flatnonzero(far > limit(far, least))
    return [int(row) for row in rows[np.argsort(-far[rows], kind="stable")]]
