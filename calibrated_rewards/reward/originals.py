"""The prompts that were calibrated, by row: what a reward model reads when a prompt arrives in another form.

A trainer may hand over the rendered chat template, or an id. The table knows both as names of a prompt, but not the
prompt itself; and a reward model that reads the policy's rendering gives other scores than the ones in the table.

>>> import tempfile
>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> chat = [{"role": "user", "content": "Hi"}]
>>> table = ReferenceTable.build([(chat, [0.5], ["<user>Hi</user>"])])
>>> originals = Originals.write(tempfile.mkdtemp() + "/prompts.jsonl", table, [chat])
>>> originals(table.rows(["<user>Hi</user>"]))
[[{'role': 'user', 'content': 'Hi'}]]
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from calibrated_rewards.files import write_file
from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.table.reference_table import ReferenceTable


@dataclass(frozen=True)
class Originals:
    """A file of prompts as JSON, line i for row i of a table; null for a row without."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.abspath(self.path))

    @classmethod
    def write(cls, path: str | os.PathLike[str], table: ReferenceTable, prompts: Iterable[Prompt]) -> "Originals":
        """Of those prompts that the table knows; the first of several that are one row."""
        lines = ["null"] * len(table)
        for prompt in prompts:
            row = int(table.find([prompt])[0])
            if row >= 0 and lines[row] == "null":
                lines[row] = json.dumps(prompt if isinstance(prompt, str) else plain_messages(prompt))
        write_file(path, "".join(f"{line}\n" for line in lines))
        return cls(os.path.abspath(path))

    def __call__(self, rows: Int64[np.ndarray, " G"]) -> list[Prompt | None]:
        """The prompt of each row."""
        data, ends = self._file
        begins = np.concatenate([[0], ends[:-1] + 1])
        if len(rows) and not rows.max() < len(ends):
            raise ValueError(f"{self.path} has {len(ends)} prompts, got row {rows.max()}: it is of another table")
        lines = (data[begins[row] : ends[row]] for row in rows.tolist())
        return [json.loads(line) for line in lines]

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    @cached_property
    def _file(self) -> tuple[mmap.mmap, Int64[np.ndarray, " P"]]:
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data, np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))


def of_run(table: ReferenceTable) -> "OfRun | None":
    """The prompts of the run that a table lies in, if it does."""
    run = run_of(table)
    return None if run is None else OfRun(table, run)


def run_of(table: ReferenceTable) -> Path | None:
    """The directory of the calibration run that a table lies in, if it does."""
    at = Path(table.path) if table.path else None
    return next((place for place in (at, at.parent) if (place / "run.json").is_file()), None) if at else None


@dataclass(frozen=True, eq=False)
class OfRun:
    """The same from a calibration run's own files, all of them read when the first prompt is asked for."""

    table: ReferenceTable
    directory: Path

    def __call__(self, rows: Int64[np.ndarray, " G"]) -> list[Prompt | None]:
        """The prompt of each row."""
        return [self._prompts.get(key) for key in self.table.keys(rows)]

    def prompts(self) -> Iterator[tuple[bytes, Prompt]]:
        """Key and prompt of each."""
        from calibrated_rewards.calibration.run_directory import RunDirectory
        from calibrated_rewards.calibration.shards import loaded, stored

        run = RunDirectory(self.directory)
        planned = (each for name in run.names() for each in run.prompts(name))
        return ((each.key, loaded(*stored(each.prompt))) for each in planned)

    @cached_property
    def _prompts(self) -> dict[bytes, Prompt]:
        return dict(self.prompts())
