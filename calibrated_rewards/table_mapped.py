"""An open table: a mapped file of which every byte is checked before its first use, and none before that."""

from __future__ import annotations

import json
import mmap
import os
import time
import weakref
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Shaped

from calibrated_rewards.table_format import (
    COLUMNS,
    DATA_FILE,
    DTYPES,
    SUMMARY_FILE,
    Header,
    checksum,
    decode_header,
    hex_digest,
    pending_summary,
    read_head,
)

_READ_BYTES = 1 << 20
_ATTEMPTS, _PAUSE = 10, 0.005


class MappedTable:
    """The content of a table on disk: columns and scores are views of the mapped file.

    `touch(rows)` comes before any use of `scores`; `column(name)` checks by itself. Threads may share it: the worst
    that they do to each other is to check the same block twice.
    """

    def __init__(self, path: str, header: Header, head: bytes, fd: int, verify: bool | None) -> None:
        self.path, self.header, self.digest, self.verify = path, header, hex_digest(head), verify
        self.prompts, self.total, self.meta = header.prompts, header.total, header.meta
        tensors = header.tensors()
        self._begin = {name: len(head) + entry["data_offsets"][0] for name, entry in tensors.items()}
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        views = {
            name: np.frombuffer(mapped, DTYPES[entry["dtype"]], entry["shape"][0], self._begin[name])
            for name, entry in tensors.items()
        }
        self.scores: Float32[np.ndarray, " T"] = views.pop("scores")
        self._columns: dict[str, np.ndarray] = {
            name: np.empty(0, DTYPES[dtype]) for name, dtype in COLUMNS.items()
        } | views
        self._unchecked = set() if verify is False else set(views)
        self._checked = np.full(header.blocks, verify is False)
        self._complete = verify is False
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def column(self, name: str) -> Shaped[np.ndarray, " _"]:
        """One of COLUMNS, empty where the table has none."""
        if name in self._unchecked:
            self._check_column(name)
        return self._columns[name]

    def touch(self, rows: Int[np.ndarray, " B"]) -> None:
        """Check the blocks of these rows that were not checked yet."""
        if self._complete:
            return
        blocks = rows // self.header.rows_per_block
        if not self._checked[blocks].all():
            for block in np.unique(blocks[~self._checked[blocks]]).tolist():
                self._check_block(block)
            self._complete = bool(self._checked.all())

    def check(self) -> None:
        """Check everything now."""
        for name in list(self._unchecked):
            self._check_column(name)
        self.touch(np.arange(0, self.prompts, self.header.rows_per_block))

    def read(self, first: int, last: int) -> Float32[np.ndarray, " _"]:
        """The scores of rows first to last - 1, read and not mapped: a pass over all of them keeps no memory."""
        self.touch(np.arange(first, last))
        return np.frombuffer(self._read_rows(first, last), DTYPES["F32"])

    def _check_column(self, name: str) -> None:
        begin, end = self._begin[name], self._begin[name] + self._columns[name].nbytes
        state = blake2b(digest_size=16)
        for at in range(begin, end, _READ_BYTES):
            state.update(self._read(at, min(at + _READ_BYTES, end)))
        if state.hexdigest() != self.header.digests.get(name):
            raise ValueError(f"{self.path}: {name} must be as it was written, got a digest of {state.hexdigest()}")
        self._unchecked.discard(name)

    def _check_block(self, block: int) -> None:
        first = block * self.header.rows_per_block
        last = min(first + self.header.rows_per_block, self.prompts)
        got = checksum(self._read_rows(first, last))
        if got != self.column("checksums")[block].tobytes():
            rows = f"the scores of rows {first} to {last - 1}"
            raise ValueError(f"{self.path}: {rows} must be as they were written, got a checksum of {got.hex()}")
        self._checked[block] = True

    def _read_rows(self, first: int, last: int) -> bytes:
        offsets, uniform = self.column("offsets"), self.total // self.prompts
        begin, end = (int(offsets[row]) if len(offsets) else row * uniform for row in (first, last))
        return self._read(self._begin["scores"] + 4 * begin, self._begin["scores"] + 4 * end)

    def _read(self, begin: int, end: int) -> bytes:
        data = os.pread(self._fd, end - begin, begin)
        if len(data) != end - begin:
            raise ValueError(f"{self.path}: {DATA_FILE} must not shrink while it is open, got {len(data)} bytes")
        return data

    def __reduce__(self) -> tuple[Callable[..., MappedTable], tuple[object, ...]]:
        return reopen, (self.path, self.digest, self.verify)


def reopen(path: str, digest: str, verify: bool | None) -> MappedTable:
    """The table that was pickled or built, if its path still holds that one."""
    table = open_table(path, verify)
    if table.digest != digest:
        raise ValueError(f"{path} must hold the table with digest {digest}; got another, {table.digest}")
    return table


def open_table(directory: str | os.PathLike[str], verify: bool | None = None) -> MappedTable:
    """Open a table: `verify` None checks what is touched when it is touched, True everything now, False nothing."""
    path = Path(os.path.abspath(directory))
    for _ in range(_ATTEMPTS):
        if table := _attempt(path, verify):
            if verify:
                table.check()
            return table
        time.sleep(_PAUSE)  # a writer may have made its moves between our two looks
    raise ValueError(f"{path / SUMMARY_FILE} must carry the digest of the header of {DATA_FILE}, got another")


def _attempt(path: Path, verify: bool | None) -> MappedTable | None:
    """The table, or None where the two files belong to different ones."""
    summary = _read_if_there(path / SUMMARY_FILE)
    if summary is None and not (path / DATA_FILE).exists():
        tables = sorted(str(each.parent) for each in path.glob(f"*/{SUMMARY_FILE}"))
        if tables and (path / "reward.json").is_file():
            raise FileNotFoundError(f"{path} is a calibrated reward and no table: its table is {tables[0]}")
        if tables:
            raise FileNotFoundError(
                f"{path} has a table for each of its reward models: name one, {' or '.join(tables)}"
            )
        raise FileNotFoundError(f"there is no table at {path}: it has neither {SUMMARY_FILE} nor {DATA_FILE}")
    fd = os.open(path / DATA_FILE, os.O_RDONLY)
    try:
        head = read_head(fd, path / DATA_FILE)
        digest = hex_digest(head)
        if summary is None or _claimed_digest(summary, path / SUMMARY_FILE) != digest:
            # A writer is between its two moves, or died there.
            summary = _read_if_there(path / pending_summary(digest))
        if summary is None:
            return None
        return MappedTable(str(path), _agreed(head, summary, fd, path), head, os.dup(fd), verify)
    finally:
        os.close(fd)


def _agreed(head: bytes, summary: bytes, fd: int, path: Path) -> Header:
    """The header, once it fits the size of the file and `table.json` says the same."""
    header = decode_header(head, path / DATA_FILE)
    size, wanted = os.fstat(fd).st_size, len(head) + header.tensors()["scores"]["data_offsets"][1]
    if size != wanted:
        raise ValueError(f"{path / DATA_FILE} must have {wanted} bytes, as its header says, got {size}")
    if summary != header.summary(hex_digest(head)):
        raise ValueError(f"{path / SUMMARY_FILE} must be as it was written, a copy of the header; got an edited one")
    return header


def _claimed_digest(summary: bytes, path: Path) -> str:
    try:
        return str(json.loads(summary)["header_digest"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON with a header_digest, got {error!r}") from None


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
