"""Whether a model bears padding: some rows of padded batches are compared with the same rows alone."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.reading.batches import Budget
from calibrated_rewards.reading.rounding import Rounding, moved_by_rounding

logger = logging.getLogger(__name__)

# Models that pool by fours are disturbed at three lengths of four: rows of several lengths are compared.
CHECKED_ROWS = 8
# The longest row costs most and is padded least: lengths up to this part of it are compared.
LONGEST_PART = 0.5
# So many of the shortest rows tell how far rounding moves a number.
ROUNDED_ROWS = 4

# Reads the rows with these indices as one padded batch: numbers for each, or for several positions of each.
Read = Callable[[list[int]], list[Tensor]]


@dataclass
class Padding:
    """Whether rows are padded, and what that was found on; one for all calls of a scorer."""

    allowed: bool = True
    lengths: set[int] = field(default_factory=set)
    """Lengths of rows that were compared."""
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Length and padded length of rows that agreed; longer rows in less padding need no comparison."""
    rounding: Rounding = field(default_factory=Rounding)

    @property
    def checked(self) -> int:
        """Of how many lengths rows were compared."""
        return len(self.lengths)

    def pieces(self, batch: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """The batch as it is; for a model that padding disturbs, its rows by length, which are not padded."""
        if self.allowed:
            return [batch]
        return [[i for i in batch if lengths[i] == n] for n in sorted({lengths[i] for i in batch})]

    def covers(self, shortest: int, longest: int) -> bool:
        """Whether a row so short, or shorter, was compared in so long a batch, or a longer one."""
        return any(short <= shortest and longest <= long for short, long in self.ranges)

    def add(self, shortest: int, longest: int) -> None:
        """Note that rows of this length agreed when they were padded to that one."""
        if not self.covers(shortest, longest):
            inside = [(a, b) for a, b in self.ranges if shortest <= a and b <= longest]
            self.ranges = [*(pair for pair in self.ranges if pair not in inside), (shortest, longest)]


@dataclass(eq=False)
class Comparison:
    """The rows of one call that are compared: each is read alone once, and again in the batch that it belongs to."""

    model: Any
    padding: Padding
    read: Read
    lengths: Sequence[int]
    kinds: Sequence[int]
    """Rows of different kinds are never in one batch."""
    budget: Budget
    alone: dict[int, Tensor] = field(default_factory=dict)
    due: list[tuple[int, int]] = field(default_factory=list)
    """The shortest and the longest row of each kind that has something to compare."""

    def prepare(self) -> bool:
        """Read the chosen rows alone; False if the shortest row is another one when padded to the longest."""
        chosen: list[int] = []
        for kind in sorted(set(self.kinds)):
            members = [i for i, of in enumerate(self.kinds) if of == kind and self._may_be_padded(i)]
            rows = self._choose(members)
            if rows:
                chosen += rows
                self.due.append((rows[0], max(members, key=lambda i: self.lengths[i])))
        self.alone = {i: self.read([i])[0] for i in chosen}
        return all(self._bears_most(shortest, longest) for shortest, longest in self.due)

    def agrees(self, batch: Sequence[int], numbers: Sequence[Tensor]) -> bool:
        """Whether the chosen rows among these have the numbers that they have alone."""
        padded_to = max(self.lengths[i] for i in batch)
        found = {
            i: row for i, row in zip(batch, numbers, strict=True) if i in self.alone and self.lengths[i] < padded_to
        }
        return not found or self._equal(found)

    def finish(self) -> None:
        """Note that all agreed."""
        self.padding.lengths |= {self.lengths[i] for i in self.alone}
        for shortest, longest in self.due:
            if self._may_be_padded(longest):  # memory may not have sufficed for two of its length
                self.padding.add(self.lengths[shortest], self.lengths[longest])

    def _may_be_padded(self, row: int) -> bool:
        """Whether a batch holds two rows of this length, or others beside it."""
        return 2 * self.lengths[row] <= self.budget.tokens

    def _choose(self, members: Sequence[int]) -> list[int]:
        """The shortest row, if none so short was compared in so long a batch; at first others of spread lengths too."""
        by_length = {self.lengths[i]: i for i in members}
        known = sorted(by_length)
        if len(known) < 2:
            return []
        several = spread(known, CHECKED_ROWS) if self.padding.checked < CHECKED_ROWS else []
        new = {n for n in several if n not in self.padding.lengths}
        if not self.padding.covers(known[0], known[-1]):
            new.add(known[0])
        return [by_length[n] for n in sorted(new)]

    def _bears_most(self, shortest: int, longest: int) -> bool:
        """The shortest row with as much padding as any row of its kind has, before batches with less are read."""
        if self.lengths[longest] * self.kinds.count(self.kinds[longest]) <= self.budget.tokens:
            return True  # they are one batch, in which it is compared
        return self._equal({shortest: self.read([longest, shortest])[1]})

    def _equal(self, found: dict[int, Tensor]) -> bool:
        rows = sorted(found, key=lambda i: self.lengths[i])
        numbers, alone = (stacked([each[i] for i in rows]) for each in (found, self.alone))
        excess = self.padding.rounding.excess(numbers, alone, lambda: self._rounded(rows[:ROUNDED_ROWS]), self.model)
        if not excess <= 1:
            at = int((numbers - alone).abs().nan_to_num(torch.inf).amax(1).argmax())
            logger.warning(
                "%s gives a padded row of %d tokens other numbers than alone, such as %.6g for %.6g: not padding, "
                "which is slower",
                type(self.model).__name__, self.lengths[rows[at]], float(numbers[at, 0]), float(alone[at, 0]),
            )  # fmt: skip
            self.padding.allowed = False
        return excess <= 1

    def _rounded(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        with moved_by_rounding(self.model):
            moved = [self.read([i])[0] for i in rows]
        return stacked([self.alone[i] for i in rows]), stacked(moved)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """(n, numbers); of rows with several positions, the means over those."""
    return torch.stack([row if row.ndim == 1 else row.sum(0) / max(1, len(row)) for row in rows])


def spread(lengths: Sequence[int], most: int) -> list[int]:
    """At most so many of the lengths: the shortest, and others in even ratios up to `LONGEST_PART` of the longest.

    >>> spread([30, 31, 40, 60, 90, 120, 240, 300, 480], 4)
    [30, 60, 120, 240]
    >>> spread([3, 5, 8], 4)
    [3, 5, 8]
    """
    if len(lengths) <= most:
        return list(lengths)
    first, last = lengths[0], max(lengths[1], LONGEST_PART * lengths[-1])
    chosen: list[int] = []
    for step in range(most):
        goal = first * (last / first) ** (step / (most - 1))
        rest = [n for n in lengths if n not in chosen and n <= last]
        if rest:
            chosen.append(min(rest, key=lambda n: abs(n - goal)))
    return sorted(chosen)
