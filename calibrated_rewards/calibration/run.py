"""Where work may be done: in this process, or by a cluster of them.

How far a calibration is: a bar for those who watch, a line now and then for a log.

A run in a directory: prompts into shards, shards filled by whoever is there, the table made of them."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.calibration.plan import plan, plan_again
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.run_identity import RunIdentity
from calibrated_rewards.calibration.shards import Shard
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.calibration.to_table import scores_of, tabulated
from calibrated_rewards.calibration.work import Task, Work
from calibrated_rewards.files import Message, setting
from calibrated_rewards.table.reference_table import ReferenceTable


@runtime_checkable
class Cluster(Protocol):
    """Other processes that do work: `cluster(function, tasks)` gives the results as they come, in any order."""

    def __call__(self, function: Callable[[Any], Any], tasks: Iterable[Any], /) -> Iterator[Any]:
        """function(task) for each task, once; done again elsewhere if the one who did it dies.

        Tasks are taken as there is somebody to do them: other processes can do those that are not.
        """


# Seconds between two lines in a log.
EVERY = 30.0


@dataclass
class Progress:
    """Counts prompts, completions and tokens; `with` closes it."""

    prompts: int
    """How many there are in all."""
    shown: bool = True
    done: int = 0
    completions: int = 0
    tokens: int = 0
    _bar: Any = None
    _began: float = 0.0
    _spoke: float = 0.0
    _before: int = 0

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(total=self.prompts, initial=self.done, desc="calibrating", unit=" prompts", delay=1)
        self._before, self._began = self.done, time.monotonic()
        self._spoke = self._began
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and time.monotonic() - self._began > EVERY:
            self._speak()

    def add(self, prompts: int = 0, completions: int = 0, tokens: int = 0) -> None:
        """So much more is done."""
        self.done += prompts
        self.completions += completions
        self.tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self.rates(), refresh=False)
            self._bar.update(prompts)
        elif self.shown and time.monotonic() - self._spoke > EVERY:
            self._speak()

    def found(self, prompts: int) -> None:
        """These were done already, and say nothing of the pace."""
        self.done += prompts
        self._before += prompts
        if self._bar is not None:
            self._bar.initial += prompts
            self._bar.n += prompts
            self._bar.refresh()

    def again(self, prompts: int) -> None:
        """Another round: these prompts are not done after all."""
        self.done = self.prompts - prompts
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.refresh()

    def rates(self) -> str:
        """Completions and tokens a second, of this process."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        told = [f"{self.completions / seconds:.3g} completions/s"]
        return ", ".join(told + [f"{self.tokens / seconds:.3g} tokens/s"] * bool(self.tokens))

    def left(self) -> str:
        """The time that the rest takes, at the pace so far."""
        own = self.done - self._before
        if not own:
            return "unknown"
        return tqdm.format_interval((self.prompts - self.done) * (time.monotonic() - self._began) / own)

    def _speak(self) -> None:
        self._spoke = time.monotonic()
        share = f"{self.done} of {self.prompts} prompts ({self.done / max(self.prompts, 1):.0%})"
        sys.stderr.write(f"calibrating: {share}, {self.rates()}, {self.left()} left\n")
        sys.stderr.flush()


logger = logging.getLogger(__name__)

# Seconds between two looks at shards that others hold.
PAUSE = 0.5
ONE_ROLLOUT = (
    "%s: with K=1 rollout a prompt each quantile is 0, 1/2 or 1, which says only whether one reference was better. "
    "Calibrate with more, such as k=32 (on the command line -k 32); a larger K adds what is missing"
)


@dataclass(frozen=True)
class Settings:
    """How a run is done; none of it changes a rollout."""

    k: int | None = None
    """None: as many as the directory has, or 100."""
    per_shard: int = 32
    adaptive: Adaptive | None = None
    cluster: Cluster | None = None
    show_progress: bool = True


def run(
    path: Path, asked: Iterable[Asked] | None, work: Work, tables: Mapping[str, str | None], settings: Settings
) -> dict[str, ReferenceTable]:
    """Do what is left of a run, together with whoever else is at it, and give its tables."""
    directory = RunDirectory(path)
    identity = RunIdentity.of(work)
    names = prepare(directory, asked, work, identity, settings.per_shard, settings.show_progress)
    most = directory.most_drawn()
    k = settings.k or most or 100
    if settings.adaptive is None:
        _announce(directory, names, work, k)
        if max(most, k if work.sampler is not None else 0) == 1:
            logger.warning(ONE_ROLLOUT, directory.path)
    with Progress(sum(map(directory.size, names)), settings.show_progress) as progress:
        filling = Filling(directory, names, work, identity, k, progress, settings.cluster)
        try:
            filling.fill() if settings.adaptive is None else filling.in_rounds(settings.adaptive)
        except BaseException:  # Ctrl-C too: the same objects may go on, with what their calls have changed in them
            with suppress(Exception):
                identity.mark_changing(directory, work)
            raise
    identity.mark_changing(directory, work)
    made = {column: tabulated(directory, column, name) for column, name in tables.items()}
    for column in {*directory.settings()["scorers"]} - {*tables}:
        if any(state.scored.get(column) != state.drawn for name in names if (state := directory.state(name))):
            logger.warning("the table of %r lacks some of these rollouts: run again with that reward model", column)
    return made


def _announce(directory: RunDirectory, names: list[str], work: Work, k: int) -> None:
    """What is left to do."""
    wanted = drawn = scored = 0
    for name in names:
        state, size = directory.state(name), directory.size(name)
        have = [0] * size if state is None else state.drawn
        wanted += sum(have if work.sampler is None else (max(k, n) for n in have))
        drawn += sum(have)
        scored += 0 if state is None else sum(sum(state.scored.get(column, [])) for column in work.scorers)
    to_score = wanted * len(work.scorers) - scored
    logger.info("%s: %d rollouts to draw, %d scores to give", directory.path, wanted - drawn, to_score)


def prepare(
    directory: RunDirectory,
    asked: Iterable[Asked] | None,
    work: Work,
    identity: RunIdentity,
    per_shard: int,
    show_progress: bool,
) -> list[str]:
    """Put prompts into the directory, and give its shards; refuse, before sampling, what cannot be done.

    A reward model is not written down yet: what fails before it has given a score leaves the name free.
    """
    if asked is None and not directory.names():
        raise ValueError(Message(f"{directory.path} has no prompts yet: name them with {setting('prompts')}"))
    identity.check(directory, work)
    with directory.locked():
        directory.tidy_all()
        before, settings = directory.settings(), identity.settings(directory)
        other = bool(directory.names()) and before.get("sampler") != settings.get("sampler")
        if other and work.sampler is not None and not directory.has_rollouts():
            plan_again(directory, work.sampler)
        if asked is not None:
            counts = plan(directory, asked, work.sampler, per_shard, settings, show_progress)
            logger.info("%s: %d new prompts, %d known, %d repeated", directory.path, *counts)
        if not directory.names():
            raise ValueError("calibration needs at least one prompt, got none")
        if directory.settings() != settings:
            directory.write_settings(settings)
        return directory.names()


@dataclass(frozen=True)
class Filling:
    """Brings shards of a directory to so many rollouts a prompt, with all scores."""

    directory: RunDirectory
    names: list[str]
    """Its shards as it was planned; others may be adding more."""
    work: Work
    identity: RunIdentity
    k: int
    progress: Progress
    cluster: Cluster | None = None
    goals: dict[bytes, int] = field(default_factory=dict)
    """Of prompts that are to have another number."""

    def fill(self) -> None:
        """In this process, or by a cluster."""
        if self.cluster is None:
            self.here()
        else:
            self.elsewhere(self.cluster)

    def in_rounds(self, adaptive: Adaptive) -> None:
        """As many rollouts as each prompt needs. Who comes late goes through the same rounds, and finds them done."""
        (column,) = self.work.scorers
        goals = adaptive.next((key, []) for name in self.names for key in self.directory.keys_of(name))
        while True:
            replace(self, goals=goals).fill()
            # Of what others may have drawn meanwhile for the next round nothing is seen: all decide alike.
            more = adaptive.next((key, scores[: goals[key]]) for key, scores in self._rows(column))
            if not more:
                return
            goals |= more
            self.progress.again(sum(goal > 0 for goal in more.values()))

    def here(self) -> None:
        """In this process; shards that another one holds are left to it, unless it dies."""
        waiting = self.names
        while waiting:
            held = [name for name in waiting if not self._did(name)]
            if held == waiting:
                time.sleep(PAUSE)
            waiting = held

    def elsewhere(self, cluster: Cluster) -> None:
        """By a cluster: what comes back is kept here, and each shard is held from when it is given out until then."""
        waiting = self.names
        while waiting:
            held, claims = list[str](), dict[str, ExitStack]()
            try:
                for task in cluster(self.work, self._claimed(waiting, claims, held)):
                    self._keep(task.name, self.directory.load(task.name), task.shard)
                    self.progress.add(prompts=len(task.wanted))
                    claims.pop(task.name).close()
                if claims:
                    raise RuntimeError(f"a cluster gives a result for each task, got none for shards {[*claims]}")
            finally:
                for own in claims.values():
                    own.close()
            if held == waiting:
                time.sleep(PAUSE)
            waiting = held

    def _claimed(self, names: list[str], claims: dict[str, ExitStack], held: list[str]) -> Iterator[Task]:
        for name in names:
            with ExitStack() as claim:
                if not claim.enter_context(self.directory.claim(name)):
                    held.append(name)
                elif (task := self._task(name)) is not None:
                    self.directory.tidy(name)
                    claims[name] = claim.pop_all()
                    yield task

    def _did(self, name: str) -> bool:
        with self.directory.claim(name) as ours:
            if not ours:
                return False
            task = self._task(name)
            if task is not None:
                self.directory.tidy(name)
                before = task.shard
                for shard in self.work.steps(task):
                    self._keep(name, before, shard)
                    before = shard
                self.progress.add(prompts=len(task.wanted))
            return True

    def _task(self, name: str) -> Task | None:
        """What there is to do on a shard; None if it is done."""
        state, wanted = self.directory.state(name), self._wanted(name)
        if self.work.sampler is None:
            if state is None:
                logger.warning("%d prompts have no rollouts yet, and no part in the table", len(wanted))
                return None
            wanted = state.drawn  # those that are there
        if self.work.is_done(state, wanted):
            self.progress.found(len(wanted))
            return None
        return Task(name, self.directory.load(name), wanted)

    def _wanted(self, name: str) -> list[int]:
        if not self.goals:
            return [self.k] * self.directory.size(name)
        return [self.goals.get(key, self.k) for key in self.directory.keys_of(name)]

    def _rows(self, column: str) -> Iterator[tuple[bytes, Float32[np.ndarray, " _"]]]:
        """Scores by the number of their rollout."""
        for name in self.names:
            yield from zip(self.directory.keys_of(name), scores_of(self.directory, name, column), strict=True)

    def _keep(self, name: str, before: Shard, shard: Shard) -> None:
        self.identity.save(self.directory, name, before, shard, self.work)
        new = [r for old, now in zip(before.rollouts, shard.rollouts, strict=True) for r in now[len(old) :]]
        self.progress.add(completions=len(new), tokens=sum(rollout.tokens or 0 for rollout in new))
