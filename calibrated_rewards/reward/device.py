"""Rewards from raw scores on a CUDA device, without waiting for it.

A score that is not finite has to raise, and to know of it means to wait for the device. So the device checks, and the
result is read at the next call: by then it is there.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.reward.lookup import Lookup


@dataclass(frozen=True, eq=False)
class DeviceLookup:
    """The lookup of a reward on one device."""

    lookup: Lookup
    device: torch.device
    neutral: float
    """The reward of an unknown prompt; and, until its error is raised, of a score that is not finite."""
    unknown: bool = False
    """Whether a row may be -1."""
    _vectors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _checks: list[tuple[Tensor, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        vectors, begins = self.lookup.vectors
        self._vectors["values"] = torch.from_numpy(vectors).to(self.device)
        self._vectors["begins"] = torch.from_numpy(begins).to(self.device)

    def __call__(self, rows: Any, raw: Tensor) -> Tensor:
        """Compute the rewards; ValueError if a score of an earlier call was not finite."""
        self.raise_errors()
        if not (isinstance(rows, Tensor) and rows.device == self.device):
            rows = torch.as_tensor(rows).pin_memory().to(self.device, non_blocking=True)
        values, bad = self.values(rows, raw)
        copy = torch.empty((), dtype=torch.bool, pin_memory=True)
        copy.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._checks.append((copy, event))
        return values

    def values(self, rows: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the rewards, and whether any score is not finite or any row is not in the table.

        Rows are on the device, one for each score or for each line of them.
        """
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


def match_precision(values: Tensor, raw: Tensor) -> Tensor:
    """Convert to float64 for scores of float64, else to float32: a reward has more digits than bfloat16 holds."""
    return values.to(torch.float64 if raw.dtype == torch.float64 else torch.float32)
