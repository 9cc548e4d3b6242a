"""Batches by a budget of tokens: every row once, no batch above the budget, halves where memory does not suffice."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from calibrated_rewards.models.batches import Budget, progress_bar


class Memory:
    """A forward pre-hook: so many numbers fit into the first argument."""

    def __init__(self, fits: int, sizes: list[int]) -> None:
        self.fits, self.sizes = fits, sizes

    def __call__(self, _: Any, args: tuple[Tensor, ...]) -> None:
        """Note how many there are, and fail if that is too many."""
        self.sizes.append(args[0].numel())
        if args[0].numel() > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")


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


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 64 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)."),
]


@pytest.mark.parametrize("error", FULL, ids=["cuda", "cpu", "mps"])
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
            raise FULL[0]
        return [torch.tensor(i) for i in indices]

    assert [int(x) for x in budget.run(forward, list(range(8)))] == list(range(8))
    assert budget.tokens == 500


@pytest.mark.parametrize(("error", "size"), [(FULL[0], 1), (RuntimeError("mat1 and mat2 cannot be multiplied"), 8)])
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
    """It needs a token."""
    with pytest.raises(ValueError, match="a batch needs batch_tokens >= 1, got batch_tokens=0"):
        Budget(0)


def test_progress_is_for_long_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed where nobody watches, or for work that takes no time."""
    for shown in (True, False):
        with progress_bar(3, shown) as bar:
            bar.update(3)
    captured = capsys.readouterr()

    assert captured.out + captured.err == ""
