"""How the labels that a classifier was trained with make one score, where their number or their names say it."""

import re
from collections.abc import Mapping

from calibrated_rewards.error_messages import Message, setting
from calibrated_rewards.reading.labels import Difference, Expected, Label, Labels

# A sign stands alone: the hyphen of "grade-1" is none. \u2212 is the minus sign of typographers.
NUMBER = re.compile(r"(?:(?<![\w.])[-+\u2212])?(?:\d+(?:\.\d+)?|(?<!\w)\.\d+)")
# The names that transformers gives to labels that nobody named.
UNNAMED = re.compile(r"LABEL_\d+")
# Names of two labels of which it is known, in any case, which is the better one: it is so named, good first.
GOOD_AND_BAD = {
    ("positive", "negative"),
    ("good", "bad"),
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("helpful", "unhelpful"),
    ("safe", "unsafe"),
    ("harmless", "harmful"),
    ("acceptable", "unacceptable"),
    ("yes", "no"),
    ("true", "false"),
    ("correct", "incorrect"),
    ("pass", "fail"),
}


def labels_of(names: Mapping[int, str]) -> Labels:
    """One label: its logit. Two: the second's log-odds, or the better one's. More: the mean of their names' numbers.

    The better of two is known where their names are one of `GOOD_AND_BAD`.

    >>> labels_of({0: "LABEL_0"})
    Label(index=0)
    >>> labels_of({0: "LABEL_0", 1: "LABEL_1"}), labels_of({0: "chosen", 1: "rejected"})
    (Difference(good=1, bad=0), Difference(good=0, bad=1))
    >>> labels_of({0: "1 star", 1: "2 stars", 2: "3 stars"})
    Expected(values=(1.0, 2.0, 3.0))
    """
    # The logits are in the order of the ids, whatever these are.
    ordered = [str(names[i]) for i in sorted(names, key=int)]
    if len(ordered) == 1:
        return Label(0, of=1)
    if len(ordered) == 2:
        first, second = (name.strip().casefold() for name in ordered)
        return Difference(good=0, bad=1, of=2) if (first, second) in GOOD_AND_BAD else Difference(good=1, bad=0, of=2)
    found = [NUMBER.findall(name) for name in ordered]
    if any(UNNAMED.fullmatch(name) for name in ordered) or any(len(numbers) != 1 for numbers in found):
        raise ValueError(
            Message(
                f"the model has {len(names)} labels, {', '.join(map(str, names.values()))}: say how they make one "
                f"score, with {setting('labels', 'Label(i), Difference(good, bad), Expected(...) or Weighted(...)')}"
            )
        )
    return Expected(tuple(float(numbers[0].replace("\u2212", "-")) for numbers in found))
