"""How the labels that a classifier was trained with make one score, where their number or their names say it."""

import re
from collections.abc import Mapping

from calibrated_rewards.reading.labels import Difference, Expected, Label, Labels

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
# The names that transformers gives to labels that nobody named.
UNNAMED = re.compile(r"LABEL_\d+")


def labels_of(names: Mapping[int, str]) -> Labels:
    """One label: its logit. Two: the second's log-odds. More: the expected value of the numbers in their names.

    >>> labels_of({0: "LABEL_0"})
    Label(index=0)
    >>> labels_of({0: "rejected", 1: "chosen"})
    Difference(good=1, bad=0)
    >>> labels_of({0: "1 star", 1: "2 stars", 2: "3 stars"})
    Expected(values=(1.0, 2.0, 3.0))
    """
    if len(names) == 1:
        return Label(0)
    if len(names) == 2:
        return Difference(good=1, bad=0)
    found = [NUMBER.findall(names[i]) for i in range(len(names))]
    if any(UNNAMED.fullmatch(name) for name in names.values()) or any(len(numbers) != 1 for numbers in found):
        raise ValueError(
            f"the model has {len(names)} labels, {dict(names)}: say how they make one score, with labels= Label(i), "
            "Difference(good, bad), Expected(values) or Weighted(weights) of calibrated_rewards.reading.labels"
        )
    return Expected(tuple(float(numbers[0]) for numbers in found))
