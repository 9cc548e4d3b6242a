"""How near two readings of a row are equal: measured by the spread of the rows and by the model's own rounding."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Equal without a further look, in standard deviations of the rows.
EQUAL = {torch.float32: 1e-4, torch.float64: 1e-4}
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


@dataclass
class Rounding:
    """What is known of a model's numbers: their spread from row to row, and how far rounding alone moves them."""

    rows: list[Tensor] = field(default_factory=list)
    """Numbers of single, unpadded rows."""
    moves: list[Tensor] = field(default_factory=list)
    """How far rounding moved the numbers of some of them."""
    farthest: float = FARTHEST_16_BIT
    """Standard deviations above which a single row of 16 bits has less leeway, and twice which none excuses."""

    def excess(self, numbers: Tensor, alone: Tensor, rounded: Callable[[], tuple[Tensor, Tensor]], model: Any) -> float:
        """How many times farther (n, numbers) are from the same rows alone than equal rows may be: above 1 they differ.

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
        """So many roundings of each number. Numbers round alike, measured by their spread: they are taken together."""
        moves, spread = torch.stack(self.moves).square().mean(0).sqrt(), self.spread
        varied = spread > 0
        shared = float((moves[varied] / spread[varied]).square().mean().sqrt()) if bool(varied.any()) else 0.0
        return (equal + roundings * torch.where(varied, shared * spread, moves)).clamp(min=1e-30)

    @staticmethod
    def _remember(kept: list[Tensor], rows: Tensor) -> None:
        kept += list(rows)
        del kept[:-MOST_ROWS]


def coarsest(model: nn.Module) -> torch.dtype:
    """The dtype with the fewest bits among a model's weights, of those with 16 bits and more."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


@contextmanager
def moved_by_rounding(model: nn.Module) -> Iterator[None]:
    """While it runs, each embedding is a next number up or down: as far as a single rounding moves it."""
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
        """The output, moved; the dtype stays."""
        signs = torch.randint(0, 2, output.shape, generator=self.generator).mul_(2).sub_(1)
        return output * (1 + self.size * signs).to(output.device, output.dtype)
