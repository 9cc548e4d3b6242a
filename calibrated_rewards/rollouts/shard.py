"""A shard: some prompts with their rollouts and scores, the unit of work, of files and of what a kill can cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.samplers.protocol import Rollout


class Planned(NamedTuple):
    """A prompt that is to have rollouts."""

    key: bytes
    prompt: Prompt
    rendered: str | None = None
    """What the policy reads, where that is another text."""


class State(NamedTuple):
    """How far a shard is: for each of its prompts how many rollouts there are, and how many have each score."""

    drawn: list[int]
    scored: dict[str, list[int]]


@dataclass(frozen=True)
class Shard:
    """Prompts and what there is of each: rollouts by number, their seeds, and the scores of the first of them."""

    prompts: tuple[Planned, ...]
    rollouts: tuple[tuple[Rollout, ...], ...]
    seeds: tuple[tuple[int | None, ...], ...]
    scores: dict[str, tuple[Float32[np.ndarray, " _"], ...]] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """How far it is."""
        return State([*map(len, self.rollouts)], {name: [*map(len, each)] for name, each in self.scores.items()})

    def drawn(self, more: Sequence[Sequence[Rollout]], seeds: Sequence[Sequence[int | None]]) -> "Shard":
        """With more rollouts for each prompt."""
        rollouts = tuple((*have, *new) for have, new in zip(self.rollouts, more, strict=True))
        return replace(
            self,
            rollouts=rollouts,
            seeds=tuple((*have, *new) for have, new in zip(self.seeds, seeds, strict=True)),
        )

    def scored(self, name: str, more: Sequence[Float32[np.ndarray, " _"]]) -> "Shard":
        """With more scores of one reward model for each prompt."""
        have = self.scores.get(name, (np.empty(0, np.float32),) * len(self.prompts))
        both = tuple(np.concatenate([old, new]) for old, new in zip(have, more, strict=True))
        return replace(self, scores={**self.scores, name: both})


def as_scored(rollout: Rollout) -> Completion:
    """A rollout's completion as scorers read it: the form in which it is kept, whoever made it."""
    said = rollout.completion
    return said if isinstance(said, str) or not len(said) else plain_messages(said)


def empty(prompts: Sequence[Planned]) -> Shard:
    """A shard of which nothing is done."""
    nothing: tuple[tuple[Any, ...], ...] = ((),) * len(prompts)
    return Shard(tuple(prompts), nothing, nothing)
