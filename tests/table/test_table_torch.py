"""Tensors in, tensors out, with the numbers of the numpy route; the device's own search is run on the CPU here."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from calibrated_rewards.table import torch_search as table_torch
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.torch_search import DeviceTable, on_device

scores = st.sampled_from([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.1, 0.5, 1.0, 3e38])
contents = st.lists(st.lists(scores, min_size=1, max_size=9), min_size=1, max_size=6)
CPU = torch.device("cpu")


def table_of(rows):
    """A table whose row i is row i."""
    return ReferenceTable.build([(i.to_bytes(16, "big"), row) for i, row in enumerate(rows)])


@given(contents, st.data())
def test_both_routes_agree_with_numpy(rows, data):
    """The CPU route and the device's search give what arrays give, for one or several responses a row."""
    table = table_of(rows)
    asked = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), scores, scores, st.floats(0, 1)), max_size=8))
    numbers = np.array([row for row, *_ in asked], dtype=np.int64)
    values = np.array([pair for _, *pair, _ in asked], dtype=np.float32).reshape(-1, 2)
    u = np.array([quantile for *_, quantile in asked])
    device = DeviceTable.upload(table._content, CPU)
    for given_scores in (values, values[:, 0]):
        tensor = torch.from_numpy(given_scores.copy())
        expected = [*table.ranks(numbers, given_scores), table.cdf(numbers, given_scores)]
        for route in (table, device):
            got = [*route.ranks(torch.from_numpy(numbers), tensor), route.cdf(numbers, tensor)]
            assert [t.dtype for t in got] == [torch.int64, torch.int64, torch.float64]
            assert all(np.array_equal(t.numpy(), array) for t, array in zip(got, expected, strict=True))
    for route in (table, device):
        assert np.array_equal(route.icdf(numbers, torch.from_numpy(u)).numpy(), table.icdf(numbers, u))
        assert np.array_equal(route.counts(torch.from_numpy(numbers)).numpy(), table.counts(numbers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
def test_every_dtype_is_compared_in_float32(dtype):
    """Half precision is widened, double precision rounded, exactly as float32 has it."""
    rng = np.random.default_rng(0)
    references = rng.normal(size=(50, 20)).astype(np.float32).round(1)
    table = table_of(references)
    asked = torch.from_numpy(rng.normal(size=500).round(1)).to(dtype)
    rows = torch.from_numpy(rng.integers(0, 50, 500))
    expected = table.cdf(rows.numpy(), asked.to(torch.float32).numpy())
    for route in (table, on_device(table._content, CPU)):
        assert np.array_equal(route.cdf(rows, asked).numpy(), expected)
        assert np.array_equal(route.cdf(rows.int(), asked).numpy(), expected)


def test_gradients_do_not_get_in_the_way():
    """Scores that still hang on a graph are looked up, and the answer does not."""
    table = table_of([[0.0, 1.0]])
    asked = torch.tensor([0.5], requires_grad=True)
    for route in (table, on_device(table._content, CPU)):
        assert route.cdf([0], asked).tolist() == [0.5]
        assert not route.cdf([0], asked).requires_grad


@pytest.mark.parametrize(
    ("rows", "asked", "error", "message"),
    [
        ([0, 1], [0.0, float("nan")], ValueError, "scores must be finite in float32, got nan at position 1"),
        ([0, 1], [[0.0, 1.0], [float("inf"), 0.0]], ValueError, "got inf at position 1, 0"),
        ([0, 2], [0.0, 0.0], IndexError, "rows must be within 0..1, got 2 at position 1"),
        ([-1], [0.0], IndexError, "rows must be within 0..1, got -1 at position 0"),
        ([0.0], [0.0], TypeError, "rows must be a list of whole numbers"),
        ([0, 1], [0.0], ValueError, r"rows of shape \(P,\)"),
    ],
)
def test_both_routes_refuse_what_numpy_refuses(rows, asked, error, message):
    """With the same words."""
    table = table_of([[0.0, 1.0], [2.0]])
    for route in (table, on_device(table._content, CPU)):
        for kind in (rows, torch.tensor(rows)):
            with pytest.raises(error, match=message):
                route.cdf(kind, torch.tensor(asked))
    with pytest.raises(ValueError, match=r"u must be within \[0, 1\], got 1.5 at position 1"):
        on_device(table._content, CPU).icdf([0, 0], torch.tensor([0.5, 1.5]))
    with pytest.raises(IndexError, match="rows must be within"):
        on_device(table._content, CPU).counts(torch.tensor([5]))


def test_float64_beyond_float32_is_refused():
    """As it is in numpy."""
    table = table_of([[0.0]])
    for route in (table, on_device(table._content, CPU)):
        with pytest.raises(ValueError, match=r"finite in float32"):
            route.cdf([0], torch.tensor([1e39], dtype=torch.float64))


def test_uploads_happen_once_and_are_checked(tmp_path):
    """A device has one copy of a table for as long as the table lives; an altered one never gets there."""
    rng = np.random.default_rng(0)
    table = ReferenceTable.build([(str(i), rng.normal(size=rng.integers(1, 60))) for i in range(3000)], path=tmp_path)
    first = on_device(table._content, CPU)
    assert on_device(table._content, CPU) is first
    assert first.scores.tolist() == np.concatenate([row for _, row in table.items()]).tolist()
    before = len(table_torch._uploaded)
    del table
    assert len(table_torch._uploaded) == before - 1

    data = bytearray((tmp_path / "table.safetensors").read_bytes())
    data[-2] ^= 1
    (tmp_path / "table.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="must be as they were written"):
        on_device(ReferenceTable.load(tmp_path)._content, CPU)


def test_icdf_of_j_over_k_is_the_jth_on_a_device():
    """As in numpy, the quantile j / K is the j-th reference, however j / K and K u are rounded."""
    table = table_of([np.arange(1, k + 1) for k in range(1, 151)])
    rows = np.repeat(np.arange(150), np.arange(1, 151))
    places = np.concatenate([np.arange(1, k + 1) for k in range(1, 151)])
    u = torch.from_numpy(places / (rows + 1))
    for route in (table, on_device(table._content, CPU)):
        assert np.array_equal(route.icdf(rows, u).numpy(), places.astype(np.float32))
