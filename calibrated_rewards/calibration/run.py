"""Run a calibration in a directory: put prompts into shards, and fill these with rollouts and scores.

`add_prompts` checks each prompt once, before anything is sampled. `Filling` works in this process or by a cluster,
beside any other processes on the same directory.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, Shard, encode_text
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.calibration.work import RunIdentity, Task, Work
from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Prompt, id_key, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Particular, Rendering, Sampler
from calibrated_rewards.scorers.protocol import Scorer, check_prompts

logger = logging.getLogger(__name__)

# Seconds between two lines in a log.
EVERY = 30.0
# Seconds between two looks at shards that others hold.
PAUSE = 0.5


def add_prompts(
    directory: RunDirectory,
    asked: Iterable[Asked],
    work: Work,
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> "NewPrompts":
    """Add the prompts that a locked directory does not have yet; all of them, or none if one is refused.

    The settings are written before the first: prompts alone would not say what their rollouts are to be of.
    """
    new = NewPrompts(directory)
    names = filter(directory.is_free, directory.free_names())
    with undo_on_error(directory):
        for prompts in new.read(show_bar(asked, "prompts", " prompts", show_progress), per_shard):
            if work.sampler is None:
                raise ValueError(
                    Message(
                        f"there is no sampler to draw rollouts of the new prompt {start_of(prompts[0])}: "
                        f"name one, {setting('sampler')}"
                    )
                )
            planned = plan_prompts(prompts, work.sampler, work.scorers.values())
            if directory.settings() != settings:
                directory.write_settings(settings)
            directory.write_prompts(next(names), planned)
        directory.add_aliases(new.ids.new)
    return new


class NewPrompts:
    """Reads the prompts that a directory does not have yet, each once, and counts the others."""

    def __init__(self, directory: RunDirectory) -> None:
        self.old, self.ids = {*directory.keys()}, Ids(directory.aliases())
        self.new = self.known = self.repeated = 0

    def read(self, asked: Iterable[Asked], size: int) -> Iterator[list[Prompt]]:
        """Read the new prompts in batches."""
        seen, batch = set[bytes](), list[Prompt]()
        for item in asked:
            key = prompt_key(item.prompt)
            self.ids.add(item, key)
            self.repeated += key in seen
            if key in seen:
                continue
            seen.add(key)
            self.known += key in self.old
            if key in self.old:
                continue
            self.new += 1
            batch.append(item.prompt)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


class Ids:
    """Records the prompt that each id leads to; refuses an id that leads to two."""

    def __init__(self, known: dict[bytes, bytes]) -> None:
        self.known = known
        self.new: dict[bytes, bytes] = {}

    def add(self, asked: Asked, key: bytes) -> None:
        """Add a prompt, with the id that it may have."""
        if asked.id is None:
            return
        alias = id_key(asked.id)
        owner = self.known.get(alias) or self.new.setdefault(alias, key)
        if owner != key:
            raise ValueError(f"an id leads to one prompt, got id {asked.id!r} again for {start_of(asked.prompt)}")


def plan_prompts(prompts: list[Prompt], sampler: Sampler | None, scorers: Iterable[Scorer] = ()) -> list[Planned]:
    """Check that prompts can be kept, completed and scored; add their keys, and the texts that the sampler reads."""
    for prompt in prompts:
        text, _ = encode_text(prompt)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"a prompt is whole characters, got half of one in {start_of(prompt)}")
    if isinstance(sampler, Particular):
        sampler.check(prompts)
    for scorer in scorers:
        check_prompts(scorer, prompts)
    if not isinstance(sampler, Rendering):
        return [Planned(prompt_key(prompt), prompt) for prompt in prompts]
    rendered = [sampler.rendered(prompt) for prompt in prompts]
    # Empty where only a server knows.
    return [
        Planned(prompt_key(prompt), prompt, None if text == prompt else text or None)
        for prompt, text in zip(prompts, rendered, strict=True)
    ]


def check_known_prompts(directory: RunDirectory, work: Work) -> None:
    """Let the scorers refuse prompts of the directory that they cannot score, before more is drawn for them."""
    checking = any(callable(getattr(scorer, "check", None)) for scorer in work.scorers.values())
    for name in directory.names() if checking else []:
        prompts = [planned.prompt for planned in directory.prompts(name)]
        for scorer in work.scorers.values():
            check_prompts(scorer, prompts)


def replan(directory: RunDirectory, sampler: Sampler) -> None:
    """Check and render all prompts for another sampler than the one that was to draw their rollouts."""
    for name in directory.names():
        prompts = [planned.prompt for planned in directory.prompts(name)]
        directory.write_prompts(name, plan_prompts(prompts, sampler))


@contextmanager
def undo_on_error(directory: RunDirectory) -> Iterator[None]:
    """Remove the shards and settings that a block has added, if it fails."""
    names, settings = {*directory.names()}, directory.settings()
    try:
        yield
    except BaseException:  # Ctrl-C too
        for name in {*directory.names()} - names:
            directory.remove(name)
        if directory.settings() != settings:
            directory.write_settings(settings)
        raise


def show_bar(items: Iterable[Any], title: str, unit: str, show: bool = True) -> Iterator[Any]:
    """Show a progress bar on a terminal for what takes more than three seconds."""
    return iter(tqdm(items, desc=title, unit=unit, delay=3, disable=None if show else True))


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
        """Add prompts, completions and tokens that this process has done, and show them now and then."""
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

    def time_left(self) -> str:
        """Format the time that the rest takes, at the pace so far."""
        done = self.done - self._before
        if not done:
            return "unknown"
        return tqdm.format_interval((self.prompts - self.done) * (time.monotonic() - self._began) / done)

    def _log(self) -> None:
        self._logged = time.monotonic()
        share = f"{self.done} of {self.prompts} prompts ({self.done / max(self.prompts, 1):.0%})"
        sys.stderr.write(f"calibrating: {share}, {self.rates()}, {self.time_left()} left\n")
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
