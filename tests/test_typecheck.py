"""The run-time type checker of the tests: what it refuses, and how often a function is checked."""

import jaxtyping
import numpy as np
import pytest
import typecheck
from jaxtyping import Float


@typecheck.check(typechecker=typecheck.checked)
def double(value: float) -> float:
    """Return twice the value, or a text where it is 13."""
    return "26" if value == 13 else 2 * value  # type: ignore[return-value]


@typecheck.check(typechecker=typecheck.checked)
def add(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Add arrays of one length."""
    return one + other


def test_wrong_types_are_refused() -> None:
    """Of arguments, of what is returned, and of sizes that differ within a call; an int is a float."""
    assert double(1) == 2
    for wrong in ("1", 13):
        with pytest.raises(jaxtyping.TypeCheckError):
            double(wrong)  # type: ignore[arg-type]
    assert add(np.ones(2), np.ones(2)).tolist() == [2.0, 2.0]
    assert len(add(np.ones(3), np.ones(3))) == 3
    with pytest.raises(jaxtyping.TypeCheckError):
        add(np.ones(2), np.ones(1))


def test_every_call_is_checked_until_there_are_many() -> None:
    """All of the first thousand in a test, and one in 16 of those that come later."""
    refused = []
    for call in range(typecheck.MOST + 5 * typecheck.EVERY):
        try:
            double(13)
        except jaxtyping.TypeCheckError:
            refused.append(call)
    assert refused[: typecheck.MOST] == [*range(typecheck.MOST)]
    assert len(refused) == typecheck.MOST + 5


def test_each_test_counts_anew() -> None:
    """What was called often in another test is checked from the first call."""
    assert not typecheck.called
    for _ in range(typecheck.MOST):
        double(1)
    double(13)  # the first of those that are not checked
    typecheck.count_anew()
    with pytest.raises(jaxtyping.TypeCheckError):
        double(13)
