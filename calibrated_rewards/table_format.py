"""The format of a table on disk, `table.safetensors` beside `table.json`: its header, its checksums, and how it is opened.

docs/table_format.md is the specification. Opening reads the header only; every other byte is mapped, and checked against
a checksum before the first use of it. `table_writer` writes what is read here.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

FORMAT, VERSION, KEYS = "calibrated-rewards table", "1", "blake2b-128 of canonical prompt 1"
DATA_FILE, SUMMARY_FILE = "table.safetensors", "table.json"
# In file order: all of eight bytes, so that every one of them and the scores after them are aligned.
COLUMNS = {
    "keys_high": "U64",
    "keys_low": "U64",
    "offsets": "I64",
    "alias_high": "U64",
    "alias_low": "U64",
    "alias_rows": "I64",
    "lengths": "I64",
    "checksums": "U64",
}
DTYPES = {"U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F32": np.dtype("<f4")}
# Small enough that the first touch of a row costs 0.1 ms, large enough that checksums are 1/8192 of the scores.
BLOCK_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_LONGEST_HEADER = 100_000_000  # the limit of safetensors itself
_ATTEMPTS, _PAUSE = 10, 0.01


@dataclass(frozen=True)
class Header:
    """What stands before the data: how much there is of everything, the digests of the columns, the caller's meta."""

    prompts: int
    total: int
    rows_per_block: int
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    meta: str

    @property
    def uniform(self) -> int:
        """The K that all rows have; of no meaning where there are offsets."""
        return self.total // self.prompts

    def tensors(self) -> dict[str, dict[str, Any]]:
        """The tensor entries of the header, which follow from the counts alone."""
        blocks = -(-self.prompts // self.rows_per_block)
        every = {"keys_high": self.prompts, "keys_low": self.prompts, **self.sizes, "checksums": blocks}
        entries, end = {}, 0
        for name, dtype in {**COLUMNS, "scores": "F32"}.items():
            size = self.total if name == "scores" else every.get(name, 0)
            if size:
                begin, end = end, end + size * DTYPES[dtype].itemsize
                entries[name] = {"dtype": dtype, "shape": [size], "data_offsets": [begin, end]}
        return entries

    def encode(self) -> bytes:
        """The bytes before the data: length, JSON, and spaces up to a multiple of eight."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "keys": KEYS,
            "prompts": str(self.prompts),
            "scores": str(self.total),
            "rows_per_block": str(self.rows_per_block),
            "sizes": json.dumps(dict(self.sizes)),
            "digests": json.dumps(dict(self.digests)),
            "meta": self.meta,
        }
        text = json.dumps({"__metadata__": metadata, **self.tensors()}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def summary(self, digest: str) -> bytes:
        """`table.json`: what people look at, and the digest that ties it to this header."""
        fields = {
            "format": FORMAT,
            "version": int(VERSION),
            "prompts": self.prompts,
            "scores": self.total,
            "header_digest": digest,
            "meta": json.loads(self.meta),
        }
        return (json.dumps(fields, indent=2) + "\n").encode()


def decode_header(data: bytes, path: Path) -> Header:
    """The header in its encoded form, refused with the reason where it is not one of ours."""
    try:
        entries = json.loads(data[8:])
        metadata = entries.pop("__metadata__")
        if (metadata["format"], metadata["version"], metadata["keys"]) != (FORMAT, VERSION, KEYS):
            raise ValueError(f"is {metadata['format']!r} version {metadata['version']}, keys {metadata['keys']!r}")
        counts = [int(metadata[field]) for field in ("prompts", "scores", "rows_per_block")]
        header = Header(*counts, json.loads(metadata["sizes"]), json.loads(metadata["digests"]), metadata["meta"])
        if not 1 <= header.prompts <= header.total or header.rows_per_block < 1:
            raise ValueError(f"has prompts, scores, rows_per_block = {counts}")
        if entries != header.tensors():
            raise ValueError(f"has tensors {entries}, its counts say {header.tensors()}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path / DATA_FILE} must be a {FORMAT!r} of version {VERSION}, keys {KEYS!r}; got one that {error}"
        ) from None
    return header


def hex_digest(data: bytes) -> str:
    """The 128-bit digest of header and columns."""
    return blake2b(data, digest_size=16).hexdigest()


def checksum(data: bytes | memoryview) -> bytes:
    """The 64-bit checksum of one block of rows."""
    return blake2b(data, digest_size=8).digest()


class MappedTable:
    """An open table: columns and scores are views of the mapped file, each checked when first touched.

    `touch(rows)` comes before any use of `scores`; `column(name)` checks by itself. Threads may share it: the worst that
    they do to each other is to check the same block twice.
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
        self._columns = {name: np.empty(0, DTYPES[dtype]) for name, dtype in COLUMNS.items()} | views
        self._unchecked = set() if verify is False else set(views)
        self._checked = np.full(len(views["checksums"]), verify is False)
        self._complete = verify is False
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def column(self, name: str) -> np.ndarray:
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

    def read(self, first: int, last: int) -> Float32[np.ndarray, " T"]:
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
            rows = f"rows {first} to {last - 1}"
            raise ValueError(
                f"{self.path}: the scores of {rows} must be as they were written, got checksum {got.hex()}"
            )
        self._checked[block] = True

    def _read_rows(self, first: int, last: int) -> bytes:
        offsets = self.column("offsets")
        begin, end = (
            offsets[[first, last]].tolist() if len(offsets) else [r * self.header.uniform for r in (first, last)]
        )
        return self._read(self._begin["scores"] + 4 * begin, self._begin["scores"] + 4 * end)

    def _read(self, begin: int, end: int) -> bytes:
        data = os.pread(self._fd, end - begin, begin)
        if len(data) != end - begin:
            raise ValueError(
                f"{self.path}: {DATA_FILE} must not shrink while it is open, got {len(data)} bytes at {begin}"
            )
        return data

    def __reduce__(self) -> tuple[Callable[..., MappedTable], tuple[object, ...]]:
        return _reopen, (self.path, self.digest, self.verify)


def _reopen(path: str, digest: str, verify: bool | None) -> MappedTable:
    """The table that was pickled, if its path still holds that one."""
    table = open_table(path, verify)
    if table.digest != digest:
        raise ValueError(f"{path} must hold the table that was pickled, {digest}; got another, {table.digest}")
    return table


def open_table(directory: str | os.PathLike[str], verify: bool | None = None) -> MappedTable:
    """Open a table: `verify` None checks what is touched when it is touched, True everything now, False nothing."""
    path = os.path.abspath(directory)
    for _ in range(_ATTEMPTS):
        if table := _attempt(Path(path), verify):
            if verify:
                table.check()
            return table
        time.sleep(_PAUSE)  # a writer may be between its two replaces
    raise ValueError(f"{path}: {SUMMARY_FILE} must carry the digest of the header of {DATA_FILE}, got another")


def _attempt(path: Path, verify: bool | None) -> MappedTable | None:
    """The table, or None where the two files belong to different ones."""
    summary = _read_if_there(path / SUMMARY_FILE)
    if summary is None and not (path / DATA_FILE).exists():
        raise FileNotFoundError(f"there is no table at {path}: it has no {SUMMARY_FILE}")
    fd = os.open(path / DATA_FILE, os.O_RDONLY)
    try:
        head = read_head(fd, path)
        digest = hex_digest(head)
        if summary is None or _claimed_digest(summary, path) != digest:
            summary = _read_if_there(
                path / pending_summary(digest)
            )  # of a writer between its replaces, or that died there
        if summary is not None:
            return MappedTable(str(path), _agreed(head, summary, fd, path), head, os.dup(fd), verify)
        return None
    finally:
        os.close(fd)


def _agreed(head: bytes, summary: bytes, fd: int, path: Path) -> Header:
    """The header, once it fits the size of the file and `table.json` says the same."""
    header = decode_header(head, path)
    size, wanted = (
        os.fstat(fd).st_size,
        len(head) + max(entry["data_offsets"][1] for entry in header.tensors().values()),
    )
    if size != wanted:
        raise ValueError(f"{path / DATA_FILE} must have {wanted} bytes, as its header says, got {size}")
    if summary != header.summary(hex_digest(head)):
        raise ValueError(f"{path / SUMMARY_FILE} must be as it was written, a copy of the header; got an edited one")
    return header


def read_head(fd: int, path: Path) -> bytes:
    """The length and the header, as they stand in the file."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{path / DATA_FILE} must be a safetensors file, got {size} bytes with a header of {length}")
    return os.pread(fd, 8 + length, 0)


def pending_summary(digest: str) -> str:
    """The name that `table.json` has until the data it belongs to is in place."""
    return f".table.json.{digest}"


def _claimed_digest(summary: bytes, path: Path) -> str:
    try:
        return str(json.loads(summary)["header_digest"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / SUMMARY_FILE} must be JSON with a header_digest, got {error!r}") from None


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
