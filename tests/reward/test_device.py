"""Rewards on a device without waiting for it: the route that CUDA takes, run on the CPU."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from calibrated_rewards import Exponential, Log, ReferenceTable, scaled
from calibrated_rewards.reward.lookup import DeviceLookup, Lookup

CPU = torch.device("cpu")


def lookup(transform: Any) -> Lookup:
    """Rows of many lengths, with ties."""
    rng = np.random.default_rng(0)
    table = ReferenceTable.build([(str(i), rng.normal(size=1 + 3 * i).round(1)) for i in range(9)])
    return Lookup(table, scaled(transform, "unit"))


@pytest.mark.parametrize("transform", [Log(), Exponential(10.0)], ids=repr)
@pytest.mark.parametrize("shape", [(40,), (8, 5), (0,)], ids=str)
def test_the_device_s_route_is_the_table_s(transform: Any, shape: tuple[int, ...]) -> None:
    """The same rewards, for scores of one axis and of two."""
    rng = np.random.default_rng(1)
    known = lookup(transform)
    rows = rng.integers(0, 9, shape[0])
    raw = rng.normal(size=shape).round(1).astype(np.float32)
    expected = known.values(rows, known.index(rows, raw))

    found, bad = DeviceLookup(known, CPU, 0.5).values(torch.from_numpy(rows), torch.from_numpy(raw))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found.dtype == torch.float32
    assert not bad
    exact, _ = DeviceLookup(known, CPU, 0.5).values(torch.from_numpy(rows), torch.from_numpy(raw).double())
    np.testing.assert_array_equal(exact.numpy(), expected)


@pytest.mark.parametrize("unknown", [False, True])
def test_what_is_unsound_is_neutral_and_is_told(unknown: bool) -> None:
    """Scores that are not finite, and rows that there are not, unless unknown prompts are allowed; the rest stands."""
    on = DeviceLookup(lookup(Log()), CPU, -0.5, unknown)
    rows, raw = torch.tensor([3, 4]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    sound, _ = on.values(rows, raw)
    for at in (0, 1):
        for value in (float("nan"), float("inf")):
            spoilt = raw.clone()
            spoilt[at, 1] = value
            found, bad = on.values(rows, spoilt)
            assert bad
            expected = sound.clone()
            expected[at, 1] = -0.5
            assert torch.equal(found, expected)
    found, bad = on.values(torch.tensor([3, -1]), raw)
    assert bool(bad) is not unknown
    assert torch.equal(found, torch.stack([sound[0], torch.full((2,), -0.5)]))


@dataclass
class Event:
    """An event that has happened, or not yet."""

    answers: deque[bool] = field(default_factory=lambda: deque([False, True]))

    def query(self) -> bool:
        """Whether it has happened."""
        return self.answers.popleft()


def test_a_score_that_is_not_finite_is_heard_of_later() -> None:
    """Not before the device has answered, and then once."""
    on = DeviceLookup(lookup(Log()), CPU, 0.5)
    on._checks.append((torch.tensor(True), Event()))
    on.raise_errors()
    with pytest.raises(ValueError, match="an earlier call"):
        on.raise_errors()
    on.raise_errors()
    on._checks.append((torch.tensor(False), Event(deque([True]))))
    on.raise_errors()
    assert not on._checks
