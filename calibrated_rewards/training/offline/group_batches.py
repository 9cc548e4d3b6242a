"""Groups of a prompt and its completions as tokens, and batches of groups that go through a model together."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from calibrated_rewards.models.shared_prefix import repeated
from calibrated_rewards.training.offline.frozen_layers import GroupStates

# A completion shorter than this part of the longest is not padded to it, but read in another batch.
LEAST_FULL = 0.6


class Group(NamedTuple):
    """The tokens of a prompt and of its completions, each with the token that ended it, if one did."""

    prompt: list[int]
    completions: list[list[int]]
    states: GroupStates | None = None
    """The hidden states that enter the first trained layer, in place of the tokens, if they are known."""

    @property
    def longest(self) -> int:
        """The number of tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))

    @property
    def tokens(self) -> int:
        """The number of tokens of all completions, padded to the longest."""
        return max(map(len, self.completions)) * len(self.completions)

    def take(self, at: Sequence[int]) -> "Group":
        """Return the group with some of its completions."""
        states = self.states and GroupStates(self.states.prompt, [self.states.completions[i] for i in at])
        return Group(self.prompt, [self.completions[i] for i in at], states)


@dataclass(frozen=True)
class Batch:
    """Groups that are read together: all their completions in one list, each with the number of its group."""

    groups: Sequence[Group]
    trees: bool = False
    """The completions of a group are read as a tree: what several begin with is read once."""

    @cached_property
    def completions(self) -> list[list[int]]:
        """The completions of all groups."""
        return [row for group in self.groups for row in group.completions]

    @cached_property
    def owners(self) -> list[int]:
        """The number of each completion's group."""
        return [i for i, group in enumerate(self.groups) for _ in group.completions]

    @cached_property
    def has_states(self) -> bool:
        """Tell if the groups are read from states."""
        return self.groups[0].states is not None

    @cached_property
    def prompt_states(self) -> list[Tensor]:
        """The states of the prompts, where the groups have states."""
        return [group.states.prompt for group in self.groups if group.states is not None]

    @cached_property
    def states(self) -> list[Tensor]:
        """The states of all completions, where the groups have states."""
        return [row for group in self.groups if group.states is not None for row in group.states.completions]

    def split(self, values: Tensor) -> list[Tensor]:
        """Split the values of all completions into those of each group."""
        return list(torch.split(values, [len(group.completions) for group in self.groups]))


class Opening(NamedTuple):
    """Prompts that were read: their keys and values, and the hidden states that predict the next tokens."""

    cache: Cache
    hidden: Tensor
    """(prompts, hidden size)"""
    mask: Tensor
    """(prompts, tokens): 0 where a prompt is padded on the right."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that a completion's log-probability takes from the prompts."""
        layers: Any = self.cache.layers
        return [self.hidden, *(each for layer in layers for each in (layer.keys, layer.values))]

    @property
    def keeps_all(self) -> bool:
        """Tell if every layer keeps the keys and values of all tokens: none has a window."""
        return {*map(type, self.cache.layers)} == {DynamicLayer}

    def detach(self) -> "Opening":
        """Cut the graph: the tensors are leaves, which collect the gradients of several backward passes."""
        return self._replace(cache=self._change(_leaf), hidden=_leaf(self.hidden))

    def select(self, owners: Tensor) -> Cache:
        """Return the keys and values behind which rows are read, each behind its own prompt's."""
        if len(self.mask) == 1:
            return repeated(self.cache, len(owners))
        return self._change(lambda tensor: tensor.index_select(0, owners))

    def copy_cache(self) -> Cache:
        """Return keys and values that others may be added behind, while these stay as they are."""
        return self._change(_keep)

    def _change(self, change: Any) -> Cache:
        cache = copy.copy(self.cache)
        layers: Any = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
        cache.layers = layers
        return cache


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def split_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Split the numbers of rows into batches of at most `most`, longest first, without rows that are mostly padding.

    Rows without tokens are in none.

    >>> [*split_by_length([3, 9, 8, 0, 2, 7], 2)]
    [[1, 2], [5], [0, 4]]
    """
    batch: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if batch and (len(batch) == most or lengths[i] < LEAST_FULL * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
