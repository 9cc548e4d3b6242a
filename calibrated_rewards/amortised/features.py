"""What describes a prompt: any function from prompts to rows of numbers, and the check of what it gives."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.scorers.protocol import name_of, without_tensors


@runtime_checkable
class Features(Protocol):
    """Describes prompts: `features(prompts)` gives each one a row of numbers, all of one width."""

    def __call__(self, prompts: Sequence[Prompt], /) -> Any:
        """An array, or a tensor, of shape (prompts, width)."""


def features_of(features: Features, prompts: Sequence[Prompt], width: int | None = None) -> Float[np.ndarray, "P d"]:
    """The features of prompts, checked: a row for each, of finite numbers, as many as expected."""
    found, who = np.asarray(without_tensors(features(list(prompts)))), name_of(features)
    if found.ndim != 2 or len(found) != len(prompts) or found.dtype.kind not in "fiub" or not found.shape[1]:
        raise ValueError(f"{who} gives {len(prompts)} prompts a row of numbers each, got {found.dtype} {found.shape}")
    if width is not None and found.shape[1] != width:
        raise ValueError(f"the calibrator was fitted on features of width {width}, {who} gave width {found.shape[1]}")
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise ValueError(f"features are finite numbers, {who} gave others for {start_of(prompts[row])}")
    return found if found.dtype.kind == "f" and found.itemsize >= 4 else found.astype(np.float32)
