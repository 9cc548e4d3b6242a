"""From a model's numbers for an input to one score: frozen callables, `(n, L) -> (n)`, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.files import Message, setting


@runtime_checkable
class Labels(Protocol):
    """Makes one score of the numbers of each input; higher is better."""

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """The scores."""


@dataclass(frozen=True)
class Label:
    """The logit of one label. It keeps apart what the probability, near 0 and 1, would make equal.

    >>> Label(1)(np.array([[0.5, 2.0]], np.float32))
    array([2.], dtype=float32)
    """

    index: int = 0
    of: int | None = field(default=None, repr=False, compare=False)
    """How many labels the model is said to have, where that is to be checked."""

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """logits[:, index]."""
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
    """How many labels the model is said to have, where that is to be checked."""

    def __post_init__(self) -> None:
        if self.good == self.bad:
            raise ValueError(f"a difference is of two labels, all scores would be 0: got good and bad {self.good}")

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """logits[:, good] - logits[:, bad]."""
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

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """softmax(logits) @ values."""
        weights = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
        return _dot(self, weights / weights.sum(1, keepdims=True), self.values)


@dataclass(frozen=True)
class Ordinal:
    """The expected class of an ordinal model, whose k-th logit is for `class > k`: the sum of their sigmoids.

    >>> Ordinal()(np.zeros((1, 4), np.float32))
    array([2.], dtype=float32)
    """

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """sigmoid(logits).sum(1)."""
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

    def __call__(self, logits: Float32[np.ndarray, "n L"], /) -> Float32[np.ndarray, " n"]:
        """logits @ weights."""
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
