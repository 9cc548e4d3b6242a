"""Errors of a model's own forward: a sentence with the model's name, the length, the cause, and what to do."""

import pytest
import torch
from torch import nn

from calibrated_rewards.models.parts import RAISED, UnreadError, reading_errors


@pytest.mark.parametrize("kind", RAISED)
def test_errors_become_sentences(kind: type[Exception]) -> None:
    """Whatever their class; the library's own error is the cause."""
    with (
        pytest.raises(UnreadError, match=r"Linear does not read an input of 2 tokens: .*language unknown") as raised,
        reading_errors(nn.Linear(1, 1), 2),
    ):
        raise kind("language unknown")

    assert type(raised.value.__cause__) is kind


def test_memory_that_does_not_suffice_is_not_that() -> None:
    """Batches are halved by the error itself; and what is no error of a forward passes through."""
    for error in (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
        KeyboardInterrupt(),
        FloatingPointError("nan"),
    ):
        with pytest.raises(type(error)), reading_errors(nn.Linear(1, 1), 2):
            raise error
