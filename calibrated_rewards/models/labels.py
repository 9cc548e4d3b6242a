"""Make one score of a classifier's outputs: frozen callables, `(n, L) -> (n)`, in float32.

`resolve_labels` chooses one by the names of the labels, or asks where the names do not say which label is better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.label_names import NUMBER, find_number, find_side, find_values, is_generic, is_unnamed


@runtime_checkable
class Labels(Protocol):
    """A function that makes one score of the numbers of each input; higher is better."""

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Compute the score of each input."""


@dataclass(frozen=True)
class Label:
    """The logit of one label. It keeps apart what the probability, near 0 and 1, would make equal.

    >>> Label(1)(np.array([[0.5, 2.0]], np.float32))
    array([2.], dtype=float32)
    """

    index: int = 0
    of: int | None = field(default=None, repr=False, compare=False)
    """Number of labels by the model's config, where that is to be checked."""

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Return logits[:, index]."""
        return logits[:, _within(self.index, logits, self.of)]


@dataclass(frozen=True)
class Difference:
    """The log-odds of a good label against a bad one: of two labels, monotone in the good one's probability.

    >>> Difference(good=1, bad=0)(np.array([[0.5, 2.0]], np.float32))
    array([1.5], dtype=float32)
    """

    good: int = 1
    bad: int = 0
    of: int | None = field(default=None, repr=False, compare=False)
    """Number of labels by the model's config, where that is to be checked."""

    def __post_init__(self) -> None:
        if self.good == self.bad:
            raise ValueError(f"a difference is of two labels, all scores would be 0: got good and bad {self.good}")

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Return logits[:, good] - logits[:, bad]."""
        good, bad = (_within(index, logits, self.of) for index in (self.good, self.bad))
        difference: np.ndarray = logits[:, good] - logits[:, bad]
        return difference


@dataclass(frozen=True)
class Expected:
    """The mean value of the labels under the model's softmax: classes such as 1 to 5 stars, or harmless to severe.

    >>> Expected((1, 2, 3))(np.log(np.array([[0.5, 0.25, 0.25]], np.float32)))
    array([1.75], dtype=float32)
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(map(float, self.values)))
        if len({*self.values}) < 2 or not np.isfinite(self.values).all():
            raise ValueError(f"Expected needs finite values, two different ones or more, got {self.values}")

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Return softmax(logits) @ values."""
        weights = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
        return _dot(self, weights / weights.sum(1, keepdims=True), self.values)


@dataclass(frozen=True)
class Levels:
    """The expected level of one dimension of several: a softmax over its own logits, which begin at `first`.

    >>> Levels((3, 1), first=1)(np.log(np.array([[9.0, 0.75, 0.25]], np.float32)))
    array([2.5], dtype=float32)
    """

    values: tuple[float, ...]
    """The value of each level in the order of its logits; higher is better."""
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(map(float, self.values)))
        if len({*self.values}) < 2 or not np.isfinite(self.values).all() or self.first < 0:
            raise ValueError(f"Levels needs finite values, two different ones or more, and first >= 0, got {self!r}")

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Return softmax(logits[:, first:...]) @ values."""
        end = self.first + len(self.values)
        if end > logits.shape[1]:
            raise ValueError(f"{self} reads the logits {self.first} to {end - 1}, the model has {logits.shape[1]}")
        return Expected(self.values)(logits[:, self.first : end])


@dataclass(frozen=True)
class Ordinal:
    """The expected class of an ordinal model, whose k-th logit is for `class > k`: the sum of their sigmoids.

    >>> Ordinal()(np.zeros((1, 4), np.float32))
    array([2.], dtype=float32)
    """

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Return sigmoid(logits).sum(1)."""
        above = 0.5 + 0.5 * np.tanh(logits.astype(np.float64) / 2)
        return _dot(self, above, np.ones(logits.shape[1]))


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of the numbers: attributes such as helpful, correct, verbose, with weights of yours.

    >>> Weighted((1.0, -0.5))(np.array([[2.0, 1.0]], np.float32))
    array([1.5], dtype=float32)
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if not any(self.weights) or not np.isfinite(self.weights).all():
            raise ValueError(f"Weighted needs finite weights, one that is not 0 or more, got {self.weights}")

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """Return logits @ weights."""
        return _dot(self, logits.astype(np.float64), self.weights)


def _within(index: int, logits: Float32[np.ndarray, "n L"], of: int | None) -> int:
    if of is not None and of != logits.shape[1]:
        raise ValueError(
            Message(
                f"the model's config names {of} labels, its head gives {logits.shape[1]}: say how they make one score, "
                f"with {setting('labels', 'Label(i), Difference(good, bad), Expected(values) or Weighted(weights)')}"
            )
        )
    if not -logits.shape[1] <= index < logits.shape[1]:
        raise IndexError(
            Message(
                f"the model has no label {index}, it has {logits.shape[1]}: name one that it has, with "
                f"{setting('labels', 'Label(i)')}"
            )
        )
    return index


def _dot(labels: Labels, numbers: np.ndarray, values: Sequence[float] | np.ndarray) -> Float32[np.ndarray, " n"]:
    if len(values) != numbers.shape[1]:
        raise ValueError(f"{labels} has {len(values)} values, the model has {numbers.shape[1]} labels")
    return np.asarray(numbers @ np.asarray(values), np.float32)


# Versions of the rules by which labels are read. The first knew these pairs of names, the good one first.
FIRST_RULES, RULES = 1, 2
FIRST_PAIRS = {
    *(("positive", "negative"), ("good", "bad"), ("chosen", "rejected"), ("accepted", "rejected")),
    *(("helpful", "unhelpful"), ("safe", "unsafe"), ("harmless", "harmful"), ("acceptable", "unacceptable")),
    *(("yes", "no"), ("true", "false"), ("correct", "incorrect"), ("pass", "fail")),
}
HOW = "say how they make one score, with " + setting(
    "labels",
    "Difference(good, bad), Label(i), Expected(values), Ordinal() or Weighted(weights) of calibrated_rewards.models",
    option="--label HOW: 1-0 (logit 1 less logit 0), 2, expected:1,2,3, levels:3:3,2,1 (of logits 3 to 5), "
    "ordinal or weighted:1,-0.5",
)
COST = setting("cost", "True", option="--cost")
ASK_COST = f"say {COST}, which makes the score minus that, or " + (
    f"{setting('cost', 'False', option='--no-cost')} if it is meant so"
)
# Far enough apart for a softmax to be sure.
SURE = 20.0


def labels_of(names: Mapping[int, str]) -> Labels:
    """Choose labels by their names: one's logit, log-odds of the better of two, the expected value of more.

    Labels that nobody named (LABEL_0) count as transformers' own examples do: of two the second is the good one. All
    other names have to say which is better, or this asks.

    >>> labels_of({0: "LABEL_0"})
    Label(index=0)
    >>> labels_of({0: "LABEL_0", 1: "LABEL_1"}), labels_of({0: "preferred", 1: "dispreferred"})
    (Difference(good=1, bad=0), Difference(good=0, bad=1))
    >>> labels_of({0: "1 star", 1: "2 stars", 2: "3 stars"})
    Expected(values=(1.0, 2.0, 3.0))
    """
    ordered = order_names(names)
    if len(ordered) == 1:
        return Label(0, of=1)
    if len(ordered) == 2:
        return _better_of_two(ordered)
    values = find_values(ordered)
    # Of three and more, words say an order (bad, fair, good) but not how far apart they are.
    if values is None or any(find_number(name) is None for name in ordered):
        raise ValueError(Message(f"the model has {len(ordered)} labels, {', '.join(ordered)}: {HOW}"))
    return Expected(values)


def order_names(names: Mapping[int, str]) -> list[str]:
    """Return the names in the order of the logits, which is the order of the ids."""
    return [str(names[i]) for i in sorted(names, key=int)]


def resolve_labels(labels: Labels | None, config: Any, cost: bool | None = None) -> Labels:
    """Return the labels to score with: those given, or what the names say. Refuse labels that contradict the config.

    `cost` says whether the score will be negated afterwards; None: the user has not said.
    """
    names = order_names(config.id2label)
    if labels is None:
        _check_single(names, cost)
        labels = labels_of(config.id2label)
    elif isinstance(labels, Ordinal):
        check_ordinal(config)
    check_direction(labels, names, cost)
    return labels


def check_direction(labels: Labels, names: list[str], cost: bool | None) -> None:
    """Refuse a score that rises from the label whose name says good to the one whose name says bad.

    `Levels` reads a part of the labels, and those of other dimensions say nothing of it.
    """
    read = labels
    if isinstance(labels, Levels):
        read, names = Expected(labels.values), names[labels.first : labels.first + len(labels.values)]
    sides = [None if is_generic(name) else find_side(name) for name in names]
    values = find_values(names) or tuple(0.0 if s is None else float(s) for s in sides)
    if not any(sides) or len({*values}) < 2 or (cost is False):
        return
    best, worst = int(np.argmax(values)), int(np.argmin(values))
    try:
        rise = float(_score_if_sure(read, best, len(names)) - _score_if_sure(read, worst, len(names)))
    except (ValueError, IndexError):
        return  # labels that do not fit the head are refused where the head's outputs are counted
    if rise * (-1 if cost else 1) >= 0:
        return
    if cost:
        raise ValueError(
            Message(
                f"{labels} already gives {names[best]!r} a higher score than {names[worst]!r}: "
                f"{COST} would turn it round; leave it out"
            )
        )
    raise ValueError(Message(f"{labels} gives {names[worst]!r} a higher score than {names[best]!r}: {ASK_COST}"))


def check_ordinal(config: Any) -> None:
    """Refuse `Ordinal` for a head of classes: the logits of a softmax are not those of `class > k`."""
    names = order_names(config.id2label)
    problem = getattr(config, "problem_type", None)
    trained_as_classes = problem == "single_label_classification"
    if not trained_as_classes and (_says_ordinal(config) or problem == "multi_label_classification"):
        return
    values = find_values(names)
    levels = all(map(is_unnamed, names)) or (
        values is not None and list(values) in (sorted(values), sorted(values)[::-1])
    )
    if levels and not trained_as_classes:
        return
    why = "its config says problem_type='single_label_classification'" if trained_as_classes else "they are classes"
    ends = find_side(names[0]), find_side(names[-1])
    falling = all(end is not None for end in ends) and (ends[0] or 0) > (ends[1] or 0)
    turn = f" and {COST}, as {names[-1]!r} is worse than {names[0]!r}" if falling else ""
    numbers = ",".join(map(str, range(len(names))))
    expected = setting("labels", f"Expected(({numbers.replace(',', ', ')}))", option=f"--label expected:{numbers}")
    raise ValueError(
        Message(
            f"ordinal labels read a head whose k-th logit says `class > k`, and the labels {', '.join(names)} are "
            f"those of a softmax: {why}. Say {expected}{turn}"
        )
    )


def apply_first_rules(names: Mapping[int, str]) -> Labels:
    """Read labels by version 1 of these rules, with which saved rewards of that time go on."""
    ordered = order_names(names)
    if len(ordered) == 1:
        return Label(0, of=1)
    if len(ordered) == 2:
        good = 0 if tuple(name.strip().casefold() for name in ordered) in FIRST_PAIRS else 1
        return Difference(good=good, bad=1 - good, of=2)
    numbers = [NUMBER.findall(name) for name in ordered]
    if any(map(is_unnamed, ordered)) or any(len(each) != 1 for each in numbers):
        return labels_of(names)
    return Expected(tuple(float(each[0].replace("\u2212", "-")) for each in numbers))


def _better_of_two(names: list[str]) -> Labels:
    if all(map(is_unnamed, names)):
        return Difference(good=1, bad=0, of=2)
    values = find_values(names)
    if values is None or values[0] == values[1]:
        raise ValueError(
            Message(
                "the model has 2 labels, and their names do not say which is the better one: if it is "
                f"{names[0]!r}, say {setting('labels', 'Difference(good=0, bad=1)', option='--label 0-1')}; if "
                f"{names[1]!r}, {setting('labels', 'Difference(good=1, bad=0)', option='--label 1-0')}"
            )
        )
    good = int(values[1] > values[0])
    return Difference(good=good, bad=1 - good, of=2)


def _check_single(names: list[str], cost: bool | None) -> None:
    """Refuse a single label whose name says that more of it is worse, unless the user has said whether it is a cost."""
    if len(names) != 1 or cost is False:
        return
    if find_side(names[0]) == -1 and not cost:
        raise ValueError(Message(f"the model's only label is {names[0]!r}, of which more is worse: {ASK_COST}"))
    if find_side(names[0]) == 1 and cost and not is_generic(names[0]):
        raise ValueError(Message(f"the model's only label is {names[0]!r}, of which more is better: leave out {COST}"))


def _score_if_sure(labels: Labels, label: int, count: int) -> np.floating[Any]:
    """Return the score of an input that the model is sure belongs to this label."""
    logits = np.full((1, count), -SURE, np.float32)
    # Of an ordinal head all logits up to the class's are high.
    logits[0, : label + 1] = SURE if isinstance(labels, Ordinal) else logits[0, : label + 1]
    logits[0, label] = SURE
    score: np.floating[Any] = labels(logits)[0]
    return score


def _says_ordinal(config: Any) -> bool:
    """Return whether a setting of the config names an ordinal head or loss."""
    settings = config.to_dict()
    has_setting = any("ordinal" in key.casefold() and value for key, value in settings.items())
    values = {value.casefold() for value in settings.values() if isinstance(value, str)}
    return has_setting or bool(values & {"ordinal", "ordinal_regression", "coral", "corn", "cumulative_link"})
