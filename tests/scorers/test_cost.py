"""Cost: minus a scorer, whatever that answers with."""

import pickle

import numpy as np
import pytest
import torch

from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.protocol import fingerprint, score


def length(_prompts, completions):
    """Their lengths."""
    return [float(len(c)) for c in completions]


def half_precision(_prompts, completions):
    """Their lengths, as a bfloat16 tensor."""
    return torch.tensor([len(c) for c in completions], dtype=torch.bfloat16)


@pytest.mark.parametrize("scorer", [length, half_precision])
def test_it_is_minus_the_scorer(scorer) -> None:
    """A long completion scores low, as float32, for lists and for tensors."""
    scores = Cost(scorer)(["p", "q", "p"], ["a", "abc", ""])

    assert scores.dtype == np.float32
    assert scores.tolist() == [-1.0, -3.0, 0.0]


def test_a_cost_of_a_cost_is_the_scorer() -> None:
    """Two signs cancel."""
    texts = ["a", "abc", ""]

    assert np.array_equal(Cost(Cost(length))(texts, texts), score(length, texts, texts))


def test_nothing_costs_nothing() -> None:
    """No pairs, no scores."""
    assert Cost(length)([], []).shape == (0,)


def test_an_answer_is_checked() -> None:
    """A nan is named before its sign is turned."""
    with pytest.raises(ValueError, match="finite number"):
        Cost(lambda prompts, completions: [float("nan")])(["p"], ["c"])


def test_it_is_known_again() -> None:
    """Its fingerprint holds the scorer's, and is not the scorer's; it pickles."""
    cost = Cost(length)

    assert cost.fingerprint() == {"kind": "cost", "of": fingerprint(length)} != fingerprint(length)
    assert pickle.loads(pickle.dumps(cost)) == cost
