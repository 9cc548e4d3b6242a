"""Batches by a budget of tokens, and rounding: what a model's own arithmetic explains is no difference."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from architectures import ENCODERS, one_by_one
from hypothesis import given, strategies as st
from tiny import VOCABULARY
from torch import Tensor, nn

from calibrated_rewards.models.batches import Budget, Rounding, coarsest, moved_by_rounding, progress_bar

costs_and_kinds = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), max_size=40)


@given(rows=costs_and_kinds, tokens=st.integers(1, 200), separate=st.booleans())
def test_batches_are_within_the_budget(rows: list[tuple[int, int]], tokens: int, separate: bool) -> None:
    """Each index once; padded to the longest, a batch holds no more than allowed, or one row; kinds are apart."""
    costs, kinds = [cost for cost, _ in rows], [kind for _, kind in rows]
    batches = list(Budget(tokens).batches(costs, kinds if separate else None))

    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= tokens
        assert not separate or len({kinds[i] for i in batch}) == 1
        assert [costs[i] for i in batch] == sorted((costs[i] for i in batch), reverse=True)


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=40), tokens=st.integers(1, 200))
def test_batches_are_as_large_as_can_be(costs: list[int], tokens: int) -> None:
    """The next row would have been too many."""
    batches = list(Budget(tokens).batches(costs))

    for batch in batches[:-1]:
        assert (len(batch) + 1) * costs[batch[0]] > tokens


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 64 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)."),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["cuda", "cpu", "mps"])
@pytest.mark.parametrize("fits", [1, 3, 8])
def test_halves(error: RuntimeError, fits: int, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that does not fit is run in halves, in order; the budget then is one that fits, and not far below."""
    costs = [10] * 16
    tried: list[int] = []

    def forward(indices: list[int]) -> list[Tensor]:
        tried.append(len(indices))
        if len(indices) > fits:
            raise error
        return [torch.tensor(i) for i in indices]

    budget = Budget(100_000)
    batch = next(budget.batches(costs))
    found = budget.run(forward, batch, costs)
    assert [int(x) for x in found] == batch
    assert 10 * fits / 2 <= budget.tokens <= 10 * max(fits, 1)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}

    del tried[:]
    again = [int(x) for each in budget.batches(costs) for x in budget.run(forward, each, costs)]
    assert sorted(again) == list(range(16))
    assert max(tried) <= fits


def test_halves_without_costs() -> None:
    """Without them, the budget itself is halved at each failure."""
    budget = Budget(1000)

    def forward(indices: list[int]) -> list[Tensor]:
        if len(indices) > 4:
            raise MEMORY_ERRORS[0]
        return [torch.tensor(i) for i in indices]

    assert [int(x) for x in budget.run(forward, list(range(8)))] == list(range(8))
    assert budget.tokens == 500


@pytest.mark.parametrize(
    ("error", "size"), [(MEMORY_ERRORS[0], 1), (RuntimeError("mat1 and mat2 cannot be multiplied"), 8)]
)
def test_what_halving_does_not_mend(error: RuntimeError, size: int) -> None:
    """A row that is alone, and errors of another kind, are the caller's at once; the budget stays."""
    tried: list[int] = []

    def forward(indices: list[int]) -> list[Tensor]:
        tried.append(len(indices))
        raise error

    budget = Budget(100)
    with pytest.raises(RuntimeError) as raised:
        budget.run(forward, list(range(size)), [1] * size)
    assert raised.value is error
    assert (tried, budget.tokens) == ([size], 100)


def test_a_budget_of_nothing() -> None:
    """A batch that may not hold a single token is refused."""
    with pytest.raises(ValueError, match="a batch needs batch_tokens >= 1, got batch_tokens=0"):
        Budget(0)


def test_progress_is_for_long_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed where nobody watches, or for work that takes no time."""
    for shown in (True, False):
        with progress_bar(3, shown) as bar:
            bar.update(3)
    captured = capsys.readouterr()

    assert captured.out + captured.err == ""


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
    """Rows that are equal are not read again with moved embeddings."""

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


def test_numbers_of_a_float64_model_are_in_float32() -> None:
    """So their last bit may differ, even where a rounding of the weights moves nothing and all rows are alike."""
    alone = torch.ones(3, 1)
    assert coarsest(copy.deepcopy(FULL).double()) == torch.float32
    assert Rounding().excess(alone + 2**-23, alone, lambda: (alone, alone), copy.deepcopy(FULL).double()) <= 1


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
