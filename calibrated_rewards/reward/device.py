"""Rewards from raw scores on a CUDA device, without waiting for it.

A score that is not finite has to raise, and to hear of it means to wait for the device. So the device is asked, and
its answer is listened for at the next call: by then it is there.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.reward.lookup import Lookup


@dataclass(frozen=True, eq=False)
class OnDevice:
    """The lookup of a reward on one device."""

    lookup: Lookup
    device: torch.device
    neutral: float
    """What an unknown prompt is worth; and, until the error is heard of, a score that is not finite."""
    unknown: bool = False
    """Whether a row may be -1."""
    _vectors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _asked: list[tuple[Tensor, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        vectors, begins = self.lookup.vectors
        self._vectors["values"] = torch.from_numpy(vectors).to(self.device)
        self._vectors["begins"] = torch.from_numpy(begins).to(self.device)

    def __call__(self, rows: Any, raw: Tensor) -> Tensor:
        """The rewards; ValueError if a score of an earlier call was not finite."""
        self.listen()
        values, bad = self.values(self._sent(rows), raw)
        self._ask(bad)
        return values

    def values(self, rows: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The rewards, and whether there are scores that are not finite or rows that there are not.

        Rows are on the device, one for each score or for each line of them.
        """
        finite, known = torch.isfinite(raw), rows >= 0
        sound = finite & known.reshape(-1, *[1] * (raw.ndim - 1))
        bad = ~finite.all() if self.unknown else ~sound.all()
        values = self._looked_up(rows.clamp(min=0), torch.where(finite, raw, 0.0).detach().float())
        return like(values.where(sound, self.neutral), raw), bad

    def _looked_up(self, rows: Tensor, scores: Tensor) -> Tensor:
        each = scores[0].numel() if scores.ndim > 1 and len(rows) else 1
        of = rows.repeat_interleave(each)
        below, equal = self.lookup.table.on(self.device).search(of, scores.reshape(-1))
        at = self._vectors["begins"][of] + 2 * below + equal
        return self._vectors["values"][at].reshape(scores.shape)

    def listen(self) -> None:
        """Raise if the device has found, in the meantime, a score that is not finite."""
        while self._asked and self._asked[0][1].query():
            bad, _ = self._asked.pop(0)
            if bad.item():
                raise ValueError("in an earlier call to from_scores a score was not finite, or a prompt's row was -1")

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
