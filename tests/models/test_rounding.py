"""Rounding: what a model's own arithmetic explains is no difference, and all else is."""

import math
from typing import Any

import pytest
import torch
from architectures import ENCODERS, one_by_one
from tiny import VOCABULARY
from torch import Tensor, nn

from calibrated_rewards.models.batches import Rounding, coarsest, moved_by_rounding

HALF, FULL = nn.Linear(1, 1).bfloat16(), nn.Linear(1, 1)


def excess(gaps: Any, model: nn.Module, *, moves: float = 0.0, spread: float = 1.0, rounding: Any = None) -> float:
    """Of eight rows with this spread, that differ so much, where one rounding moves each so far."""
    alone = spread * torch.tensor([[-1.0], [1.0]] * 4)
    moved = alone + moves
    return (rounding or Rounding()).excess(alone + torch.tensor(gaps)[:, None], alone, lambda: (alone, moved), model)


@pytest.mark.parametrize(("gap", "differs"), [(5e-5, False), (3e-4, True)])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_float32_is_measured_by_the_spread(gap: float, differs: bool, spread: float) -> None:
    """One row of eight suffices, and the size of the numbers is no matter."""
    assert (excess([gap * spread] + [0.0] * 7, FULL, spread=spread) > 1) == differs


@pytest.mark.parametrize(("gap", "differs"), [(0.05, False), (0.1, False), (0.3, True)])
def test_sixteen_bits_are_measured_by_rounding(gap: float, differs: bool) -> None:
    """All rows a little off, of a model that rounding moves by 0.05 standard deviations."""
    assert (excess([gap, -gap] * 4, HALF, moves=0.05) > 1) == differs


def test_a_single_row_far_off() -> None:
    """It has leeway, up to a quarter of a standard deviation; near-equal rows have it beyond that."""
    one = [0.3] + [0.0] * 7
    assert excess(one, HALF, moves=0.08) > 1
    assert excess(one, HALF, moves=0.08, rounding=Rounding(farthest=math.inf)) < 1
    assert excess([0.2] + [0.0] * 7, HALF, moves=0.08) < 1


def test_rounding_is_measured_only_where_it_matters() -> None:
    """Equal rows cost no forward."""

    def unasked() -> tuple[Tensor, Tensor]:
        raise AssertionError

    rows = torch.randn(4, 2)
    assert Rounding().excess(rows.clone(), rows, unasked, HALF) == 0


def test_numbers_that_are_none() -> None:
    """nan and infinity have to be in the same places; other shapes are no equals."""
    rows, nan = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [torch.nan]])
    assert Rounding().excess(nan, nan, lambda: (rows, rows), FULL) == 0
    assert Rounding().excess(nan, rows, lambda: (rows, rows), FULL) == math.inf
    assert Rounding().excess(rows, nan, lambda: (rows, rows), FULL) == math.inf
    assert Rounding().excess(torch.ones(2, 2), rows, lambda: (rows, rows), FULL) == math.inf


def test_each_number_has_its_own_spread() -> None:
    """A label that is always the same agrees where it is equal, and differs where it is not."""
    alone = torch.tensor([[0.0, 1e4], [1.0, 1e4], [2.0, 1e4]])
    off = alone.clone()
    off[0, 0] += 0.01
    assert Rounding().excess(off, alone, lambda: (alone, alone), FULL) > 1
    off = alone.clone()
    off[0, 1] += 1
    assert Rounding().excess(off, alone, lambda: (alone, alone), FULL) > 1


def test_the_coarsest_weights_count() -> None:
    """Embeddings in float32 before layers in 16 bits are read with 16; whole numbers and 8 bits are no measure."""
    mixed = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16())
    assert coarsest(mixed) == torch.bfloat16
    assert coarsest(mixed[:2]) == torch.float16
    assert coarsest(FULL) == torch.float32
    assert coarsest(nn.Identity()) == torch.float32


def test_a_rounding_moves_the_scores_a_little() -> None:
    """In bfloat16 about 2**16 times as far as in float32; afterwards the model is as it was."""
    torch.manual_seed(0)
    rows = torch.randint(8, VOCABULARY, (6, 20)).tolist()
    moves = []
    for dtype in (torch.float32, torch.bfloat16):
        model = ENCODERS["Bert"].classifier().to(dtype)
        before = one_by_one(model, rows)
        with moved_by_rounding(model):
            moved = one_by_one(model, rows)
        moves.append(float(((moved - before) ** 2).mean() ** 0.5))
        assert (one_by_one(model, rows) == before).all()
    assert 2**13 < moves[1] / moves[0] < 2**19
