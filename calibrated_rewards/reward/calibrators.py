"""Calibrators compare a raw score with its prompt's references: the paper's quantile (Eq. 12), and others to compare.

A calibrator is any callable `(table, rows, scores) -> values`, one value a score, where `rows` has the table row of
each score. `EmpiricalCDF` alone depends on nothing but the order of scores (Lemma 3): whatever strictly increasing map
a reward model is put through, its values stay. Each of the others says what it depends on.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> table = ReferenceTable.build([("easy", [7.0, 8.0, 9.0, 9.0]), ("hard", [-3.0, -1.0, 0.0, 2.0])])
>>> rows, scores = table.rows(["easy", "easy", "hard"]), np.array([7.5, 9.0, 1.0])
>>> EmpiricalCDF()(table, rows, scores)
array([0.25, 0.75, 0.75])
>>> ZScore()(table, rows, scores).round(3)
array([-0.905,  0.905,  0.832])
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from scipy.special import expit, log_expit

from calibrated_rewards.table.reference_table import ReferenceTable

Array: TypeAlias = npt.NDArray[np.float64]


@runtime_checkable
class Calibration(Protocol):
    """Compares a score with the references of its prompt."""

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Compute the value of each score among the references of its row; larger is better."""


@dataclass(frozen=True)
class EmpiricalCDF:
    """The quantile (below + equal / 2) / K (Eq. 12); a reference within `tolerance` of the score counts as equal.

    In [0, 1]; without tolerance it depends on the order alone, and tensors come back as tensors on their device. A
    tolerance is measured in the reward model's units, so it is lost under every map but a shift. It is the plainest
    answer to reward models that give equal responses unequal scores ("Discretizing Reward Models", arXiv 2606.21795,
    has the diagnosis, and another cure: clusters by Monte-Carlo dropout).

    >>> from calibrated_rewards.table.reference_table import ReferenceTable
    >>> table = ReferenceTable.build([("p", [0.0, 1.0, 1.25, 2.0])])
    >>> EmpiricalCDF()(table, table.rows(["p"]), [1.0]), EmpiricalCDF(tolerance=0.25)(table, table.rows(["p"]), [1.0])
    (array([0.375]), array([0.5]))
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not (isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"EmpiricalCDF needs a finite tolerance >= 0, got tolerance={self.tolerance!r}.")

    def __call__(self, table: ReferenceTable, rows: Any, scores: Any) -> Any:
        """Return the quantiles, in the kind of array that the scores came in."""
        return _in_blocks(self._within, table, rows, scores) if self.tolerance else table.cdf(rows, scores)

    def _within(self, scores: Float[np.ndarray, "b 1"], references: Float[np.ndarray, "b K"]) -> Array:
        gap = scores - references
        # Scores are rounded to float32, so what is 0.1 apart in decimals is 0.1 to a unit in the last place here.
        slack = 2.0**-23 * np.maximum(np.abs(scores), np.abs(references))
        return np.asarray(np.where(np.abs(gap) <= self.tolerance + slack, 0.5, gap > 0).mean(axis=1))


@dataclass(frozen=True)
class SmoothedCDF:
    """mean_k sigmoid((r - z_k) / temperature): PAR (arXiv 2502.18770); with K = 1 CGPO's (arXiv 2409.20370).

    Under a Bradley-Terry reward model and temperature 1, the chance to be preferred to a reference. In [0, 1]. A shift
    of all scores changes nothing; a scale does (it is a temperature), and so does every other increasing map.
    As the temperature falls to 0 it becomes `EmpiricalCDF()`.

    >>> from calibrated_rewards.table.reference_table import ReferenceTable
    >>> table = ReferenceTable.build([("p", [0.0, 1.0])])
    >>> SmoothedCDF()(table, table.rows(["p"]), [1.0]).round(4)
    array([0.6155])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"SmoothedCDF needs a finite temperature > 0, got temperature={self.temperature!r}.")

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return the smoothed quantiles."""
        return _in_blocks(self._preferred, table, rows, scores)

    def _preferred(self, scores: Float[np.ndarray, "b 1"], references: Float[np.ndarray, "b K"]) -> Array:
        return np.asarray(_sigmoid(scores - references, self.temperature).mean(axis=1))


@dataclass(frozen=True)
class ZScore:
    """(r - mean) / sd of the prompt's references, 0 where they are all equal.

    GRPO's advantage (arXiv 2402.03300) with references in place of the group. Any real number. A shift and a positive
    scale of all scores change nothing; any other increasing map does, and one stray reference shrinks all values.

    >>> from calibrated_rewards.table.reference_table import ReferenceTable
    >>> table = ReferenceTable.build([("p", [1.0, 3.0])])
    >>> ZScore()(table, table.rows(["p"]), [4.0])
    array([2.])
    """

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return the standardised scores."""
        return _in_blocks(self._standardised, table, rows, scores)

    def _standardised(self, scores: Float[np.ndarray, "b 1"], references: Float[np.ndarray, "b K"]) -> Array:
        # Exactly 0 for equal references: float64 adds up 2^29 equal float32 numbers without rounding.
        gap, sd = scores[:, 0] - references.mean(axis=1), references.std(axis=1)
        return np.where(sd > 0, gap / np.where(sd > 0, sd, 1.0), 0.0)


@dataclass(frozen=True)
class MedianCentered:
    """sigmoid((r - median) / scale): our reading of InfAlign's "calibration based on the median rewards per-prompt".

    That is all section 5.5 says of it. Ours: under a Bradley-Terry reward model, hence scale 1, the chance to be
    preferred to the median reference. `scale="mad"` divides by the median absolute deviation instead (where that is 0
    the sigmoid is a step). In [0, 1]. A shift changes nothing, with "mad" nor does a positive scale; any other
    increasing map does.

    >>> from calibrated_rewards.table.reference_table import ReferenceTable
    >>> table = ReferenceTable.build([("p", [0.0, 1.0, 5.0])])
    >>> MedianCentered()(table, table.rows(["p"]), [3.0]).round(4)
    array([0.8808])
    """

    scale: float | Literal["mad"] = 1.0

    def __post_init__(self) -> None:
        if self.scale == "mad":
            return
        if isinstance(self.scale, str) or not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f'MedianCentered needs a finite scale > 0 or "mad", got scale={self.scale!r}.')

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return the chance to be preferred to the median."""
        return _in_blocks(self._preferred, table, rows, scores)

    def _preferred(self, scores: Float[np.ndarray, "b 1"], references: Float[np.ndarray, "b K"]) -> Array:
        median = np.median(references, axis=1)
        gap = scores[:, 0] - median
        if self.scale == "mad":
            return _sigmoid(gap, np.median(np.abs(references - median[:, None]), axis=1))
        return _sigmoid(gap, self.scale)


@dataclass(frozen=True)
class LogSigmoidAtQuantile:
    """log sigmoid(r - z), z the references' q-quantile: the LSC transformation of Wang et al. (arXiv 2402.00742).

    Under a Bradley-Terry reward model, the log of the chance to be preferred to a response as good as that; sums over
    reward models mean "good by all of them". The quantile is `table.icdf`, a reference's own score; q = .85 is the
    value in PAR's re-implementation, which takes the quantile of a fitted normal instead. In (-inf, 0]. A shift changes
    nothing; a scale does, and so does every other increasing map.

    >>> from calibrated_rewards.table.reference_table import ReferenceTable
    >>> table = ReferenceTable.build([("p", [0.0, 1.0, 2.0, 3.0])])
    >>> LogSigmoidAtQuantile(q=0.5)(table, table.rows(["p"]), [1.0]).round(4)
    array([-0.6931])
    """

    q: float = 0.85

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 1:
            raise ValueError(f"LogSigmoidAtQuantile needs a q in [0, 1], got q={self.q!r}.")

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return the log-chances."""
        each_row, rounded = _check_scores(rows, scores)
        return np.asarray(log_expit(rounded - table.icdf(each_row, np.full(len(rounded), self.q))), np.float64)


@dataclass(frozen=True)
class Uncalibrated:
    """The raw score as it is, in float64: what calibrated rewards are compared with.

    `dataclasses.replace(reward, calibration=Uncalibrated(), beta=None)` is the reward without calibration: the same
    scorer, table, prompt lookup and logs, and the raw score in place of the transformed quantile. Its transform,
    estimator and scale are not applied; a beta belongs to the unit of its reward, so the old one means nothing here.
    Every map of the scores, a shift or a scale too, changes it by just that map.

    >>> from calibrated_rewards.table.reference_table import ReferenceTable
    >>> table = ReferenceTable.build([("p", [0.0, 1.0, 2.0, 3.0])])
    >>> Uncalibrated()(table, table.rows(["p"]), [1.5])
    array([1.5])
    """

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return the scores."""
        return np.asarray(scores, np.float64)


def _in_blocks(
    value: Callable[[Array, Array], Array], table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike
) -> Float[np.ndarray, " G"]:
    """Compute value(scores (b, 1), references (b, K)) for chunks of rows with equally many references."""
    each_row, rounded = _check_scores(rows, scores)
    values = np.empty(len(rounded))
    for positions, references in table.blocks(each_row):
        values[positions] = value(rounded[positions, None], references.astype(np.float64))
    return values


def _check_scores(rows: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Int[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """Convert scores as the table compares them: rounded to float32, for arithmetic in float64."""
    if not isinstance(scores, np.ndarray | list | tuple):
        raise TypeError(
            "this calibration needs numpy scores (EmpiricalCDF() without tolerance takes tensors), "
            f"got {type(scores).__name__}"
        )
    if np.asarray(scores).dtype.kind not in "fiub":
        raise TypeError(f"scores must be real numbers, got {np.asarray(scores).dtype}")
    with np.errstate(over="ignore"):
        rounded = np.asarray(scores).astype(np.float32).astype(np.float64)
    if rounded.ndim != 1 or rounded.shape != np.shape(rows):
        raise ValueError(
            f"scores need one axis and a row each, got shapes {rounded.shape} and {np.shape(rows)} of rows"
        )
    if not np.isfinite(rounded).all():
        at = int(np.argmin(np.isfinite(rounded)))
        raise ValueError(f"scores must be finite in float32, got {scores[at]} at position {at}")
    return np.asarray(rows), rounded


def _sigmoid(gap: Array, scale: float | Array) -> Array:
    """sigmoid(gap / scale), with 0/0 = 0: a step where the scale is 0."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.asarray(expit(np.where(gap == 0, 0.0, gap / scale)))
