"""The sampler and reward models that do the work of a run, and the fingerprints by which a directory knows them.

A row of scores by two reward models would rank one against the other, so a directory refuses others than its own. A
fingerprint cannot see everything (a server behind an address, a file that a function reads, a library's version), so
each reward model also has to give a few kept rollouts the scores that they have, before anything is added.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Shard, State, get_completion
from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.protocol import Rollout, Sampler, sample, seeds_of
from calibrated_rewards.scorers.differences import (
    TOLERANCE_16_BIT,
    depends_on_calls,
    differences,
    mark_changing,
    tolerance_of,
    unread,
)
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, score

logger = logging.getLogger(__name__)

# Prompts of which the lowest and the highest rollout are scored again, and shards that they come from.
PROMPTS = 4
# Scores may be as far from the kept ones as this many times what a batch of another size makes of them.
ROUNDING = 3.0


class Task(NamedTuple):
    """A shard, and the number of rollouts that each of its prompts is to have."""

    name: str
    shard: Shard
    goals: list[int]


@dataclass(frozen=True)
class Work:
    """Completes shards: the same rollouts and scores in whatever process, and however often."""

    sampler: Sampler | None
    scorers: Mapping[str, Scorer]
    seed: int

    def __call__(self, task: Task) -> Task:
        """Return the task with its shard complete."""
        return task._replace(shard=[task.shard, *self.steps(task)][-1])

    def steps(self, task: Task) -> Iterator[Shard]:
        """Yield the shard after each step that is worth keeping: sampled, then scored by each reward model."""
        shard = task.shard
        if any(goal > have for goal, have in zip(task.goals, shard.state.drawn, strict=True)):
            shard = self._sample(shard, task.goals)
            yield shard
        for name, scorer in self.scorers.items():
            if not shard.state.is_scored(name):
                shard = _score(shard, name, scorer)
                yield shard

    def is_done(self, state: State | None, goals: Sequence[int]) -> bool:
        """Check that a shard has all its rollouts and scores."""
        return (
            state is not None
            and all(goal <= have for goal, have in zip(goals, state.drawn, strict=True))
            and all(map(state.is_scored, self.scorers))
        )

    def _sample(self, shard: Shard, goals: Sequence[int]) -> Shard:
        if self.sampler is None:
            raise ValueError(Message(f"rollouts are missing, and nothing draws them: name {setting('sampler')}"))
        seeds = [
            seeds_of(self.seed, prompt.key, have, max(have, goal))
            for prompt, have, goal in zip(shard.prompts, shard.state.drawn, goals, strict=True)
        ]
        lacking = [i for i, each in enumerate(seeds) if each]
        drawn = sample(self.sampler, [shard.prompts[i].prompt for i in lacking], [seeds[i] for i in lacking])
        more: list[list[Rollout]] = [[] for _ in seeds]
        for i, rollouts in zip(lacking, drawn, strict=True):
            more[i] = rollouts
        return shard.add_rollouts(more, seeds)


def _score(shard: Shard, name: str, scorer: Scorer) -> Shard:
    scored = shard.state.scored.get(name, [0] * len(shard.prompts))
    lacking = [rollouts[done:] for rollouts, done in zip(shard.rollouts, scored, strict=True)]
    prompts = [planned.prompt for planned, rollouts in zip(shard.prompts, lacking, strict=True) for _ in rollouts]
    scores = score(scorer, prompts, [get_completion(rollout) for rollouts in lacking for rollout in rollouts])
    more: list[Float32[np.ndarray, " _"]] = np.split(scores, np.cumsum([*map(len, lacking)])[:-1])
    return shard.add_scores(name, more)


@dataclass(frozen=True)
class RunIdentity:
    """The fingerprints of a sampler and some reward models, and which of them a directory is known to agree with."""

    seed: int
    sampler: dict[str, Any] | None
    scorers: Mapping[str, dict[str, Any]]
    agreed: set[str] = field(default_factory=set)
    """Reward models by name, and "" for the sampler, that were found in the directory or written to it."""

    @classmethod
    def of(cls, work: Work) -> "RunIdentity":
        """Fingerprint the sampler and the reward models that do some work."""
        sampler = None if work.sampler is None else fingerprint_as_json("the sampler", work.sampler)
        scorers = {name: fingerprint_as_json(f"reward model {name!r}", each) for name, each in work.scorers.items()}
        for name, scorer in scorers.items():
            if unseen := unread(scorer):
                logger.warning(
                    "the state of the reward model %r cannot be read in full (%s), so its fingerprint does not tell "
                    "all such scorers apart: kept rollouts are scored again instead",
                    name,
                    ", ".join(unseen),
                )
        return cls(work.seed, sampler, scorers)

    def check(self, directory: RunDirectory, work: Work) -> None:
        """Refuse a directory of others: by their fingerprints, or by the scores that they give kept rollouts."""
        directory.merge_settings(self.seed, self.sampler, self.scorers)
        known = directory.settings().get("scorers", {}) if directory.names() else {}
        for name in sorted(directory.find_scored({*known} & {*work.scorers})):
            scored = [
                each for each in directory.names() if (s := directory.state(each)) and sum(s.scored.get(name, []))
            ]
            # From all over the run.
            shards = [directory.load(scored[place]) for place in _spread(len(scored))]
            if (pairs := Kept.choose(shards, name)) is not None:
                pairs.check(name, work.scorers[name], tolerance(known[name], self.scorers[name]))

    def settings(self, directory: RunDirectory) -> dict[str, Any]:
        """Merge the run's settings with this sampler, and with the reward models of which a score is kept."""
        self.agreed.update(directory.find_scored(self.scorers))
        known = {name: scorer for name, scorer in self.scorers.items() if name in self.agreed}
        return directory.merge_settings(self.seed, self.sampler, known)

    def save(self, directory: RunDirectory, name: str, before: Shard, shard: Shard, work: Work) -> None:
        """Save the work on a shard; with the first rollouts and the first scores of each, whose they are.

        What these first calls have changed in them is noted at once: a run may be stopped before its end.
        """
        drew = [""] * (shard.state.drawn != before.state.drawn and self.sampler is not None)
        new = {*drew, *(each for each in self.scorers if each in shard.scores)} - self.agreed
        if not new:
            directory.save(name, shard)
            return
        for each in sorted(new - {""}):
            if (pairs := Kept.choose([shard], each)) is not None:
                pairs.check(each, work.scorers[each], tolerance(self.scorers[each], self.scorers[each]))
        sampler, scorers = self._mark_changing(work)
        with directory.lock():
            # Another process may have been first, with another sampler or reward model.
            there = directory.settings().get("sampler")
            if "" in new and there is not None and [*differences(there, self.sampler)]:
                raise ValueError(f"{directory.path} was given another sampler by another process meanwhile: {there}")
            directory.update_settings(self.seed, sampler, {each: scorers[each] for each in sorted(new - {""})})
            directory.save(name, shard)
        self.agreed.update(new)

    def mark_changing(self, directory: RunDirectory, work: Work) -> None:
        """Note which parts of the state of plain callables their calls have changed: counters, caches, models."""
        sampler, scorers = self._mark_changing(work)
        if sampler == self.sampler and scorers == self.scorers:
            return
        with directory.lock():
            scored = directory.find_scored(scorers)
            kept = {name: each for name, each in scorers.items() if name in scored}
            directory.update_settings(self.seed, sampler if directory.has_rollouts() else None, kept)

    def _mark_changing(self, work: Work) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """Fingerprint sampler and reward models again; mark the parts of their state that calls have changed."""
        sampler, scorers = self.sampler, dict(self.scorers)
        for name, before in self.scorers.items():
            if depends_on_calls(before):
                after = fingerprint_as_json(f"reward model {name!r}", work.scorers[name])
                scorers[name] = mark_changing(before, after)
        if sampler is not None and depends_on_calls(sampler):
            sampler = mark_changing(sampler, fingerprint_as_json("the sampler", work.sampler))
        return sampler, scorers


def fingerprint_as_json(what: str, of: object) -> dict[str, Any]:
    """Fingerprint a sampler or scorer; refuse a fingerprint that JSON cannot hold, and so no table."""
    content = fingerprint(of)
    try:
        return dict(json.loads(json.dumps(content, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"a fingerprint is a mapping of what JSON can say, {what} gives {content!r:.80}: {error}"
        ) from None


def tolerance(there: Mapping[str, Any], here: Mapping[str, Any]) -> float:
    """The tolerance of `verify()`; for a server, whose precision is not known here, that of 16 bits."""
    return TOLERANCE_16_BIT if here.get("kind") == "remote" else tolerance_of(there, here)


@dataclass(frozen=True)
class Kept:
    """Pairs of a run with the scores that they have, to be scored again."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: Float32[np.ndarray, " n"]
    unit: float
    """The median standard deviation of a prompt's scores, or 1 where none has a spread."""

    @classmethod
    def choose(cls, shards: list[Shard], column: str) -> "Kept | None":
        """Choose the lowest and the highest rollout of some prompts, preferring those with a spread; None without."""
        rows = [
            (shard, at) for shard in shards for at, scores in enumerate(shard.scores.get(column, ())) if len(scores)
        ]
        if not rows:
            return None
        spreads = [float(np.std(shard.scores[column][at], dtype=np.float64)) for shard, at in rows]
        unit = float(np.median([spread for spread in spreads if spread > 0] or [1.0]))
        rows = [row for row, spread in zip(rows, spreads, strict=True) if spread > 0] or rows
        chosen = [rows[place] for place in _spread(len(rows))]
        pairs = [(shard, at, number) for shard, at in chosen for number in shard.find_extremes(at, column)]
        prompts = [shard.prompts[at].prompt for shard, at, _ in pairs]
        completions = [get_completion(shard.rollouts[at][number]) for shard, at, number in pairs]
        scores = np.array([shard.scores[column][at][number] for shard, at, number in pairs], np.float32)
        return cls(prompts, completions, scores, unit)

    def check(self, name: str, scorer: Scorer, near: float) -> None:
        """Refuse a scorer that gives these pairs other scores, or other ones each time."""
        again = score(scorer, self.prompts, self.completions)
        apart = np.abs(again.astype(np.float64) - self.scores) / self.unit
        if (apart <= near).all():
            return
        once_more = score(scorer, self.prompts, self.completions)
        at = int(np.abs(once_more - again).argmax())
        if np.abs(once_more.astype(np.float64) - again).max() / self.unit > near:
            raise ValueError(
                f"the reward model {name!r} gives a pair another score each time that it is asked: {again[at]} and "
                f"then {once_more[at]} for completion {start_of(self.completions[at])} of prompt "
                f"{start_of(self.prompts[at])}. Quantiles need a deterministic scorer: fix its seed or its "
                "temperature, or average several of its scores"
            )
        alone = np.concatenate([score(scorer, [p], [c]) for p, c in zip(self.prompts, self.completions, strict=True)])
        rounding = float(np.abs(alone.astype(np.float64) - again).max()) / self.unit
        if apart.max() <= min(TOLERANCE_16_BIT, ROUNDING * rounding):
            logger.info("%r: kept scores are %.2g standard deviations off, by rounding", name, apart.max())
            return
        at = int(apart.argmax())
        beside = " (scores that depend on what else is in the call mean nothing alone)" if rounding > near else ""
        raise ValueError(
            f"{name!r} is not the reward model that gave the scores which are kept: {int((apart > near).sum())} of "
            f"{len(apart)} pairs that were scored again are off, by up to {apart.max():.3g} standard deviations (at "
            f"most {near:g}): {again[at]} in place of {self.scores[at]} for completion "
            f"{start_of(self.completions[at])} of prompt {start_of(self.prompts[at])}{beside}. Nothing was added: give "
            "the reward model of that run, another directory, or another name (NAME=PATH)"
        )


def _spread(count: int) -> list[int]:
    """Choose up to PROMPTS evenly spread places among so many."""
    return np.unique(np.linspace(0, count - 1, PROMPTS).astype(np.int64)).tolist() if count else []
