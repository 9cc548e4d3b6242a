"""Labels by their number and their names."""

import numpy as np
import pytest

from calibrated_rewards.reading.labels import Difference, Expected, Label
from calibrated_rewards.reading.labels_of import labels_of


def test_one_and_two() -> None:
    """One label is its logit, two are log-odds, whatever they are called."""
    assert labels_of({0: "3 stars"}) == Label(0)
    assert labels_of({0: "5", 1: "1"}) == Difference(1, 0)


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], (1, 2, 3, 4, 5)),
        (["-1", "0", "+1"], (-1, 0, 1)),
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
