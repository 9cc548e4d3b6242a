"""From several numbers to one score: each rule against its formula in torch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from calibrated_rewards.models.labels import Difference, Expected, Label, Labels, Ordinal, Weighted

LOGITS = np.random.default_rng(0).normal(scale=3, size=(50, 4)).astype(np.float32)
TENSOR = torch.tensor(LOGITS, dtype=torch.float64)
VALUES = (1.0, 2.0, 3.0, 5.0)

BY_TORCH = {
    Label(): TENSOR[:, 0],
    Label(2): TENSOR[:, 2],
    Label(-1): TENSOR[:, 3],
    Difference(): TENSOR[:, 1] - TENSOR[:, 0],
    Difference(good=0, bad=-1): TENSOR[:, 0] - TENSOR[:, 3],
    Expected(VALUES): TENSOR.softmax(1) @ torch.tensor(VALUES, dtype=torch.float64),
    Ordinal(): TENSOR.sigmoid().sum(1),
    Weighted(VALUES): TENSOR @ torch.tensor(VALUES, dtype=torch.float64),
}


@pytest.mark.parametrize("labels", BY_TORCH, ids=repr)
def test_each_rule_is_its_formula(labels: Labels) -> None:
    """In float32, one number for each row."""
    found = labels(LOGITS)

    assert (found.shape, found.dtype) == ((50,), np.float32)
    np.testing.assert_allclose(found, BY_TORCH[labels].numpy(), rtol=1e-6, atol=1e-6)
    assert labels(LOGITS[:0]).shape == (0,)


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_no_number_is_too_large(logits: list[float]) -> None:
    """Softmax and sigmoid neither overflow nor warn; the mean of the values lies among them."""
    rows = np.array([logits], np.float32)

    assert 1 - 1e-6 <= Expected(VALUES)(rows)[0] <= 5 + 1e-6
    assert 0 <= Ordinal()(rows)[0] <= 4


def test_two_labels_order_alike() -> None:
    """The log-odds of two labels are those of their softmax, and tell apart what probabilities make 1."""
    two = LOGITS[:, :2] * 20
    probability = torch.tensor(two).softmax(1)[:, 1].numpy()
    odds = Difference()(two)

    assert (np.diff(probability[np.argsort(odds)]) >= 0).all()
    assert len(set(odds)) > len(set(probability))


def test_a_label_minus_itself_is_no_score() -> None:
    """All scores would be 0."""
    with pytest.raises(ValueError, match="a difference is of two labels"):
        Difference(good=1, bad=1)


def test_labels_that_there_are_not() -> None:
    """The rule and how many there are is in the error."""
    for labels in (Label(4), Label(-5), Difference(good=4, bad=0), Difference(good=0, bad=4)):
        with pytest.raises(IndexError, match=r"no label .*, it has 4: name one that it has, with labels=Label\(i\)$"):
            labels(LOGITS)
    for rule in (Expected, Weighted):
        with pytest.raises(ValueError, match=rf"{rule.__name__}\(.*\) has 3 values, the model has 4 labels"):
            rule((1, 2, 3))(LOGITS)


@pytest.mark.parametrize("labels", BY_TORCH, ids=repr)
def test_rules_are_values(labels: Any) -> None:
    """They compare and print as the call that makes them, which a fingerprint is made of."""
    assert eval(repr(labels)) == labels
    assert hash(labels) == hash(eval(repr(labels)))
    assert repr(Expected((1, 2))) == repr(Expected((1.0, 2.0)))
