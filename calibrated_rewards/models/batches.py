"""Batches by a budget of tokens: longest first, little padding, and half the size where memory does not suffice."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

logger = logging.getLogger(__name__)

# A progress bar is for what takes longer than this many seconds.
PATIENCE = 3.0


@dataclass
class Budget:
    """How many tokens a batch may hold; halved when that was too many, and it stays so."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a batch needs batch_tokens >= 1, got batch_tokens={self.tokens}")

    def batches(self, costs: Sequence[int], kinds: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Indices by falling cost, as many together as the budget holds; of one kind, where kinds are given.

        >>> list(Budget(10).batches([2, 5, 1, 4, 3]))
        [[1, 3], [4, 0, 2]]
        """
        kinds = kinds or [0] * len(costs)
        order = sorted(range(len(costs)), key=lambda i: (kinds[i], -costs[i]))
        start = 0
        while start < len(order):
            first = order[start]
            # Rows cost what the first, the longest, costs: they are padded to it.
            fit = order[start : start + max(1, self.tokens // costs[first])]
            batch = [i for i in fit if kinds[i] == kinds[first]]
            yield batch
            start += len(batch)

    def run(
        self, forward: Callable[[list[int]], list[T]], indices: list[int], costs: Sequence[int] | None = None
    ) -> list[T]:
        """What `forward` gives for each index; in halves if it runs out of memory."""
        import torch
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            return forward(indices)
        except RuntimeError as error:
            if len(indices) == 1 or not should_reduce_batch_size(error):
                raise
        # Out here the failed batch's tensors are free again.
        half = len(indices) // 2
        # Half of what this batch held: the budget may be far above, or below already after its other half.
        held = self.tokens if costs is None else len(indices) * max(costs[i] for i in indices)
        self.tokens = min(self.tokens, max(1, held // 2))
        logger.warning(
            "out of memory with %d inputs in a batch: going on with batch_tokens=%d", len(indices), self.tokens
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.run(forward, indices[:half], costs) + self.run(forward, indices[half:], costs)


def progress(total: int, shown: bool, unit: str = "completions") -> "tqdm[Any]":
    """A bar that appears when the work takes more than some seconds and somebody is watching."""
    return tqdm(total=total, unit=f" {unit}", desc="scoring", delay=PATIENCE, disable=None if shown else True)
