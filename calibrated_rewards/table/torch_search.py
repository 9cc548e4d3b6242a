"""Search in a table for torch tensors, on the device where the scores are.

On the CPU a tensor and an array share their memory, so the functions for numpy do the work. Any other device gets a
copy of the table's scores, once, all of them checked on the way, and searches there. That non-finite scores raise
costs one synchronisation a call; an assertion on the device would spare it, and would take the process down with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from calibrated_rewards.table import search
from calibrated_rewards.table.search import Content

_UPLOAD_SCORES = 1 << 20


@dataclass(frozen=True)
class DeviceTable:
    """The scores of a table on one device, row i from `offsets[i]` to `offsets[i + 1]`, and the search in them."""

    scores: Float32[Tensor, " T"]
    offsets: Int64[Tensor, " edges"]
    longest: int

    @classmethod
    def upload(cls, content: Content, device: torch.device) -> DeviceTable:
        """Copy a table to a device, every block of it checked, a few megabytes at a time."""
        starts = search.starts(content, np.arange(content.prompts + 1))
        scores = torch.empty(content.total, dtype=torch.float32, device=device)
        step = max(1, _UPLOAD_SCORES * content.prompts // content.total)
        for first in range(0, content.prompts, step):
            last = min(first + step, content.prompts)
            scores[int(starts[first]) : int(starts[last])] = torch.from_numpy(content.read(first, last).copy())
        return cls(scores, torch.from_numpy(starts.copy()).to(device), int(np.diff(starts).max()))

    def counts(self, rows: Any) -> Int64[Tensor, " B"]:
        """Return K, the number of references, of each row."""
        return self._sizes(self._queries(rows, torch.as_tensor(rows), torch.isfinite, search.as_float32)[0])

    def ranks(self, rows: Any, scores: Tensor) -> tuple[Int64[Tensor, "*B"], Int64[Tensor, "*B"]]:
        """Count the references of its row that each score is above, and those that it equals."""
        below, equal = self.search(*self._queries(rows, scores.float(), torch.isfinite, search.as_float32))
        return below.reshape(scores.shape), equal.reshape(scores.shape)

    def search(self, rows: Tensor, scores: Tensor) -> tuple[Int64[Tensor, " B"], Int64[Tensor, " B"]]:
        """Rank one score a row, all on this device and valid: nothing is checked, nothing waited for."""
        below = self._count(rows, scores, torch.lt)
        return below, self._count(rows, scores, torch.le) - below

    def cdf(self, rows: Any, scores: Tensor) -> Float64[Tensor, "*B"]:
        """Return the empirical quantiles of Eq. 12."""
        below, equal = self.ranks(rows, scores)
        size = self._sizes(torch.as_tensor(rows, device=scores.device).long())
        return (below.double() + equal.double() / 2) / size.reshape(-1, *[1] * (scores.ndim - 1))

    def icdf(self, rows: Any, u: Tensor) -> Float32[Tensor, "*B"]:
        """Return the smallest reference with a share of at least u at or below it, rounded as in `search.icdf`."""
        rows, flat = self._queries(rows, u.double(), _is_quantile, search.as_quantiles)
        size = self._sizes(rows)
        rank = torch.ceil(size * flat)
        rank = rank - ((rank - 1) / size >= flat).double()
        rank = rank + (rank / size < flat).double()
        return self.scores[self.offsets[rows] + rank.clamp(min=1).long() - 1].reshape(u.shape)

    def _sizes(self, rows: Tensor) -> Tensor:
        return self.offsets[rows + 1] - self.offsets[rows]

    def _count(self, rows: Tensor, scores: Tensor, before: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Count as `search._count` does, probe by probe."""
        start, window = self.offsets[rows], self._sizes(rows)
        base = start
        for _ in range((self.longest - 1).bit_length()):
            half = window >> 1
            base = base + before(self.scores[(base + half - 1).clamp(min=0)], scores) * half
            window = window - half
        return base - start + before(self.scores[base], scores)

    def _queries(
        self, rows: Any, values: Tensor, valid: Callable[[Tensor], Tensor], refuse: Callable[[Any, Any], Any]
    ) -> tuple[Tensor, Tensor]:
        """Return rows with a value each; faults are found here, and reported by the functions for numpy."""
        prompts, values = len(self.offsets) - 1, values.detach()
        rows = torch.as_tensor(rows, device=values.device)
        whole = not (rows.is_floating_point() or rows.dtype == torch.bool)
        fitting = whole and rows.ndim == 1 and values.shape[:1] == rows.shape
        # The one synchronisation of a call.
        if not fitting or not (((rows >= 0) & (rows < prompts)).all() & valid(values).all()):
            _, flat, shape = search.align(prompts, as_numpy(rows), as_numpy(values))
            refuse(flat, shape)
        each = values[0].numel() if values.ndim > 1 and len(rows) else 1
        return rows.long().repeat_interleave(each), values.reshape(-1)


_uploaded: WeakKeyDictionary[Content, dict[torch.device, DeviceTable]] = WeakKeyDictionary()
_uploading = threading.Lock()


def on_device(content: Content, device: torch.device) -> DeviceTable:
    """Return the table on a device, copied there by the first call."""
    with _uploading:
        tables = _uploaded.setdefault(content, {})
        if device not in tables:
            tables[device] = DeviceTable.upload(content, device)
        return tables[device]


def call(name: str, content: Content, *arguments: Any) -> Any:
    """Call `ranks`, `cdf`, `icdf` or `counts`, whose last argument is a tensor, on the tensor's device."""
    device = arguments[-1].device
    if device.type != "cpu":
        return getattr(on_device(content, device), name)(*arguments)
    result = getattr(search, name)(content, *map(as_numpy, arguments))
    return tuple(map(torch.from_numpy, result)) if isinstance(result, tuple) else torch.from_numpy(result)


def as_numpy(values: Any) -> Any:
    """Return a tensor as an array, which shares its memory where numpy knows the type and the tensor is on the CPU."""
    if not isinstance(values, Tensor):
        return values
    return (values.detach().float() if values.dtype == torch.bfloat16 else values.detach()).cpu().numpy()


def _is_quantile(u: Tensor) -> Tensor:
    return (u >= 0) & (u <= 1)
