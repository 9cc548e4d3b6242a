"""Score a few kept rollouts again, and refuse a reward model that gives them other scores.

A fingerprint cannot see everything: a server behind an address, a file that a function reads, a library's version. A
row of scores by two reward models would rank one against the other, so before anything is added to a run each of its
reward models has to give what it gave before.

Say which policy, seed and reward models a run is of; refuse others before and while its directory is written to."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Shard, as_scored
from calibrated_rewards.calibration.work import Work
from calibrated_rewards.prompts import Completion, Prompt, start_of
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


@dataclass(frozen=True)
class Kept:
    """Some pairs of a run with the scores that they have."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: Float32[np.ndarray, " n"]
    unit: float
    """The median standard deviation of a prompt's scores, or 1 where none has a spread."""

    @classmethod
    def of(cls, shards: list[Shard], column: str) -> "Kept | None":
        """The lowest and the highest rollout of some prompts, of those with a spread first; None without scores."""
        rows = [(shard, at) for shard in shards for at, own in enumerate(shard.scores.get(column, ())) if len(own)]
        if not rows:
            return None
        spreads = [float(np.std(shard.scores[column][at], dtype=np.float64)) for shard, at in rows]
        unit = float(np.median([spread for spread in spreads if spread > 0] or [1.0]))
        telling = [row for row, spread in zip(rows, spreads, strict=True) if spread > 0] or rows
        places = np.unique(np.linspace(0, len(telling) - 1, PROMPTS).astype(np.int64)).tolist()
        pairs = [(*telling[place], number) for place in places for number in _extremes(telling[place], column)]
        prompts = [shard.prompts[at].prompt for shard, at, _ in pairs]
        completions = [as_scored(shard.rollouts[at][number]) for shard, at, number in pairs]
        scores = np.array([shard.scores[column][at][number] for shard, at, number in pairs], np.float32)
        return cls(prompts, completions, scores, unit)

    def check(self, name: str, scorer: Scorer, near: float) -> None:
        """ValueError if the scorer gives these pairs other scores, or other ones each time."""
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


def check_kept(
    directory: RunDirectory, scorers: Mapping[str, Scorer], fingerprints: Mapping[str, Mapping[str, Any]]
) -> None:
    """ValueError if one of the reward models gives kept rollouts other scores than the run has of it."""
    names = directory.names()
    known = directory.settings().get("scorers", {}) if names else {}
    for name in sorted(directory.scored({*known} & {*scorers})):
        kept = Kept.of([directory.load(shard) for shard in _spread(directory, names, name)], name)
        if kept is not None:
            kept.check(name, scorers[name], tolerance(known[name], fingerprints[name]))


def tolerance(there: Mapping[str, Any], here: Mapping[str, Any]) -> float:
    """That of `verify()`; of a server, whose precision nobody knows here, that of 16 bits."""
    return TOLERANCE_16_BIT if here.get("kind") == "remote" else tolerance_of(there, here)


def _spread(directory: RunDirectory, names: list[str], column: str) -> Iterator[str]:
    """Shards with scores of a reward model, from all over the run."""
    scored = [name for name in names if (state := directory.state(name)) and sum(state.scored.get(column, []))]
    places = np.unique(np.linspace(0, len(scored) - 1, PROMPTS).astype(np.int64)) if scored else ()
    return (scored[place] for place in places)


def _extremes(row: tuple[Shard, int], column: str) -> list[int]:
    scores = row[0].scores[column][row[1]]
    return [*dict.fromkeys([int(scores.argmin()), int(scores.argmax())])]


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
        """That of the sampler and the reward models that do some work."""
        sampler = None if work.sampler is None else keepable("the sampler", work.sampler)
        scorers = {name: keepable(f"reward model {name!r}", scorer) for name, scorer in work.scorers.items()}
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
        """ValueError if the directory is of others: by their fingerprints, or by what they give for kept rollouts."""
        directory.agreed(self.seed, self.sampler, self.scorers)
        check_kept(directory, work.scorers, self.scorers)

    def settings(self, directory: RunDirectory) -> dict[str, Any]:
        """The run's settings with this sampler, and with the reward models of which a score is kept."""
        self.agreed.update(directory.scored(self.scorers))
        known = {name: scorer for name, scorer in self.scorers.items() if name in self.agreed}
        return directory.agreed(self.seed, self.sampler, known)

    def save(self, directory: RunDirectory, name: str, before: Shard, shard: Shard, work: Work) -> None:
        """Keep the work on a shard; with the first rollouts and the first scores of each, whose they are.

        What these first calls have changed in them is noted at once: a run may be stopped before its end.
        """
        drew = [""] * (shard.state.drawn != before.state.drawn and self.sampler is not None)
        new = {*drew, *(each for each in self.scorers if each in shard.scores)} - self.agreed
        if not new:
            directory.save(name, shard)
            return
        for each in sorted(new - {""}):
            if (kept := Kept.of([shard], each)) is not None:
                kept.check(each, work.scorers[each], tolerance(self.scorers[each], self.scorers[each]))
        sampler, scorers = self._after_calls(work)
        with directory.locked():
            # Another process may have been first, with another sampler or reward model.
            there = directory.settings().get("sampler")
            if "" in new and there is not None and [*differences(there, self.sampler)]:
                raise ValueError(f"{directory.path} was given another sampler by another process meanwhile: {there}")
            directory.agree(self.seed, sampler, {each: scorers[each] for each in sorted(new - {""})})
            directory.save(name, shard)
        self.agreed.update(new)

    def mark_changing(self, directory: RunDirectory, work: Work) -> None:
        """Note which parts of the state of plain callables their calls have changed: counters, caches, models."""
        sampler, scorers = self._after_calls(work)
        if sampler == self.sampler and scorers == self.scorers:
            return
        with directory.locked():
            scored = directory.scored(scorers)
            kept = {name: said for name, said in scorers.items() if name in scored}
            drew = sampler if directory.has_rollouts() else None
            directory.agree(self.seed, drew, kept)

    def _after_calls(self, work: Work) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """The fingerprints of sampler and reward models, with the parts of their state that calls have changed."""
        sampler, scorers = self.sampler, dict(self.scorers)
        for name, before in self.scorers.items():
            if depends_on_calls(before):
                scorers[name] = mark_changing(before, keepable(f"reward model {name!r}", work.scorers[name]))
        if sampler is not None and depends_on_calls(sampler):
            sampler = mark_changing(sampler, keepable("the sampler", work.sampler))
        return sampler, scorers


def keepable(what: str, of: object) -> dict[str, Any]:
    """A fingerprint that JSON can hold, and so a table."""
    own = fingerprint(of)
    try:
        return dict(json.loads(json.dumps(own, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a fingerprint is a mapping of what JSON can say, {what} gives {own!r:.80}: {error}") from None
