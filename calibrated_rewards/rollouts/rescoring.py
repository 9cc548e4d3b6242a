"""Score a few kept rollouts again, and refuse a reward model that gives them other scores.

A fingerprint cannot see everything: a server behind an address, a file that a function reads, a library's version. A
row of scores by two reward models would rank one against the other, so before anything is added to a run each of its
reward models has to give what it gave before.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.rollouts.directory import RunDirectory
from calibrated_rewards.rollouts.shard import Shard, as_scored
from calibrated_rewards.scorers.differences import TOLERANCE_16_BIT, tolerance_of
from calibrated_rewards.scorers.protocol import Scorer, score

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
