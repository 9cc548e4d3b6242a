"""Rewards of raw scores that a loop has already: arrays give arrays, tensors give tensors where they are."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reward.lookup import Valuing


def are_rows(prompts: Any) -> bool:
    """Whether prompts are given as rows of the table: an array or a tensor of whole numbers."""
    return are_tensor(prompts) or (isinstance(prompts, np.ndarray) and prompts.dtype.kind in "iu")


def are_tensor(values: Any) -> bool:
    """Whether values are torch's, which is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


@dataclass(frozen=True, eq=False)
class RawScores:
    """`CalibratedReward.from_scores`, once prompts are rows."""

    valuing: Valuing
    _devices: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, rows: Any, raw: Any, prompts: Sequence[Prompt] | None) -> Any:
        """The rewards; `prompts` where the rows of unknown ones are -1 and a function has to draw for them."""
        if isinstance(raw, np.ma.MaskedArray):
            raise TypeError("raw scores are an array without a mask: fill or leave out what is masked")
        if np.ndim(raw) == 0 or raw.shape[:1] != np.shape(rows):
            G, left = divmod(int(np.size(raw) if not are_tensor(raw) else raw.numel()), max(1, len(rows)))
            how = f": reshape({len(rows)}, {G})?" if G > 1 and not left and np.ndim(raw) == 1 else ""
            raise ValueError(
                f"raw scores are of shape (P,) or (P, G), got {tuple(np.shape(raw))} for P = {len(rows)} prompts{how}"
            )
        if not are_tensor(raw):
            return self._values(_host(rows), raw, prompts)
        import torch

        from calibrated_rewards.reward.device import OnDevice, like

        if raw.device.type == "cuda" and self.valuing.by_rank and not self.valuing.lookup.tolerance:
            if raw.device not in self._devices:
                unknown = self.valuing.on_missing == "neutral"
                self._devices[raw.device] = OnDevice(self.valuing.lookup, raw.device, self.valuing.neutral, unknown)
            if are_tensor(rows) or not len(rows) or rows.min() >= 0:
                return self._devices[raw.device](rows, raw)
        scores = raw.detach() if raw.dtype.itemsize >= 4 else raw.detach().float()  # numpy knows no bfloat16
        return like(torch.from_numpy(self._values(_host(rows), scores.cpu().numpy(), prompts)).to(raw.device), raw)

    def _values(self, rows: Any, raw: Any, prompts: Sequence[Prompt] | None) -> Any:
        on_missing = self.valuing.on_missing
        if len(rows) and rows.min() < 0:
            if on_missing in ("raise", "skip"):
                raise ValueError(
                    f'there is no number for the row -1 of an unknown prompt with on_missing="{on_missing}": '
                    'leave it out, or on_missing="neutral"'
                )
            if callable(on_missing) and prompts is None:
                raise ValueError("unknown prompts are drawn for by their text: give from_scores prompts, not rows")
        return self.valuing(rows, raw, (prompts or [""]).__getitem__).value


def _host(rows: Any) -> Any:
    return rows if isinstance(rows, np.ndarray) else rows.detach().cpu().numpy()
