"""A device whose memory is small: batches that are too large for it fail as those on a GPU do."""

from typing import Any

import torch
from torch import Tensor


class Memory:
    """A forward pre-hook: so many numbers fit into the first argument."""

    def __init__(self, fits: int, sizes: list[int]) -> None:
        self.fits, self.sizes = fits, sizes

    def __call__(self, _: Any, args: tuple[Tensor, ...]) -> None:
        """Note how many there are, and fail if that is too many."""
        self.sizes.append(args[0].numel())
        if args[0].numel() > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
