"""The directory of a run: its settings, its prompts in shards, and the rollouts of each shard.

```
run.json                  what the rollouts depend on, and the fingerprint of each reward model
prompts/00000.parquet     the prompts of a shard; written once
rollouts/00000.parquet    their rollouts, a row each, with a column `score:NAME` for each reward model
aliases/00000.parquet     ids that lead to prompts
.reward_models.json       where the command loaded each reward model from
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

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.calibration.shards import (
    Planned,
    Shard,
    State,
    count_rows,
    read_keys,
    read_prompts,
    read_scores,
    read_shard,
    read_state,
    read_table,
    readable,
    write_prompts,
    write_shard,
    write_table,
)
from calibrated_rewards.files import claim, write_file
from calibrated_rewards.scorers.differences import Difference, differences, merge

FORMAT, VERSION = "calibrated-rewards run", 1
# Where the reward models were loaded from, which the next command names.
REWARD_MODELS = ".reward_models.json"
# Names that a reward model cannot have, whose table is in a folder of that name.
RESERVED_NAMES = ("prompts", "rollouts", "aliases", "run.json", "table.json", "table.safetensors")


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run. Each is replaced in one step, so a kill at any moment leaves whole files."""

    path: Path

    def settings(self) -> dict[str, Any]:
        """Read run.json; empty before the first run."""
        file = self.path / "run.json"
        if not file.exists():
            return {}
        try:
            settings = json.loads(file.read_text())
            format_, version = settings.pop("format"), settings.pop("version")
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} must be the settings of a run, got something else ({error!r})") from None
        if (format_, version) != (FORMAT, VERSION):
            raise ValueError(f"{file} must be a {FORMAT!r} of version {VERSION}, got {format_!r} of version {version}")
        return dict(settings)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace run.json; without settings, remove it."""
        if not settings:
            (self.path / "run.json").unlink(missing_ok=True)
            return
        text = json.dumps({"format": FORMAT, "version": VERSION, **settings}, indent=2, sort_keys=True)
        write_file(self.path / "run.json", text + "\n")

    def reward_models(self) -> dict[str, str]:
        """Read where each reward model was loaded from, by its name; empty where no command has written it down."""
        try:
            return dict(json.loads((self.path / REWARD_MODELS).read_text()))
        except (OSError, ValueError):
            return {}

    def note_reward_models(self, places: Mapping[str, str]) -> None:
        """Write down where reward models were loaded from: beside the settings, for no score depends on it."""
        if {**self.reward_models(), **places} != self.reward_models():
            write_file(self.path / REWARD_MODELS, json.dumps({**self.reward_models(), **places}, indent=2) + "\n")

    def update_settings(
        self, seed: int, sampler: Mapping[str, Any] | None, scorers: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Add these settings to the run's, or refuse them, as `merge_settings` does; the directory is locked."""
        merged = self.merge_settings(seed, sampler, scorers)
        if merged != self.settings():
            self.write_settings(merged)

    def merge_settings(
        self, seed: int, sampler: Mapping[str, Any] | None, scorers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Merge these settings with the run's; refuse others, since rollouts of two policies do not go into one table.

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
            f"{place} is {_short(old)} there and {_short(new)} here" for place, old, new in self._compare(there, here)
        ]
        if apart:
            message = (
                f"{self.path} is of a run with other settings: {'; '.join(apart[:4])}. Say the settings of that "
                "run, another directory, or, for another reward model, another name (NAME=PATH)"
            )
            if any(".state." in each for each in apart):
                message += (
                    ". A state that no score depends on is left out by a fingerprint() method of the scorer's own"
                )
            raise ValueError(message)
        known = there.get("scorers", {})
        merged = {name: merge(known.get(name), scorer) for name, scorer in here["scorers"].items()}
        drawn = {"sampler": merge(there.get("sampler"), here["sampler"])} if policy else {}
        return {**there, **here, **drawn, "scorers": {**known, **merged}}

    def _compare(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
        """Find the differences of settings that something in the directory was made with."""
        if "sampler" in there and "sampler" in here and self.has_rollouts():
            yield from differences(there["seed"], here["seed"], "seed")
            yield from differences(there["sampler"], here["sampler"], "sampler")
        known = there.get("scorers", {})
        for name in sorted(self.find_scored({*known} & {*here["scorers"]})):
            yield from differences(known[name], here["scorers"][name], f"scorers.{name}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the whole directory, which is made if need be; wait for whoever holds it.

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
                    for place in [*(self.path / folder for folder in ("prompts", "rollouts", "aliases")), *made]:
                        with suppress(OSError):  # there is something else in it
                            place.unlink() if place.name == ".lock" else place.rmdir()
                raise

    def _hold(self, held: ExitStack) -> list[Path]:
        """Lock the directory; list the files and folders that had to be made for that, innermost first."""
        lock = self.path / ".lock"
        while True:
            made = [place for place in (lock, *lock.parents) if not place.exists()]
            with ExitStack() as attempt, suppress(FileNotFoundError):  # another process may just remove what it made
                self.path.mkdir(parents=True, exist_ok=True)
                lock.touch()
                opened = lock.stat()
                attempt.enter_context(claim(lock, wait=True))
                if os.path.samestat(opened, lock.stat()):
                    held.enter_context(attempt.pop_all())
                    return made

    def names(self) -> list[str]:
        """List the shards, in order."""
        # Other files, such as "00000 (1).parquet", are somebody's who copies or synchronises.
        return sorted(file.stem for file in self.path.glob("prompts/*.parquet") if file.stem.isdecimal())

    def free_names(self) -> Iterator[str]:
        """Name the next shards, without end."""
        first = max((int(name) + 1 for name in self.names()), default=0)
        return (f"{n:05d}" for n in count(first))

    def is_free(self, name: str, keys: Sequence[bytes] = ()) -> bool:
        """Check that no rollouts are there whose prompts were lost; an import may find its own, of prompts `keys`."""
        file = self.rollouts(name)
        if not file.exists():
            return True
        return [*dict.fromkeys(read_table(file, ["key"]).column("key").to_pylist())] == [*keys]

    def claim(self, name: str) -> AbstractContextManager[bool]:
        """Hold a shard, if nobody else does."""
        return claim(self._prompts(name))

    def prompts(self, name: str) -> list[Planned]:
        """Read the prompts of a shard."""
        return read_prompts(self._prompts(name))

    def write_prompts(self, name: str, prompts: list[Planned]) -> None:
        """Make a shard of these prompts."""
        write_prompts(self._prompts(name), prompts)

    def size(self, name: str) -> int:
        """Count the prompts of a shard."""
        return count_rows(self._prompts(name))

    def keys(self) -> Iterator[bytes]:
        """Read the keys of all prompts."""
        for name in self.names():
            yield from self.keys_of(name)

    def keys_of(self, name: str) -> list[bytes]:
        """Read the keys of a shard's prompts."""
        return read_keys(self._prompts(name))

    def state(self, name: str) -> State | None:
        """Read the progress of a shard; None if nothing has been done."""
        return read_state(self.rollouts(name))

    def load(self, name: str) -> Shard:
        """Read a shard with its rollouts and scores."""
        return read_shard(self.rollouts(name), self.prompts(name))

    def scores(self, name: str, column: str) -> list[Float32[np.ndarray, " _"]]:
        """Read the scores that each prompt of a shard has so far, by number of the rollout."""
        return read_scores(self.rollouts(name), self.prompts(name), column)

    def save(self, name: str, shard: Shard) -> None:
        """Write the rollouts and scores of a shard."""
        write_shard(self.rollouts(name), shard)

    def remove(self, name: str) -> None:
        """Remove a shard on which nobody has worked."""
        self._prompts(name).unlink(missing_ok=True)
        self.rollouts(name).unlink(missing_ok=True)

    def states(self) -> Iterator[State]:
        """Read the progress of each shard on which something has been done."""
        return (state for name in self.names() if (state := self.state(name)) is not None)

    def has_rollouts(self) -> bool:
        """Check that a rollout is kept."""
        return any(any(state.drawn) for state in self.states())

    def max_drawn(self) -> int:
        """Count the rollouts of the prompt that has the most."""
        return max((n for state in self.states() for n in state.drawn), default=0)

    def find_scored(self, columns: Iterable[str]) -> set[str]:
        """Find those of some reward models of which a score is kept."""
        left, scored = {*columns}, set[str]()
        states = self.states()
        while left and (state := next(states, None)) is not None:
            scored |= {column for column in left if any(state.scored.get(column, []))}
            left -= scored
        return scored

    def remove_stale_files(self, name: str | None = None) -> None:
        """Remove files that a process left which was killed as it wrote.

        Those of a shard's rollouts, for the one who holds the shard; or without a name all others, for the one who
        holds the directory.
        """
        others = (".run.json.*", "..made_of.*", "*/..made_of.*", "prompts/.*.parquet.*", "aliases/.*.parquet.*")
        for pattern in others if name is None else (f"rollouts/.{name}.parquet.*",):
            for stale in self.path.glob(pattern):
                stale.unlink(missing_ok=True)

    def aliases(self) -> dict[bytes, bytes]:
        """Read the key that each id leads to."""
        aliases: dict[bytes, bytes] = {}
        for file in self.alias_files():
            table = read_table(file, ["alias", "key"])
            with readable(file):
                aliases |= zip(table.column("alias").to_pylist(), table.column("key").to_pylist(), strict=True)
        return aliases

    def alias_files(self) -> list[Path]:
        """List the files of ids."""
        return sorted(self.path.glob("aliases/*.parquet"))

    def add_aliases(self, aliases: Mapping[bytes, bytes]) -> None:
        """Write the keys of more ids."""
        if aliases:
            import pyarrow as pa

            schema = pa.schema([("alias", pa.binary(16)), ("key", pa.binary(16))])
            file = self.path / "aliases" / f"{len(self.alias_files()):05d}.parquet"
            write_table(file, schema, [[*aliases], [*aliases.values()]])

    def rollouts(self, name: str) -> Path:
        """The file of a shard's rollouts."""
        return self.path / "rollouts" / f"{name}.parquet"

    def _prompts(self, name: str) -> Path:
        return self.path / "prompts" / f"{name}.parquet"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
