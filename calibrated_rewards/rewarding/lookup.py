"""From ranks to rewards: a transform with its estimator is one vector of 2K + 1 values, for each K that a table has.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> from calibrated_rewards.theory.transforms import Log
>>> table = ReferenceTable.build([("p", [0.0, 1.0, 2.0, 3.0])])
>>> lookup = Lookup(table, Log())
>>> rows = table.rows(["p", "p"])
>>> index = lookup.index(rows, np.array([2.0, 9.0]))
>>> index, lookup.u(rows, index), lookup.values(rows, index).round(3)
(array([5, 8]), array([0.625, 1.   ]), array([-0.47,  0.  ]))
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
from jaxtyping import Float64, Int64

from calibrated_rewards.calibrations import EmpiricalCDF
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.transforms import Transform


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
