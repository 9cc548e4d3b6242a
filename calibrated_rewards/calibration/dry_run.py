"""Forecast the work and time of a run: check prompts and settings, time a trial of one prompt, and write nothing."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from calibrated_rewards.calibration.run import NewPrompts, check_known_prompts, plan_prompts
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, new_shard, write_shard
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.calibration.work import RunIdentity, Task, Work
from calibrated_rewards.prompts import Prompt, prompt_key

# Rollouts of the first call, which is slower than all that follow, and does not count.
WARM_UP = 4
CHECKED_AT_ONCE = 256


@dataclass(frozen=True)
class Trial:
    """The time, tokens and bytes of the rollouts of one prompt."""

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
    """The work that is to be done, and the time that one process would take at the pace of the trial."""

    prompts: int
    known: int
    repeated: int
    to_draw: int
    to_score: dict[str, int]
    trial: Trial | None

    @property
    def seconds(self) -> float | None:
        """Seconds for sampling and scoring; None without a trial."""
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
                f"estimate  {format_seconds(self.seconds)} in one process like this, "
                f"{size / 2**20:,.1f} MiB of rollouts"
            )
        return "\n".join(lines)


def forecast(
    directory: RunDirectory, asked: Iterable[Asked] | None, work: Work, k: int | None = None, trial: bool = True
) -> Forecast:
    """Count the rollouts and scores that a run would add, after the same checks; time a trial of one prompt's."""
    k = k or directory.max_drawn() or 100
    RunIdentity.of(work).check(directory, work)
    check_known_prompts(directory, work)
    new, first = NewPrompts(directory), None
    for prompts in new.read(asked or (), CHECKED_AT_ONCE):
        first = prompts[0] if first is None else first
        plan_prompts(prompts, work.sampler, work.scorers.values())
    draws, scores = k * new.new, dict.fromkeys(work.scorers, k * new.new)
    for name in directory.names():
        state, size = directory.state(name), directory.size(name)
        drawn = [0] * size if state is None else state.drawn
        goals = drawn if work.sampler is None else [max(k, have) for have in drawn]
        draws += sum(goals) - sum(drawn)
        for column in scores:
            scores[column] += sum(goals) - sum([] if state is None else state.scored.get(column, []))
    old = [planned.prompt for name in directory.names()[:1] for planned in directory.prompts(name)[:1]]
    some = old[0] if first is None and old else first
    tried = _time_trial(work, some, k) if trial and draws and some is not None else None
    return Forecast(new.new + len(new.old), len(new.old), new.repeated, draws, scores, tried)


def _time_trial(work: Work, prompt: Prompt, k: int) -> Trial:
    shard = new_shard([Planned(prompt_key(prompt), prompt)])
    work(Task("warm up", shard, [min(k, WARM_UP)]))
    began = time.perf_counter()
    drawn = next(Work(work.sampler, {}, work.seed).steps(Task("trial", shard, [k])))
    sampled = time.perf_counter()
    scored = work(Task("trial", drawn, [k])).shard
    ended = time.perf_counter()
    tokens = sum(rollout.tokens or 0 for rollout in drawn.rollouts[0])
    with TemporaryDirectory() as folder:
        file = Path(folder, "trial.parquet")
        write_shard(file, scored)
        return Trial(k, tokens, sampled - began, ended - sampled, file.stat().st_size)


def format_seconds(seconds: float) -> str:
    """Write a time as people say it.

    >>> format_seconds(90), format_seconds(9000)
    ('about 90 seconds', 'about 2.5 hours')
    """
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.1f} {unit}"
    return f"about {seconds:.0f} seconds"
