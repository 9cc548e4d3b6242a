"""Say which policy, seed and reward models a run is of; refuse others before and while its directory is written to."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calibrated_rewards.rollouts.directory import RunDirectory
from calibrated_rewards.rollouts.rescoring import Kept, check_kept, tolerance
from calibrated_rewards.rollouts.shard import Shard
from calibrated_rewards.rollouts.work import Work
from calibrated_rewards.scorers.differences import depends_on_calls, differences, mark_changing, unread
from calibrated_rewards.scorers.protocol import fingerprint

logger = logging.getLogger(__name__)


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
