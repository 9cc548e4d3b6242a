"""Routes by which groups are read, and when two of them agree: in values and gradients, but for rounding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibrated_rewards.models.batches import Rounding, coarsest
from calibrated_rewards.models.shared_prefix import CHECKED_ROWS, FARTHER
from calibrated_rewards.training.offline.group_batches import Group

# Gradients that are the same but for rounding: the norm of their difference, as a part of the norm.
SAME_GRADIENT = {torch.float32: 1e-3}
SAME_GRADIENT_16_BIT = 0.2


class Size(NamedTuple):
    """How far groups reach that were read as trees: what a later batch is compared for again."""

    longest: int
    """The most tokens of a prompt, with the nodes behind it."""
    padding: int
    """The most tokens that a prompt was padded with."""


@dataclass
class Route:
    """How groups are read: behind a shared prompt, in padded rows, or each row alone; as far as groups have shown."""

    shared: bool = True
    padded: bool = True
    together: bool = True
    trees: bool = True
    """Completions that begin alike share what they begin with, behind a shared prompt."""
    longest: int = 0
    """The longest prompt of a group that was compared."""
    padding: int = -1
    """The most tokens that a prompt was padded with among groups that were read together and compared."""
    tree_sizes: dict[bool, Size] = field(default_factory=dict)
    """The sizes of what was compared as trees, of groups without states and with them."""

    def covers_trees(self, with_states: bool, size: Size) -> bool:
        """Tell if trees were compared that are hardly smaller."""
        seen = self.tree_sizes.get(with_states)
        return seen is not None and all(n <= FARTHER * m for n, m in zip(size, seen, strict=True))

    def add_trees(self, with_states: bool, size: Size) -> None:
        """Note that trees are compared."""
        seen = self.tree_sizes.get(with_states, size)
        self.tree_sizes[with_states] = Size(max(size.longest, seen.longest), max(size.padding, seen.padding))


class Answer(NamedTuple):
    """What a route gives for some groups."""

    values: Tensor
    """(completions, 1)"""
    gradients: list[Tensor]
    """Those of the sum of the values, by some of the weights."""


def agree(answer: Answer, expected: Answer, move: Callable[[], Tensor], model: Any) -> bool:
    """Tell if two routes give the same; `move` gives the values of a model that is moved by one rounding."""
    kind = coarsest(model)
    limit = SAME_GRADIENT.get(kind, SAME_GRADIENT_16_BIT)
    pairs = list(zip(answer.gradients, expected.gradients, strict=True))
    apart = math.sqrt(sum(float((a - b).float().square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.float().square().sum()) for _, b in pairs))
    rounding = Rounding(farthest=math.inf)
    excess = rounding.excess(answer.values, expected.values, lambda: (expected.values, move()), model)
    return excess <= 1 and apart <= limit * size


def take_few(group: Group) -> Group:
    """Take completions of a group to compare routes by: the shortest, the longest and some between."""
    order = sorted(range(len(group.completions)), key=lambda i: len(group.completions[i]))
    some = [order[i * (len(order) - 1) // (CHECKED_ROWS - 1)] for i in range(CHECKED_ROWS)]
    return group.take(some if len(order) > CHECKED_ROWS else order)


def choose_ends(groups: Sequence[Group]) -> list[Group]:
    """Choose the groups with the shortest and the longest prompt."""
    order = sorted(groups, key=lambda group: len(group.prompt))
    return [order[0], order[-1]] if len(order) > 1 else order
