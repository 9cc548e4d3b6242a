"""Labels by their number and their names."""

import numpy as np
import pytest

from calibrated_rewards.reading.labels import Difference, Expected, Label
from calibrated_rewards.reading.labels_of import GOOD_AND_BAD, labels_of


def test_one_and_two() -> None:
    """One label is its logit, two are log-odds, the second's unless their names say otherwise."""
    assert labels_of({0: "3 stars"}) == Label(0)
    assert labels_of({0: "5", 1: "1"}) == Difference(1, 0)


@pytest.mark.parametrize(("good", "bad"), sorted(GOOD_AND_BAD))
def test_names_of_good_and_bad(good: str, bad: str) -> None:
    """Where the names say which of two labels is the good one, it is, in either order and any case."""
    assert labels_of({0: good.upper(), 1: f" {bad}"}) == Difference(good=0, bad=1)
    assert labels_of({0: bad, 1: good.capitalize()}) == Difference(good=1, bad=0)
    assert labels_of({0: good, 1: "something else"}) == Difference(good=1, bad=0)


def test_ids_that_do_not_count_from_zero() -> None:
    """The outputs are in the order of the ids, also where these are 1 to n or stand in another order."""
    assert labels_of({3: "3 stars", 1: "1 star", 2: "2 stars"}) == Expected((1, 2, 3))
    assert labels_of({10: "bad", 9: "good"}) == Difference(good=0, bad=1)


@pytest.mark.parametrize("names", [["LABEL_0"], ["bad", "good"], ["good", "bad"], ["1", "2", "3"]])
def test_head_of_another_width(names: list[str]) -> None:
    """A head with another number of outputs than the config has names is not read by its first columns."""
    with pytest.raises(ValueError, match=rf"{len(names)} (labels|values).* 4"):
        labels_of(dict(enumerate(names)))(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], (1, 2, 3, 4, 5)),
        (["-1", "0", "+1"], (-1, 0, 1)),
        (["grade-1", "grade-2", "grade-3"], (1, 2, 3)),
        (["score -1", "score: .5", "\u22122"], (-1, 0.5, -2)),
        (["score: 0.5", "score: 1.25", "score: 2"], (0.5, 1.25, 2)),
    ],
)
def test_numbers_in_names(names: list[str], values: tuple[float, ...]) -> None:
    """Names with one number each are worth those numbers."""
    found = labels_of(dict(enumerate(names)))
    assert found == Expected(values)
    sure = np.full((1, len(names)), -100, np.float32)
    sure[0, -1] = 100
    assert found(sure)[0] == values[-1]


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["bad", "fair", "good"], ["1-2", "3-4", "5-6"]])
def test_no_numbers(names: list[str]) -> None:
    """Labels without a name, without a number or with two are for the user to decide."""
    with pytest.raises(ValueError, match=r"3 labels.*say how they make one score") as raised:
        labels_of(dict(enumerate(names)))
    assert names[2] in str(raised.value)
