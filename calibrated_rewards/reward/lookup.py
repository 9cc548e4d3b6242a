"""From a rank to a reward: the rank of a score among K references selects one of 2K + 1 values.

A transform with its estimator is one vector of such values for each K that a table has: `Lookup`. `Valuation` also
has rewards for unknown prompts and for calibrations that are not ranks. `RawScores` gives arrays and tensors of a
training loop their rewards, and `DeviceLookup` those on a CUDA device, without waiting for it.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> from calibrated_rewards.theory.transforms import Log
>>> table = ReferenceTable.build([("p", [0.0, 1.0, 2.0, 3.0])])
>>> lookup = Lookup(table, Log())
>>> rows = table.rows(["p", "p"])
>>> index = lookup.index(rows, np.array([2.0, 9.0]))
>>> index, lookup.u(rows, index), lookup.values(rows, index).round(3)
(array([5, 8]), array([0.625, 1.   ]), array([-0.47,  0.  ]))
"""

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reward.calibrators import Calibration, EmpiricalCDF, Uncalibrated
from calibrated_rewards.reward.find_prompts import compute_keys
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.scale import moments
from calibrated_rewards.theory.transforms import Identity, Transform


@dataclass(frozen=True)
class Score:
    """The reward of one completion, and what it came from."""

    reward: float | None
    """The number that a trainer maximises; None where the prompt is unknown and `on_missing="skip"`."""
    raw: float
    """The reward model's score."""
    u: float
    """The quantile among the prompt's references (Eq. 12); one half where the prompt is unknown."""
    known: bool
    """Whether the prompt has references."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The rewards of several completions, and what they came from: a sequence of `Score`."""

    reward: list[float | None]
    raw: Float32[np.ndarray, " n"]
    u: Float64[np.ndarray, " n"]
    known: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, at: int) -> Score:
        return Score(self.reward[at], float(self.raw[at]), float(self.u[at]), bool(self.known[at]))

    def __iter__(self) -> Iterator[Score]:
        return (self[at] for at in range(len(self)))

    @classmethod
    def of(cls, each: list[Score]) -> "Scores":
        """Join the scores of single completions."""
        raw = np.array([score.raw for score in each], np.float32)
        u, known = np.array([score.u for score in each]), np.array([score.known for score in each], np.bool_)
        return cls([score.reward for score in each], raw, u.astype(np.float64), known)


@dataclass(frozen=True, eq=False)
class Lookup:
    """The value of each index i = 2 below + equal, in each row of a table."""

    table: ReferenceTable
    transform: Transform
    """Scaled already."""
    estimator: Estimator = "empirical"
    tolerance: float = 0.0
    """References this near to a score are equal to it (`EmpiricalCDF`)."""

    def index(self, rows: Any, scores: Any) -> Int64[np.ndarray, "*P"]:
        """Compute 2 below + equal, all that the references tell of a score."""
        if self.tolerance:
            scores = np.asarray(scores)
            row_of_each = np.repeat(rows, scores[0].size if len(scores) else 1)
            u = EmpiricalCDF(self.tolerance)(self.table, row_of_each, scores.ravel())
            return np.asarray(np.rint(2 * self.table.counts(row_of_each) * u), np.int64).reshape(scores.shape)
        below, equal = self.table.ranks(rows, scores)
        return np.asarray(2 * below + equal)

    def u(self, rows: Any, index: Int64[np.ndarray, "*P"]) -> Float64[np.ndarray, "*P"]:
        """Compute the quantile (Eq. 12)."""
        return np.asarray(index / _align(2 * self.table.counts(rows), index))

    def values(self, rows: Any, index: Int64[np.ndarray, "*P"]) -> Float64[np.ndarray, "*P"]:
        """Look up the reward of each index."""
        vectors, begins = self.vectors
        return np.asarray(vectors[_align(begins[rows], index) + index])

    @cached_property
    def vectors(self) -> tuple[Float64[np.ndarray, " V"], Int64[np.ndarray, " P"]]:
        """The values of all K, one vector after another, and where that of each row begins."""
        each_k, which = np.unique(self.table.counts(np.arange(len(self.table))), return_inverse=True)
        begins = np.concatenate([[0], np.cumsum(2 * each_k + 1)[:-1]])
        vectors = [_compute_vector(cast(Hashable, self.transform), int(K), self.estimator) for K in each_k]
        return np.concatenate(vectors), begins[which]


@lru_cache(maxsize=1024)
def _compute_vector(transform: Any, K: int, estimator: Estimator) -> Float64[np.ndarray, " _"]:
    """Compute one vector, once: some take a second."""
    return values(transform, K, estimator)


def _align(by_row: Int64[np.ndarray, " P"], index: Int64[np.ndarray, "*P"]) -> Int64[np.ndarray, "..."]:
    """Shape a number for each row so that it broadcasts over the responses of that row."""
    return by_row.reshape(-1, *[1] * (index.ndim - 1))


OnMissing: TypeAlias = Literal["raise", "neutral", "skip"] | Callable[[Sequence[Prompt]], ReferenceTable]


class Rewards(NamedTuple):
    """Rewards, quantiles, and which prompts had references."""

    value: Float64[np.ndarray, "*P"]
    u: Float64[np.ndarray, "*P"]
    known: Bool[np.ndarray, " P"]


@dataclass(frozen=True, eq=False)
class Valuation:
    """Calibration and transform, for the table's own rows and for tables that `on_missing` adds later."""

    table: ReferenceTable
    transform: Transform
    """Scaled already."""
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
        """True if a reward depends on the rank alone, so that the lookup vector has it."""
        return isinstance(self.calibration, EmpiricalCDF)

    @cached_property
    def lookup(self) -> Lookup:
        """The lookup of the table's own rows."""
        return self._make_lookup(self.table)

    @cached_property
    def neutral(self) -> float:
        """The mean of the transform under the reference policy."""
        return moments(self.transform)[0] if self.by_rank else 0.0

    def __call__(
        self, rows: Int64[np.ndarray, " P"], raw: Shaped[np.ndarray, "P ..."], prompts: Callable[[int], Prompt]
    ) -> Rewards:
        """Compute the rewards of scores for these rows; `prompts(i)` gives the prompt of an unknown row i."""
        known = rows >= 0
        if known.all():
            return Rewards(*self._compute(self.lookup, rows, raw), known)
        if not np.isfinite(raw).all():
            raise ValueError(f"raw scores are finite, got {raw[~np.isfinite(raw)].ravel()[0]}")
        uncalibrated = isinstance(self.calibration, Uncalibrated)
        value = raw.astype(np.float64) if uncalibrated else np.full(raw.shape, self.neutral)
        u = np.full(raw.shape, 0.5)
        value[known], u[known] = self._compute(self.lookup, rows[known], raw[known])
        if callable(self.on_missing):
            unknown = [prompts(int(at)) for at in np.flatnonzero(~known)]
            table = self.on_missing([*dict(zip(compute_keys(unknown), unknown, strict=True)).values()])
            value[~known], u[~known] = self._compute(self._make_lookup(table), table.rows(unknown), raw[~known])
            known = np.ones_like(known)
        return Rewards(value, u, known)

    def _compute(self, lookup: Lookup, rows: Any, raw: Any) -> tuple[Any, Any]:
        index = lookup.index(rows, raw)
        u = lookup.u(rows, index)
        if self.by_rank:
            return lookup.values(rows, index), u
        if isinstance(self.calibration, Uncalibrated):
            return raw.astype(np.float64), u
        row_of_each = np.repeat(rows, raw[0].size if len(raw) else 1)
        calibrated = self.calibration(lookup.table, row_of_each, raw.ravel())
        if not isinstance(self.transform, Identity) and not ((calibrated >= 0) & (calibrated <= 1)).all():
            raise ValueError(
                f"{self.transform!r} is for quantiles, {self.calibration!r} gives other numbers: Identity()"
            )
        rewards = np.asarray(self.transform(calibrated))
        if not np.isfinite(rewards).all():
            raise ValueError(f"a reward is finite, {self.transform!r} of {self.calibration!r} is not")
        return rewards.reshape(raw.shape), u

    def _make_lookup(self, table: ReferenceTable) -> Lookup:
        tolerance = self.calibration.tolerance if isinstance(self.calibration, EmpiricalCDF) else 0.0
        return Lookup(table, self.transform, self.estimator, tolerance)


def are_rows(prompts: Any) -> bool:
    """Return True for prompts given as rows of the table: an array or a tensor of whole numbers."""
    return is_tensor(prompts) or (isinstance(prompts, np.ndarray) and prompts.dtype.kind in "iu")


def is_tensor(values: Any) -> bool:
    """Return True for a tensor of torch, which is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


@dataclass(frozen=True, eq=False)
class DeviceLookup:
    """The lookup of a reward on one CUDA device, which the computation does not wait for.

    A score that is not finite has to raise, and to know of it means to wait for the device. So the device checks, and
    the result is read at the next call: by then it is there.
    """

    lookup: Lookup
    device: Any
    neutral: float
    """The reward of an unknown prompt; and, until its error is raised, of a score that is not finite."""
    unknown: bool = False
    """Whether a row may be -1."""
    _vectors: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _checks: list[tuple[Any, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        import torch

        vectors, begins = self.lookup.vectors
        self._vectors["values"] = torch.from_numpy(vectors).to(self.device)
        self._vectors["begins"] = torch.from_numpy(begins).to(self.device)

    def __call__(self, rows: Any, raw: Any) -> Any:
        """Compute the rewards; ValueError if a score of an earlier call was not finite."""
        import torch

        self.raise_errors()
        if not (isinstance(rows, torch.Tensor) and rows.device == self.device):
            rows = torch.as_tensor(rows).pin_memory().to(self.device, non_blocking=True)
        values, bad = self.values(rows, raw)
        copy = torch.empty((), dtype=torch.bool, pin_memory=True)
        copy.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._checks.append((copy, event))
        return values

    def values(self, rows: Any, raw: Any) -> tuple[Any, Any]:
        """Compute the rewards, and whether any score is not finite or any row is not in the table.

        Rows are on the device, one for each score or for each line of them.
        """
        import torch

        finite, known = torch.isfinite(raw), rows >= 0
        valid = finite & known.reshape(-1, *[1] * (raw.ndim - 1))
        bad = ~finite.all() if self.unknown else ~valid.all()
        scores = torch.where(finite, raw, 0.0).detach().float()
        row_of_each = rows.clamp(min=0).repeat_interleave(scores[0].numel() if scores.ndim > 1 and len(rows) else 1)
        below, equal = self.lookup.table.on(self.device).search(row_of_each, scores.reshape(-1))
        at = self._vectors["begins"][row_of_each] + 2 * below + equal
        values = self._vectors["values"][at].reshape(scores.shape)
        return match_precision(values.where(valid, self.neutral), raw), bad

    def raise_errors(self) -> None:
        """Raise if the device has found, in the meantime, a score that is not finite."""
        while self._checks and self._checks[0][1].query():
            bad, _ = self._checks.pop(0)
            if bad.item():
                raise ValueError("in an earlier call to from_scores a score was not finite, or a prompt's row was -1")


def match_precision(values: Any, raw: Any) -> Any:
    """Convert to float64 for scores of float64, else to float32: a reward has more digits than bfloat16 holds."""
    import torch

    return values.to(torch.float64 if raw.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True, eq=False)
class RawScores:
    """Rewards of raw scores that a loop has already: arrays give arrays, tensors give tensors where they are."""

    valuation: Valuation
    _devices: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, rows: Any, raw: Any, prompts: Sequence[Prompt] | None) -> Any:
        """Compute the rewards; `prompts` where rows of unknown ones are -1 and a function has to draw for them."""
        if isinstance(raw, np.ma.MaskedArray):
            raise TypeError("raw scores are an array without a mask: fill or leave out what is masked")
        if np.ndim(raw) == 0 or raw.shape[:1] != np.shape(rows):
            G, left = divmod(int(np.size(raw) if not is_tensor(raw) else raw.numel()), max(1, len(rows)))
            hint = f": reshape({len(rows)}, {G})?" if G > 1 and not left and np.ndim(raw) == 1 else ""
            raise ValueError(
                f"raw scores are of shape (P,) or (P, G), got {tuple(np.shape(raw))} for P = {len(rows)} prompts{hint}"
            )
        if not is_tensor(raw):
            return self._compute(rows, raw, prompts)
        import torch

        if raw.device.type == "cuda" and self.valuation.by_rank and not self.valuation.lookup.tolerance:
            if raw.device not in self._devices:
                unknown = self.valuation.on_missing == "neutral"
                device = DeviceLookup(self.valuation.lookup, raw.device, self.valuation.neutral, unknown)
                self._devices[raw.device] = device
            if is_tensor(rows) or not len(rows) or rows.min() >= 0:
                return self._devices[raw.device](rows, raw)
        scores = raw.detach() if raw.dtype.itemsize >= 4 else raw.detach().float()  # numpy knows no bfloat16
        rewards = torch.from_numpy(self._compute(rows, scores.cpu().numpy(), prompts))
        return match_precision(rewards.to(raw.device), raw)

    def _compute(self, rows: Any, raw: Any, prompts: Sequence[Prompt] | None) -> Any:
        rows = rows if isinstance(rows, np.ndarray) else rows.detach().cpu().numpy()
        on_missing = self.valuation.on_missing
        if len(rows) and rows.min() < 0:
            if on_missing in ("raise", "skip"):
                raise ValueError(
                    f'there is no number for the row -1 of an unknown prompt with on_missing="{on_missing}": '
                    'leave it out, or on_missing="neutral"'
                )
            if callable(on_missing) and prompts is None:
                raise ValueError("unknown prompts are drawn for by their text: give from_scores prompts, not rows")
        return self.valuation(rows, raw, (prompts or [""]).__getitem__).value
