"""From ranks to rewards: a transform with its estimator is one vector of 2K + 1 values, for each K that a table has.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> from calibrated_rewards.theory.transforms import Log
>>> table = ReferenceTable.build([("p", [0.0, 1.0, 2.0, 3.0])])
>>> lookup = Lookup(table, Log())
>>> rows = table.rows(["p", "p"])
>>> index = lookup.index(rows, np.array([2.0, 9.0]))
>>> index, lookup.u(rows, index), lookup.values(rows, index).round(3)
(array([5, 8]), array([0.625, 1.   ]), array([-0.47,  0.  ]))

From raw scores to rewards, where every score has its row; and what an unknown prompt is worth."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reward.calibrators import Calibration, EmpiricalCDF, Uncalibrated
from calibrated_rewards.reward.find_prompts import keys_of
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.transforms import Identity, Transform, moments


@dataclass(frozen=True, eq=False)
class Lookup:
    """The value of each index i = 2 below + equal, in each row of a table."""

    table: ReferenceTable
    transform: Transform
    """At the scale that is wanted."""
    estimator: Estimator = "empirical"
    tolerance: float = 0.0
    """References this near to a score are equal to it (`EmpiricalCDF`)."""

    def index(self, rows: Any, scores: Any) -> Int64[np.ndarray, "*P"]:
        """2 below + equal: all that the references tell of a score."""
        if self.tolerance:
            given = np.asarray(scores)
            each = np.repeat(rows, given[0].size if len(given) else 1)
            u = EmpiricalCDF(self.tolerance)(self.table, each, given.ravel())
            return np.asarray(np.rint(2 * self.table.counts(each) * u), np.int64).reshape(given.shape)
        below, equal = self.table.ranks(rows, scores)
        return np.asarray(2 * below + equal)

    def u(self, rows: Any, index: Int64[np.ndarray, "*P"]) -> Float64[np.ndarray, "*P"]:
        """The quantile (Eq. 12)."""
        return np.asarray(index / _beside(2 * self.table.counts(rows), index))

    def values(self, rows: Any, index: Int64[np.ndarray, "*P"]) -> Float64[np.ndarray, "*P"]:
        """The rewards."""
        vectors, begins = self.vectors
        return np.asarray(vectors[_beside(begins[rows], index) + index])

    @cached_property
    def vectors(self) -> tuple[Float64[np.ndarray, " V"], Int64[np.ndarray, " P"]]:
        """The values of all K, one vector after another, and where that of each row begins."""
        each, which = np.unique(self.table.counts(np.arange(len(self.table))), return_inverse=True)
        begins = np.concatenate([[0], np.cumsum(2 * each + 1)[:-1]])
        return np.concatenate([_vector(cast(Hashable, self.transform), int(K), self.estimator) for K in each]), begins[
            which
        ]


@lru_cache(maxsize=1024)
def _vector(transform: Any, K: int, estimator: Estimator) -> Float64[np.ndarray, " _"]:
    """One vector, worked out once: some take a second."""
    return values(transform, K, estimator)


def _beside(each: Int64[np.ndarray, " P"], index: Int64[np.ndarray, "*P"]) -> Int64[np.ndarray, "..."]:
    """A number for each row, in the shape in which it meets the responses of that row."""
    return each.reshape(-1, *[1] * (index.ndim - 1))


OnMissing: TypeAlias = Literal["raise", "neutral", "skip"] | Callable[[Sequence[Prompt]], ReferenceTable]


class Valued(NamedTuple):
    """Rewards, quantiles, and of which prompts there were references."""

    value: Float64[np.ndarray, "*P"]
    u: Float64[np.ndarray, "*P"]
    known: Bool[np.ndarray, " P"]


@dataclass(frozen=True, eq=False)
class Valuing:
    """Calibration and transform, for the table's own rows and for those of tables that come later."""

    table: ReferenceTable
    transform: Transform
    """At the scale that is wanted."""
    estimator: Estimator
    calibration: Calibration
    on_missing: OnMissing

    def __post_init__(self) -> None:
        if isinstance(self.calibration, EmpiricalCDF | Uncalibrated):
            return
        if self.estimator != "empirical":
            raise ValueError(f'{self.calibration!r} needs estimator="empirical": the others are of ranks')
        if self.on_missing == "neutral":
            raise ValueError(f'on_missing="neutral" needs EmpiricalCDF, whose mean is known, got {self.calibration!r}')

    @property
    def by_rank(self) -> bool:
        """Whether a lookup vector says it all."""
        return isinstance(self.calibration, EmpiricalCDF)

    @cached_property
    def lookup(self) -> Lookup:
        """That of the table's own rows."""
        return self._lookup(self.table)

    @cached_property
    def neutral(self) -> float:
        """The mean of the transform under the reference policy."""
        return moments(self.transform)[0] if self.by_rank else 0.0

    def __call__(
        self, rows: Int64[np.ndarray, " P"], raw: Shaped[np.ndarray, "P ..."], prompts: Callable[[int], Prompt]
    ) -> Valued:
        """The rewards of scores for these rows; `prompts(i)` says which prompt the unknown row i is of."""
        known = rows >= 0
        if known.all():
            return Valued(*self._of(self.lookup, rows, raw), known)
        if not np.isfinite(raw).all():
            raise ValueError(f"raw scores are finite, got {raw[~np.isfinite(raw)].ravel()[0]}")
        uncalibrated = isinstance(self.calibration, Uncalibrated)
        value = raw.astype(np.float64) if uncalibrated else np.full(raw.shape, self.neutral)
        u = np.full(raw.shape, 0.5)
        value[known], u[known] = self._of(self.lookup, rows[known], raw[known])
        if callable(self.on_missing):
            asked = [prompts(int(at)) for at in np.flatnonzero(~known)]
            drawn = self.on_missing([*dict(zip(keys_of(asked), asked, strict=True)).values()])
            value[~known], u[~known] = self._of(self._lookup(drawn), drawn.rows(asked), raw[~known])
            known = np.ones_like(known)
        return Valued(value, u, known)

    def _of(self, lookup: Lookup, rows: Any, raw: Any) -> tuple[Any, Any]:
        index = lookup.index(rows, raw)
        u = lookup.u(rows, index)
        if self.by_rank:
            return lookup.values(rows, index), u
        if isinstance(self.calibration, Uncalibrated):
            return raw.astype(np.float64), u
        each = raw[0].size if len(raw) else 1
        placed = self.calibration(lookup.table, np.repeat(rows, each), raw.ravel())
        if not isinstance(self.transform, Identity) and not ((placed >= 0) & (placed <= 1)).all():
            raise ValueError(
                f"{self.transform!r} is for quantiles, {self.calibration!r} gives other numbers: Identity()"
            )
        return self._finite(np.asarray(self.transform(placed))).reshape(raw.shape), u

    def _finite(self, values: Float64[np.ndarray, " _"]) -> Float64[np.ndarray, " _"]:
        if not np.isfinite(values).all():
            raise ValueError(f"a reward is finite, {self.transform!r} of {self.calibration!r} is not")
        return values

    def _lookup(self, table: ReferenceTable) -> Lookup:
        tolerance = self.calibration.tolerance if isinstance(self.calibration, EmpiricalCDF) else 0.0
        return Lookup(table, self.transform, self.estimator, tolerance)
