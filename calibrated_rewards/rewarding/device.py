"""Rewards from raw scores on a CUDA device, without waiting for it.

A score that is not finite has to raise, and to hear of it means to wait for the device. So the device is asked, and
its answer is listened for at the next call: by then it is there.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.rewarding.lookup import Lookup


@dataclass(frozen=True, eq=False)
class OnDevice:
    """The lookup of a reward on one device."""

    lookup: Lookup
    device: torch.device
    neutral: float
    """In place of a score that is not finite, until the error is heard of."""
    _vectors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _asked: list[tuple[Tensor, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        vectors, begins = self.lookup.vectors
        self._vectors["values"] = torch.from_numpy(vectors).to(self.device)
        self._vectors["begins"] = torch.from_numpy(begins).to(self.device)

    def __call__(self, rows: Any, raw: Tensor) -> Tensor:
        """The rewards; ValueError if a score of an earlier call was not finite."""
        self.listen()
        finite = torch.isfinite(raw)
        self._ask(~finite.all())
        return self.values(self._sent(rows), torch.where(finite, raw, 0.0)).where(finite, self.neutral)

    def values(self, rows: Tensor, raw: Tensor) -> Tensor:
        """The rewards of finite scores; rows on the device, one for each score or for each line of them."""
        scores = raw.detach().float()
        each = scores[0].numel() if scores.ndim > 1 and len(rows) else 1
        of = rows.repeat_interleave(each)
        below, equal = self.lookup.table.on(self.device).search(of, scores.reshape(-1))
        at = self._vectors["begins"][of] + 2 * below + equal
        return like(self._vectors["values"][at].reshape(raw.shape), raw)

    def listen(self) -> None:
        """Raise if the device has found, in the meantime, a score that is not finite."""
        while self._asked and self._asked[0][1].query():
            bad, _ = self._asked.pop(0)
            if bad.item():
                raise ValueError("raw scores are finite, a tensor of an earlier call to from_scores had others")

    def _sent(self, rows: Any) -> Tensor:
        if isinstance(rows, Tensor) and rows.device == self.device:
            return rows
        return torch.as_tensor(rows).pin_memory().to(self.device, non_blocking=True)

    def _ask(self, bad: Tensor) -> None:
        said = torch.empty((), dtype=torch.bool, pin_memory=True)
        said.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._asked.append((said, event))


def like(values: Tensor, raw: Tensor) -> Tensor:
    """float64 for scores of float64, else float32: a reward has more digits than bfloat16 holds."""
    return values.to(torch.float64 if raw.dtype == torch.float64 else torch.float32)
