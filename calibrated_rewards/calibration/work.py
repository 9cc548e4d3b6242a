"""The work on a shard: draw the rollouts that are missing, score those that have no score."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.calibration.shards import Shard, State, as_scored
from calibrated_rewards.files import Message, setting
from calibrated_rewards.samplers.protocol import Rollout, Sampler, sample, seeds_of
from calibrated_rewards.scorers.protocol import Scorer, score


class Task(NamedTuple):
    """A shard, and how many rollouts each of its prompts is to have."""

    name: str
    shard: Shard
    wanted: list[int]


@dataclass(frozen=True)
class Work:
    """What makes a shard complete: the same rollouts and scores whoever does it, and however often."""

    sampler: Sampler | None
    scorers: Mapping[str, Scorer]
    seed: int

    def __call__(self, task: Task) -> Task:
        """The task with its shard done."""
        shard = task.shard
        for shard in self.steps(task):  # noqa: B007 (the last one counts)
            pass
        return task._replace(shard=shard)

    def steps(self, task: Task) -> Iterator[Shard]:
        """The shard after each step that is worth keeping: sampled, then scored by each reward model."""
        shard = task.shard
        if any(want > have for want, have in zip(task.wanted, shard.state.drawn, strict=True)):
            shard = self._sampled(shard, task.wanted)
            yield shard
        for name, scorer in self.scorers.items():
            if not _is_scored(shard.state, name):
                shard = _scored(shard, name, scorer)
                yield shard

    def is_done(self, state: State | None, wanted: Sequence[int]) -> bool:
        """Whether there is nothing left to do."""
        return (
            state is not None
            and all(want <= have for want, have in zip(wanted, state.drawn, strict=True))
            and all(_is_scored(state, name) for name in self.scorers)
        )

    def _sampled(self, shard: Shard, wanted: Sequence[int]) -> Shard:
        if self.sampler is None:
            raise ValueError(Message(f"rollouts are missing, and nothing draws them: name {setting('sampler')}"))
        have = shard.state.drawn
        seeds = [
            seeds_of(self.seed, prompt.key, done, max(done, want))
            for prompt, done, want in zip(shard.prompts, have, wanted, strict=True)
        ]
        lacking = [i for i, own in enumerate(seeds) if own]
        drawn = sample(self.sampler, [shard.prompts[i].prompt for i in lacking], [seeds[i] for i in lacking])
        more: list[list[Rollout]] = [[] for _ in seeds]
        for i, rollouts in zip(lacking, drawn, strict=True):
            more[i] = rollouts
        return shard.drawn(more, seeds)


def _is_scored(state: State, name: str) -> bool:
    return state.scored.get(name, [0] * len(state.drawn)) == state.drawn


def _scored(shard: Shard, name: str, scorer: Scorer) -> Shard:
    have = shard.state.scored.get(name, [0] * len(shard.prompts))
    lacking = [rollouts[done:] for rollouts, done in zip(shard.rollouts, have, strict=True)]
    prompts = [planned.prompt for planned, own in zip(shard.prompts, lacking, strict=True) for _ in own]
    flat = score(scorer, prompts, [as_scored(rollout) for own in lacking for rollout in own])
    more: list[Float32[np.ndarray, " _"]] = np.split(flat, np.cumsum([*map(len, lacking)])[:-1])
    return shard.scored(name, more)
