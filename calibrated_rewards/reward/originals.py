"""The prompts as they were calibrated, by table row: the scorer reads these when a prompt arrives in another form.

A trainer may pass the rendered chat template, or an id. The table knows both as names of a prompt, but does not hold
the prompt itself; and a reward model that reads the policy's rendering gives other scores than those in the table.

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
    """A file of prompts as JSON, line i for row i of a table; null for a row whose prompt is not known."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.abspath(self.path))

    @classmethod
    def write(cls, path: str | os.PathLike[str], table: ReferenceTable, prompts: Iterable[Prompt]) -> "Originals":
        """Write those prompts that the table knows; of several with the same row, the first."""
        lines = ["null"] * len(table)
        for prompt in prompts:
            row = int(table.find([prompt])[0])
            if row >= 0 and lines[row] == "null":
                lines[row] = json.dumps(prompt if isinstance(prompt, str) else plain_messages(prompt))
        write_file(path, "".join(f"{line}\n" for line in lines))
        return cls(os.path.abspath(path))

    def __call__(self, rows: Int64[np.ndarray, " G"]) -> list[Prompt | None]:
        """Read the prompt of each row."""
        data, ends = self._file
        begins = np.concatenate([[0], ends[:-1] + 1])
        if len(rows) and not rows.max() < len(ends):
            raise ValueError(f"{self.path} has {len(ends)} prompts, got row {rows.max()}: it is of another table")
        return [json.loads(data[begins[row] : ends[row]]) for row in rows.tolist()]

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    @cached_property
    def _file(self) -> tuple[mmap.mmap, Int64[np.ndarray, " P"]]:
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data, np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))


@dataclass(frozen=True, eq=False)
class RunPrompts:
    """The same from the Parquet files beside a table that lies in its run directory, read at the first lookup."""

    table: ReferenceTable
    directory: Path

    @classmethod
    def beside(cls, table: ReferenceTable) -> "RunPrompts | None":
        """Find the run directory that a table lies in, by its run.json; None for a table that stands alone."""
        if not table.path:
            return None
        at = Path(table.path)
        return next((cls(table, place) for place in (at, at.parent) if (place / "run.json").is_file()), None)

    def __call__(self, rows: Int64[np.ndarray, " G"]) -> list[Prompt | None]:
        """Look up the prompt of each row."""
        return [self._prompts.get(key) for key in self.table.keys(rows)]

    def items(self) -> Iterator[tuple[bytes, Prompt]]:
        """Read key and prompt of each from the columns that calibration writes; a chat is there as JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Other names, such as "00000 (1).parquet", are copies that somebody synchronises.
        for file in sorted(path for path in self.directory.glob("prompts/*.parquet") if path.stem.isdecimal()):
            try:
                names = ["key", "prompt", "chat"]
                columns = pq.ParquetFile(file, page_checksum_verification=True).read(names).to_pydict()
            except (pa.ArrowException, OSError, KeyError) as error:
                raise ValueError(
                    f"{file} must hold a run's prompts, got a file that cannot be read ({error})"
                ) from error
            for key, text, is_chat in zip(columns["key"], columns["prompt"], columns["chat"], strict=True):
                yield key, json.loads(text) if is_chat else text

    @cached_property
    def _prompts(self) -> dict[bytes, Prompt]:
        return dict(self.items())
