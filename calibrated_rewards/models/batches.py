"""Batches by a budget of tokens, padded only where padding leaves a model's numbers as they are.

Rows of tokens are read longest first, with little padding, and in half the size where memory does not suffice. Some
rows are read alone as well: a model that gives them other numbers in a padded batch is read without padding from then
on. Two readings are equal if they differ by no more than the model's own rounding moves its numbers.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds that work has to take before a progress bar appears.
PATIENCE = 3.0
# Equal without a further look, in standard deviations of the rows.
EQUAL = {torch.float32: 1e-4}
EQUAL_16_BIT = 0.01
# In 16 bits rounding may move a single row twice as far as it is measured to, and as far again; but not the latter if
# that is so many standard deviations: such a row is ranked among other rows.
FARTHEST_16_BIT = 0.25
# The standard deviation of fewer rows than this says little about how far rows are apart.
ROWS_FOR_SPREAD = 4
# Moving all embeddings by one rounding moves the scores about as far as another shape of batch does: 0.02 to 1.2 times
# as far in the encoders of tests/architectures.py, with 2 layers of 32 and with 8 of 256. Rows may be twice as far
# apart, and more if few of them were measured.
ROUNDINGS = 2.0
# The same in float32, where near-equal scores of a first few rows round otherwise than their embeddings do, and where
# so little is no matter.
ROUNDINGS_FLOAT32 = 32.0
# So many rows, and numbers of each, are remembered.
MOST_ROWS, MOST_NUMBERS = 64, 1024
# Models that pool by fours are disturbed at three lengths of four: rows of several lengths are compared.
CHECKED_ROWS = 8
# The longest row costs most and is padded least: lengths up to this part of it are compared.
LONGEST_PART = 1 / 3
# So many of the shortest rows tell how far rounding moves a number.
ROUNDED_ROWS = 4

# Reads the rows with these indices as one padded batch: numbers for each, or for several positions of each.
Read = Callable[[list[int]], list[Tensor]]


@dataclass
class Budget:
    """The tokens that a batch may hold; halved for good when they were too many for the memory."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a batch needs batch_tokens >= 1, got batch_tokens={self.tokens}")

    def batches(self, costs: Sequence[int], kinds: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Yield indices by falling cost, as many together as the budget holds; of one kind, where kinds are given.

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
        """Call `forward` for the indices together; in halves if it runs out of memory."""
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


def progress_bar(total: int, shown: bool, unit: str = "completions") -> "tqdm[Any]":
    """Open a progress bar that appears when the work takes more than some seconds and somebody is watching."""
    return tqdm(total=total, unit=f" {unit}", desc="scoring", delay=PATIENCE, disable=None if shown else True)


@dataclass
class Rounding:
    """The spread of a model's numbers from row to row, and how far rounding alone moves them."""

    rows: list[Tensor] = field(default_factory=list)
    """Numbers of single, unpadded rows."""
    moves: list[Tensor] = field(default_factory=list)
    """How far rounding moved the numbers of some of them."""
    farthest: float = FARTHEST_16_BIT
    """Standard deviations above which a single row of 16 bits has less leeway, and twice which none excuses."""

    def excess(self, numbers: Tensor, alone: Tensor, rounded: Callable[[], tuple[Tensor, Tensor]], model: Any) -> float:
        """Measure (n, numbers) against the same rows alone, in the distances that equal rows may have: above 1 differs.

        `rounded` gives the numbers of some rows alone, and again with each embedding moved by one rounding. It costs
        forwards, and is called only where the difference is not within `EQUAL`.
        """
        if numbers.shape != alone.shape or not torch.equal(numbers.isfinite(), alone.isfinite()):
            return math.inf
        numbers, alone = (each[:, :MOST_NUMBERS].nan_to_num(0, 0, 0).double() for each in (numbers, alone))
        self._remember(self.rows, alone)
        kind, spread = coarsest(model), self.spread
        gap = (numbers - alone).abs()
        equal = EQUAL.get(kind, EQUAL_16_BIT) * spread
        if bool((gap <= equal).all()):
            return 0.0
        before, after = (each[:, :MOST_NUMBERS].nan_to_num(0, 0, 0).double() for each in rounded())
        # A number may happen not to move, and is rounded all the same: by its last bit.
        last_bit = torch.finfo(kind).eps * before.square().mean(0).sqrt()
        self._remember(self.moves, torch.maximum((after - before).abs(), last_bit))
        roundings = ROUNDINGS_FLOAT32 if kind in EQUAL else ROUNDINGS
        few = math.sqrt(1 + math.log(gap.shape[1]))
        typical = gap.square().mean(0).sqrt() / self._allowed(roundings * (1 + few / math.sqrt(len(gap))), equal)
        single = gap / self._allowed(roundings * (1 + few), equal)
        if kind not in EQUAL and len(self.rows) >= ROWS_FOR_SPREAD:
            strict = gap / self._allowed(roundings * (0.25 + few), equal)
            single = torch.where(gap > self.farthest * spread, strict, single)
            # However badly the model rounds, twice that is no agreement.
            hard = gap / (2 * self.farthest * spread).clamp(min=1e-30)
            single = torch.where(spread > 0, torch.maximum(single, hard), single)
        return max(float(typical.max()), float(single.max()))

    @property
    def spread(self) -> Tensor:
        """The standard deviation of each number over the rows."""
        return torch.stack(self.rows).std(0, correction=0)

    def _allowed(self, roundings: float, equal: Tensor) -> Tensor:
        """Return the distance of so many roundings. Numbers round alike for their spread: they are taken together."""
        moves, spread = torch.stack(self.moves).square().mean(0).sqrt(), self.spread
        varied = spread > 0
        shared = float((moves[varied] / spread[varied]).square().mean().sqrt()) if bool(varied.any()) else 0.0
        return (equal + roundings * torch.where(varied, shared * spread, moves)).clamp(min=1e-30)

    @staticmethod
    def _remember(memory: list[Tensor], rows: Tensor) -> None:
        memory += list(rows)
        del memory[:-MOST_ROWS]


def coarsest(model: nn.Module) -> torch.dtype:
    """Find the dtype with the fewest bits among a model's weights, of those with 16 bits and more, and its numbers."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    # Whatever the weights are, numbers are read in float32.
    return max(kinds | {torch.float32}, key=lambda kind: torch.finfo(kind).eps)


@contextmanager
def moved_by_rounding(model: nn.Module) -> Iterator[None]:
    """Move each embedding to a next number, up or down at random: as far as a single rounding moves it."""
    nudge = Nudge(torch.finfo(coarsest(model)).eps, torch.Generator().manual_seed(0))
    with ExitStack() as after:
        for part in model.modules():
            if isinstance(part, nn.Embedding):
                after.callback(part.register_forward_hook(nudge).remove)
        yield


@dataclass(frozen=True, eq=False)
class Nudge:
    """A forward hook that multiplies each number of an output by 1 + size or 1 - size, at random."""

    size: float
    generator: torch.Generator

    def __call__(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Move the output; its dtype stays."""
        signs = torch.randint(0, 2, output.shape, generator=self.generator).mul_(2).sub_(1)
        return output * (1 + self.size * signs).to(output.device, output.dtype)


@dataclass
class Padding:
    """Permission to pad rows, and the lengths that it was found on; one for all calls of a scorer."""

    allowed: bool = True
    lengths: set[int] = field(default_factory=set)
    """Lengths of rows that were compared."""
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Length and padded length of rows that agreed; longer rows in less padding need no comparison."""
    rounding: Rounding = field(default_factory=Rounding)

    def pieces(self, batch: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """Return the batch whole; for a model that padding disturbs, its rows by length, which are not padded."""
        if self.allowed:
            return [batch]
        return [[i for i in batch if lengths[i] == n] for n in sorted({lengths[i] for i in batch})]

    def covers(self, shortest: int, longest: int) -> bool:
        """Tell if a row so short, or shorter, was compared in so long a batch, or a longer one."""
        return any(short <= shortest and longest <= long for short, long in self.ranges)

    def add(self, shortest: int, longest: int) -> None:
        """Note that rows of this length agreed when they were padded to that one."""
        if not self.covers(shortest, longest):
            apart = [pair for pair in self.ranges if not (shortest <= pair[0] and pair[1] <= longest)]
            self.ranges = [*apart, (shortest, longest)]


def read_in_batches(
    model: Any, forward: Read, costs: Sequence[int], kinds: Sequence[int], budget: Budget, padding: Padding, bar: Any
) -> list[Tensor]:
    """Read rows of tokens in padded batches; all of them again, unpadded, once padding turns out to change a row."""
    read = partial(budget.run, forward, costs=costs)
    numbers = None
    while numbers is None:
        numbers = Comparison(model, padding, read, costs, kinds, budget).read_all(bar)
    return numbers


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

    def read_all(self, bar: Any) -> list[Tensor] | None:
        """Read all rows; None if padding was allowed until now, and turned out to change them."""
        if self.padding.allowed and not self.prepare():
            return None
        numbers: dict[int, Tensor] = {}
        for batch in self.budget.batches(self.lengths, self.kinds):
            for piece in self.padding.pieces(batch, self.lengths):
                answer = self.read(piece)
                if self.padding.allowed and not self.agrees(piece, answer):
                    bar.update(-len(numbers))
                    return None
                numbers |= zip(piece, answer, strict=True)
            bar.update(len(batch))
        self.finish()
        return [numbers[i] for i in range(len(self.lengths))]

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
        """Tell if the chosen rows among these have the numbers that they have alone."""
        padded_to = max(self.lengths[i] for i in batch)
        rows = zip(batch, numbers, strict=True)
        compared = {i: row for i, row in rows if i in self.alone and self.lengths[i] < padded_to}
        return not compared or self._equal(compared)

    def finish(self) -> None:
        """Note the lengths of the rows that agreed."""
        self.padding.lengths |= {self.lengths[i] for i in self.alone}
        for shortest, longest in self.due:
            if self._may_be_padded(longest):  # memory may not have sufficed for two of its length
                self.padding.add(self.lengths[shortest], self.lengths[longest])

    def _may_be_padded(self, row: int) -> bool:
        """Tell if a batch holds two rows of this length, or others beside it."""
        return 2 * self.lengths[row] <= self.budget.tokens

    def _choose(self, members: Sequence[int]) -> list[int]:
        """Choose the shortest row, if none so short was padded so far; at first others of spread lengths too."""
        by_length = {self.lengths[i]: i for i in members}
        lengths = sorted(by_length)
        if len(lengths) < 2:
            return []
        several = choose_lengths(lengths, CHECKED_ROWS) if len(self.padding.lengths) < CHECKED_ROWS else []
        new = {n for n in several if n not in self.padding.lengths}
        if not self.padding.covers(lengths[0], lengths[-1]):
            new.add(lengths[0])
        return [by_length[n] for n in sorted(new)]

    def _bears_most(self, shortest: int, longest: int) -> bool:
        """Compare the shortest row with as much padding as any of its kind has, before batches with less are read."""
        if self.lengths[longest] * self.kinds.count(self.kinds[longest]) <= self.budget.tokens:
            return True  # they are one batch, in which it is compared
        return self._equal({shortest: self.read([longest, shortest])[1]})

    def _equal(self, padded: dict[int, Tensor]) -> bool:
        rows = sorted(padded, key=lambda i: self.lengths[i])
        numbers, alone = (stack_means([each[i] for i in rows]) for each in (padded, self.alone))
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
        return stack_means([self.alone[i] for i in rows]), stack_means(moved)


def stack_means(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows to (n, numbers); of rows with several positions, the means over those."""
    return torch.stack([row if row.ndim == 1 else row.sum(0) / max(1, len(row)) for row in rows])


def choose_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """Choose at most so many lengths: the shortest, and others in even ratios up to `LONGEST_PART` of the longest.

    >>> choose_lengths([30, 31, 40, 60, 90, 120, 240, 300, 480], 3)
    [30, 60, 120]
    >>> choose_lengths([3, 5, 8], 4)
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
