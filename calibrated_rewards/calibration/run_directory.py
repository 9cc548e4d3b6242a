"""The directory of a run: its settings, its prompts in shards, and the rollouts of each shard.

```
run.json                  what the rollouts depend on, and the fingerprint of each reward model
prompts/00000.parquet     the prompts of a shard; written once
rollouts/00000.parquet    their rollouts, a row each, with a column `score:NAME` for each reward model
aliases/00000.parquet     ids that lead to prompts
```

The table stands beside them; of several reward models each in a folder of its own.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibrated_rewards.calibration.shards import (
    Planned,
    Shard,
    State,
    read_keys,
    read_prompts,
    read_shard,
    read_table,
    readable,
    rows_in,
    state_of,
    write_prompts,
    write_shard,
)
from calibrated_rewards.files import claim, replace_file, write_file
from calibrated_rewards.scorers.differences import Difference, differences, merge

FORMAT, VERSION = "calibrated-rewards run", 1
ALIAS = pa.schema([("alias", pa.binary(16)), ("key", pa.binary(16))])
RESERVED_NAMES = ("prompts", "rollouts", "aliases", "run.json", "table.json", "table.safetensors")


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run. Every one of them is replaced in one step, so a kill at any moment leaves whole files."""

    path: Path

    def settings(self) -> dict[str, Any]:
        """What is in run.json; nothing, before the first run."""
        file = self.path / "run.json"
        if not file.exists():
            return {}
        try:
            found = json.loads(file.read_text())
            format_, version = found.pop("format"), found.pop("version")
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} must be the settings of a run, got something else ({error!r})") from None
        if (format_, version) != (FORMAT, VERSION):
            raise ValueError(f"{file} must be a {FORMAT!r} of version {VERSION}, got {format_!r} of version {version}")
        return dict(found)

    def agree(self, seed: int, sampler: Mapping[str, Any] | None, scorers: Mapping[str, Mapping[str, Any]]) -> None:
        """Take these settings as the run's, or refuse; for who holds the directory."""
        merged = self.agreed(seed, sampler, scorers)
        if merged != self.settings():
            self.write_settings(merged)

    def agreed(
        self, seed: int, sampler: Mapping[str, Any] | None, scorers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The run's settings with these, or an error: rollouts of two policies do not go into one table.

        A sampler that has drawn nothing yet, and a scorer of which no score is kept, are replaced by another one.
        """
        if not (self.path / "run.json").exists() and (self.names() or (self.path / "table.json").exists()):
            raise ValueError(
                f"{self.path} has prompts or a table, and no run.json that says of what: give another directory"
            )
        there = self.settings() if self.names() else {}
        policy = {} if sampler is None else {"seed": seed, "sampler": sampler}
        here = json.loads(json.dumps({**policy, "scorers": scorers}))
        apart = [
            f"{place} is {_short(old)} there and {_short(new)} here" for place, old, new in self._apart(there, here)
        ]
        if apart:
            raise ValueError(
                f"{self.path} is of a run with other settings: {'; '.join(apart[:4])}. Say the settings of that "
                f"run, another directory, or, for another reward model, another name (NAME=PATH){_hint(apart)}"
            )
        known = there.get("scorers", {})
        merged = {name: merge(known.get(name), scorer) for name, scorer in here["scorers"].items()}
        drawn = {"sampler": merge(there.get("sampler"), here["sampler"])} if policy else {}
        return {**there, **here, **drawn, "scorers": {**known, **merged}}

    def _apart(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
        """Where settings differ that something in the directory was made with."""
        if "sampler" in there and "sampler" in here and self.has_rollouts():
            yield from differences(there["seed"], here["seed"], "seed")
            yield from differences(there["sampler"], here["sampler"], "sampler")
        known = there.get("scorers", {})
        for name in sorted(self.scored({*known} & {*here["scorers"]})):
            yield from differences(known[name], here["scorers"][name], f"scorers.{name}")

    def has_rollouts(self) -> bool:
        """Whether a rollout is kept."""
        states = (self.state(name) for name in self.names())
        return any(count > 0 for state in states if state is not None for count in state.drawn)

    def scored(self, columns: Iterable[str]) -> set[str]:
        """Those of these reward models of which a score is kept."""
        left, found = {*columns}, set[str]()
        for name in self.names():
            if not left:
                break
            state = self.state(name)
            found |= {column for column in left if state is not None and any(state.scored.get(column, []))}
            left -= found
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the whole directory, which is made if need be; waits for whoever does.

        If the block fails, and nothing of a run is there, what this call has made is removed again.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"a run is kept in a directory, got the file {self.path}")
        with ExitStack() as held:
            made = self._hold(held)
            try:
                yield
            except BaseException:
                if not self.names() and not (self.path / "run.json").exists():
                    self._remove(made)
                raise

    def _hold(self, held: ExitStack) -> list[Path]:
        """Lock the directory; the files and folders that had to be made for that, outermost first."""
        lock = self.path / ".lock"
        while True:
            made = [place for place in (lock, *lock.parents) if not place.exists()][::-1]
            with ExitStack() as attempt, suppress(FileNotFoundError):  # another process may just remove what it made
                self.path.mkdir(parents=True, exist_ok=True)
                lock.touch()
                opened = lock.stat()
                attempt.enter_context(claim(lock, wait=True))
                if os.path.samestat(opened, lock.stat()):
                    held.enter_context(attempt.pop_all())
                    return made

    def _remove(self, made: Sequence[Path]) -> None:
        for folder in ("prompts", "rollouts", "aliases"):
            with suppress(OSError):
                (self.path / folder).rmdir()
        for place in reversed(made):
            with suppress(OSError):  # there is something else in it
                place.unlink() if place.name == ".lock" else place.rmdir()

    def names(self) -> list[str]:
        """The shards, in order."""
        # Other files, such as "00000 (1).parquet", are somebody's who copies or synchronises.
        return sorted(file.stem for file in self.path.glob("prompts/*.parquet") if file.stem.isdecimal())

    def free_names(self) -> Iterator[str]:
        """The names of the next shards, without end."""
        first = max((int(name) + 1 for name in self.names()), default=0)
        return (f"{n:05d}" for n in count(first))

    def is_free(self, name: str, keys: Sequence[bytes]) -> bool:
        """Whether there are no rollouts that somebody lost the prompts of; those of an import of these are our own."""
        file = self.rollouts(name)
        if not file.exists():
            return True
        return [*dict.fromkeys(read_table(file, ["key"]).column("key").to_pylist())] == [*keys]

    def prompts(self, name: str) -> list[Planned]:
        """The prompts of a shard."""
        return read_prompts(self._prompts(name))

    def size(self, name: str) -> int:
        """How many prompts a shard has."""
        return rows_in(self._prompts(name))

    def plan(self, name: str, prompts: list[Planned]) -> None:
        """Make a shard of these prompts."""
        write_prompts(self._prompts(name), prompts)

    def forget(self, name: str) -> None:
        """Take back a shard on which nobody has worked."""
        self._prompts(name).unlink(missing_ok=True)
        self.rollouts(name).unlink(missing_ok=True)

    def keys(self) -> Iterator[bytes]:
        """The keys of all prompts."""
        for name in self.names():
            yield from self.keys_of(name)

    def keys_of(self, name: str) -> list[bytes]:
        """The keys of a shard's prompts."""
        return read_keys(self._prompts(name))

    def claim(self, name: str) -> AbstractContextManager[bool]:
        """Hold a shard, if nobody else does."""
        return claim(self._prompts(name))

    def state(self, name: str) -> State | None:
        """How far a shard is; None if nothing has been done."""
        return state_of(self.rollouts(name))

    def most_drawn(self) -> int:
        """The most rollouts that a prompt has."""
        return max((n for name in self.names() if (state := self.state(name)) for n in state.drawn), default=0)

    def load(self, name: str) -> Shard:
        """A shard with all there is of it."""
        return read_shard(self.rollouts(name), self.prompts(name))

    def save(self, name: str, shard: Shard) -> None:
        """Keep the work on a shard."""
        write_shard(self.rollouts(name), shard)

    def tidy(self, name: str) -> None:
        """Remove what a worker that was killed left of a shard; for the one who holds it."""
        for stale in self.path.glob(f"rollouts/.{name}.parquet.*"):
            stale.unlink(missing_ok=True)

    def tidy_all(self) -> None:
        """Remove all else that a process left which was killed as it wrote; for who holds the directory."""
        for pattern in (".run.json.*", "..made_of.*", "*/..made_of.*", "prompts/.*.parquet.*", "aliases/.*.parquet.*"):
            for stale in self.path.glob(pattern):
                stale.unlink(missing_ok=True)

    def rollouts(self, name: str) -> Path:
        """The file of a shard's rollouts."""
        return self.path / "rollouts" / f"{name}.parquet"

    def aliases(self) -> dict[bytes, bytes]:
        """The key that each id leads to."""
        found: dict[bytes, bytes] = {}
        for file in sorted(self.path.glob("aliases/*.parquet")):
            columns = read_table(file, ALIAS.names)
            with readable(file):
                found |= dict(zip(columns.column("alias").to_pylist(), columns.column("key").to_pylist(), strict=True))
        return found

    def add_aliases(self, aliases: Mapping[bytes, bytes]) -> None:
        """Keep more ids."""
        if aliases:
            columns = [list(aliases), list(aliases.values())]
            arrays = [pa.array(column, kind.type) for column, kind in zip(columns, ALIAS, strict=True)]
            number = len([*self.path.glob("aliases/*.parquet")])
            with replace_file(self.path / "aliases" / f"{number:05d}.parquet") as file:
                pq.write_table(pa.table(arrays, schema=ALIAS), file)

    def table(self, name: str | None) -> Path:
        """Where the table of a reward model is; of the only one, without a name, in the directory itself."""
        return self.path if name is None else self.path / name

    def _prompts(self, name: str) -> Path:
        return self.path / "prompts" / f"{name}.parquet"

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace run.json; without settings, remove it."""
        if not settings:
            (self.path / "run.json").unlink(missing_ok=True)
            return
        text = json.dumps({"format": FORMAT, "version": VERSION, **settings}, indent=2, sort_keys=True)
        write_file(self.path / "run.json", text + "\n")


def _hint(apart: Sequence[str]) -> str:
    """What to do about a state that was changed by something else than calls."""
    if not any(".state." in each for each in apart):
        return ""
    return ". A state that no score depends on is left out by a fingerprint() method of the scorer's own"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
