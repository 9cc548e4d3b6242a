"""What a run would do and cost: prompts and settings are checked, a trial is timed, and nothing is written."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from calibrated_rewards.calibration.plan import Ids, checked
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.run_identity import RunIdentity
from calibrated_rewards.calibration.shards import Planned, Shard, empty, write_shard
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.calibration.work import Task, Work
from calibrated_rewards.prompts import Prompt, prompt_key

# Rollouts of the first call, which is slower than all that follow, and does not count.
WARM_UP = 4
CHECKED_AT_ONCE = 256


@dataclass(frozen=True)
class Trial:
    """What the rollouts of one prompt took."""

    rollouts: int
    tokens: int
    sampling: float
    scoring: float
    bytes: int

    def __str__(self) -> str:
        pace = f" ({self.tokens / self.sampling:,.0f} tokens/s)" if self.tokens else ""
        return f"{self.rollouts} rollouts: {self.sampling:.2g} s to draw{pace}, {self.scoring:.2g} s to score"


@dataclass(frozen=True)
class Forecast:
    """What is to be done, and how long one process would take at the pace of the trial."""

    prompts: int
    known: int
    repeated: int
    to_draw: int
    to_score: dict[str, int]
    trial: Trial | None

    @property
    def seconds(self) -> float | None:
        """For sampling and scoring; None without a trial."""
        if self.trial is None:
            return None
        scored = sum(self.to_score.values()) / len(self.to_score) if self.to_score else 0
        return (self.to_draw * self.trial.sampling + scored * self.trial.scoring) / self.trial.rollouts

    def __str__(self) -> str:
        lines = [
            f"prompts   {self.prompts:,}: {self.prompts - self.known:,} new, {self.known:,} known"
            + f" ({self.repeated:,} repeated in the source, counted once)" * bool(self.repeated),
            f"to draw   {self.to_draw:,} rollouts",
            *(f"to score  {count:,} with {name}" for name, count in self.to_score.items()),
        ]
        if self.trial is not None and self.seconds is not None:
            size = self.to_draw * self.trial.bytes / self.trial.rollouts
            lines.append(f"a trial   {self.trial}")
            lines.append(
                f"estimate  {_duration(self.seconds)} in one process like this, {size / 2**20:,.1f} MiB of rollouts"
            )
        return "\n".join(lines)


def forecast(
    directory: RunDirectory, asked: Iterable[Asked] | None, work: Work, k: int | None = None, trial: bool = True
) -> Forecast:
    """What `run` would do, after the same checks; with a trial of one prompt's rollouts."""
    k = k or directory.most_drawn() or 100
    RunIdentity.of(work).check(directory, work)
    found = _counted(directory, asked, work)
    draws, scores = k * found.new, dict.fromkeys(work.scorers, k * found.new)
    for name in directory.names():
        state, size = directory.state(name), directory.size(name)
        drawn = [0] * size if state is None else state.drawn
        wanted = drawn if work.sampler is None else [max(k, have) for have in drawn]
        draws += sum(wanted) - sum(drawn)
        for column in scores:
            scores[column] += sum(wanted) - sum([] if state is None else state.scored.get(column, []))
    old = [planned.prompt for name in directory.names()[:1] for planned in directory.prompts(name)[:1]]
    some = old[0] if found.first is None and old else found.first
    tried = _tried(work, some, k) if trial and draws and some is not None else None
    return Forecast(found.new + found.known, found.known, found.repeated, draws, scores, tried)


class _Counts(NamedTuple):
    """What a source of prompts comes to."""

    new: int
    known: int
    repeated: int
    first: Prompt | None
    """The first of the new ones."""


def _counted(directory: RunDirectory, asked: Iterable[Asked] | None, work: Work) -> _Counts:
    """New prompts are checked; all are counted once."""
    old, ids = {*directory.keys()}, Ids(directory.aliases())
    known, total, first, waiting, seen = len(old), 0, None, list[Prompt](), set[bytes]()
    for item in asked or ():
        total += 1
        ids.add(item, key := prompt_key(item.prompt))
        seen.add(key)
        if key in old:
            continue
        first = item.prompt if first is None else first
        waiting.append(item.prompt)
        if len(waiting) == CHECKED_AT_ONCE:
            checked(waiting, work.sampler)
            waiting = []
    checked(waiting, work.sampler)
    return _Counts(len(seen - old), known, total - len(seen), first)


def _tried(work: Work, prompt: Prompt, k: int) -> Trial:
    shard = empty([Planned(prompt_key(prompt), prompt)])
    work(Task("warm up", shard, [min(k, WARM_UP)]))
    began = time.perf_counter()
    drawn = next(Work(work.sampler, {}, work.seed).steps(Task("trial", shard, [k])))
    sampled = time.perf_counter()
    scored: Shard = work(Task("trial", drawn, [k])).shard
    ended = time.perf_counter()
    tokens = sum(rollout.tokens or 0 for rollout in drawn.rollouts[0])
    return Trial(k, tokens, sampled - began, ended - sampled, _size(scored))


def _size(shard: Shard) -> int:
    with TemporaryDirectory() as folder:
        write_shard(Path(folder, "trial.parquet"), shard)
        return Path(folder, "trial.parquet").stat().st_size


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.1f} {unit}"
    return f"about {seconds:.0f} seconds"
