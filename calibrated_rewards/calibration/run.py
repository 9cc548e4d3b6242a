"""Fill the shards of a run with rollouts and scores, in this process or by a cluster, beside any other processes."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Shard
from calibrated_rewards.calibration.work import RunIdentity, Task, Work

logger = logging.getLogger(__name__)

# Seconds between two lines in a log.
EVERY = 30.0
# Seconds between two looks at shards that others hold.
PAUSE = 0.5


@runtime_checkable
class Cluster(Protocol):
    """Other processes that do work: `cluster(function, tasks)` gives the results as they come, in any order."""

    def __call__(self, function: Callable[[Any], Any], tasks: Iterable[Any], /) -> Iterator[Any]:
        """Yield function(task) for each task, once; do it again elsewhere if the process that does it dies.

        Tasks are taken as there is a process to do them: other processes can do those that are not.
        """


@dataclass
class Progress:
    """Counts prompts, completions and tokens, and shows a bar on a terminal, or a line now and then in a log."""

    prompts: int
    """All prompts that are to be done."""
    shown: bool = True
    done: int = 0
    completions: int = 0
    tokens: int = 0
    _bar: Any = None
    _began: float = 0.0
    _logged: float = 0.0
    _before: int = 0

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(total=self.prompts, initial=self.done, desc="calibrating", unit=" prompts", delay=1)
        self._before, self._began = self.done, time.monotonic()
        self._logged = self._began
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and time.monotonic() - self._began > EVERY:
            self._log()

    def add(self, prompts: int = 0, completions: int = 0, tokens: int = 0) -> None:
        """Count work of this process."""
        self.done += prompts
        self.completions += completions
        self.tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self.rates(), refresh=False)
            self._bar.update(prompts)
        elif self.shown and time.monotonic() - self._logged > EVERY:
            self._log()

    def skip(self, prompts: int) -> None:
        """Count prompts that were done already, which say nothing of the pace."""
        self.done += prompts
        self._before += prompts
        if self._bar is not None:
            self._bar.initial += prompts
            self._bar.n += prompts
            self._bar.refresh()

    def repeat(self, prompts: int) -> None:
        """Begin another round, in which these prompts are to be done again."""
        self.done = self.prompts - prompts
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.refresh()

    def rates(self) -> str:
        """Format completions and tokens a second, of this process."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        tokens = f", {self.tokens / seconds:.3g} tokens/s" if self.tokens else ""
        return f"{self.completions / seconds:.3g} completions/s{tokens}"

    def left(self) -> str:
        """Format the time that the rest takes, at the pace so far."""
        done = self.done - self._before
        if not done:
            return "unknown"
        return tqdm.format_interval((self.prompts - self.done) * (time.monotonic() - self._began) / done)

    def _log(self) -> None:
        self._logged = time.monotonic()
        share = f"{self.done} of {self.prompts} prompts ({self.done / max(self.prompts, 1):.0%})"
        sys.stderr.write(f"calibrating: {share}, {self.rates()}, {self.left()} left\n")
        sys.stderr.flush()


@dataclass(frozen=True)
class Filling:
    """Fills a run's shards until every prompt has k scored rollouts."""

    directory: RunDirectory
    names: list[str]
    """Its shards when the run began; others may be adding more."""
    work: Work
    identity: RunIdentity
    k: int
    progress: Progress
    cluster: Cluster | None = None
    goals: Mapping[bytes, int] = field(default_factory=dict)
    """The number of rollouts of prompts that are to have another one than k, by key."""

    def fill(self) -> None:
        """Fill all shards; leave those that another process holds to it, unless it dies."""
        waiting = self.names
        while waiting:
            if self.cluster is None:
                held = [name for name in waiting if not self._fill_here(name)]
            else:
                held = self._fill_elsewhere(waiting, self.cluster)
            if held == waiting:
                time.sleep(PAUSE)
            waiting = held

    def fill_in_rounds(self, adaptive: Adaptive) -> None:
        """Draw as many rollouts as each prompt needs.

        A process that comes late goes through the same rounds, and finds them done.
        """
        (column,) = self.work.scorers
        goals = adaptive.next((key, []) for name in self.names for key in self.directory.keys_of(name))
        while True:
            replace(self, goals=goals).fill()
            rows = (
                row
                for name in self.names
                for row in zip(self.directory.keys_of(name), self.directory.scores(name, column), strict=True)
            )
            # Rollouts that others may have drawn meanwhile for the next round are left out: all decide alike.
            more = adaptive.next((key, scores[: goals[key]]) for key, scores in rows)
            if not more:
                return
            goals |= more
            self.progress.repeat(sum(goal > 0 for goal in more.values()))

    def _fill_here(self, name: str) -> bool:
        """Fill a shard in this process; False if another one holds it."""
        with self.directory.claim(name) as ours:
            if ours and (task := self._plan_task(name)) is not None:
                self.directory.remove_stale_files(name)
                before = task.shard
                for shard in self.work.steps(task):
                    self._save(name, before, shard)
                    before = shard
                self.progress.add(prompts=len(task.goals))
            return ours

    def _fill_elsewhere(self, names: list[str], cluster: Cluster) -> list[str]:
        """Fill shards by a cluster, each held until its result is saved here; list those that others hold."""
        held, claims = list[str](), dict[str, ExitStack]()
        try:
            for task in cluster(self.work, self._claim_tasks(names, claims, held)):
                self._save(task.name, self.directory.load(task.name), task.shard)
                self.progress.add(prompts=len(task.goals))
                claims.pop(task.name).close()
            if claims:
                raise RuntimeError(f"a cluster gives a result for each task, got none for shards {[*claims]}")
        finally:
            for claim in claims.values():
                claim.close()
        return held

    def _claim_tasks(self, names: list[str], claims: dict[str, ExitStack], held: list[str]) -> Iterator[Task]:
        for name in names:
            with ExitStack() as claim:
                if not claim.enter_context(self.directory.claim(name)):
                    held.append(name)
                elif (task := self._plan_task(name)) is not None:
                    self.directory.remove_stale_files(name)
                    claims[name] = claim.pop_all()
                    yield task

    def _plan_task(self, name: str) -> Task | None:
        """Compare a shard with its goals; None if it is done."""
        state = self.directory.state(name)
        if self.goals:
            goals = [self.goals.get(key, self.k) for key in self.directory.keys_of(name)]
        else:
            goals = [self.k] * self.directory.size(name)
        if self.work.sampler is None:
            if state is None:
                logger.warning("%d prompts have no rollouts yet, and no part in the table", len(goals))
                return None
            goals = state.drawn  # those that are there
        if self.work.is_done(state, goals):
            self.progress.skip(len(goals))
            return None
        return Task(name, self.directory.load(name), goals)

    def _save(self, name: str, before: Shard, shard: Shard) -> None:
        self.identity.save(self.directory, name, before, shard, self.work)
        new = [r for old, now in zip(before.rollouts, shard.rollouts, strict=True) for r in now[len(old) :]]
        self.progress.add(completions=len(new), tokens=sum(rollout.tokens or 0 for rollout in new))
