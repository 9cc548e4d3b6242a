"""A table on disk, `table.safetensors` beside `table.json`: its format, its writer, and the mapped file that is read.

docs/reference/table_format.md specifies the format. A reader sees the old table or the new one, and a kill at any
moment does no harm: everything goes to temporary names in the same directory, is synced, and is moved into place, the
data first, then `table.json`, which until then lies there as `.table.json.<digest of the new header>`. A writer that
dies between the two moves has left a table that can be read, and the next writer finishes the move.

A table that is opened is a mapped file: every byte is checked before its first use, and none before that.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int, Shaped

from calibrated_rewards.files import lock_file, open_temporary_file

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
DTYPES: dict[str, np.dtype[Any]] = {"U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F32": np.dtype("<f4")}
# Small enough that the first touch of a row costs 0.1 ms, large enough that checksums are 1/8192 of the scores.
BLOCK_BYTES = 1 << 16
_LONGEST_HEADER = 100_000_000  # the limit of safetensors itself


@dataclass(frozen=True)
class Header:
    """The header of the data file: counts, digests of the columns, the caller's meta."""

    prompts: int
    total: int
    rows_per_block: int
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    meta: str

    @property
    def blocks(self) -> int:
        """The number of blocks of rows, each of which has a checksum."""
        return -(-self.prompts // self.rows_per_block)

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return the tensor entries of the header, which follow from the counts alone."""
        every = {"keys_high": self.prompts, "keys_low": self.prompts, **self.sizes, "checksums": self.blocks}
        entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name, dtype in {**COLUMNS, "scores": "F32"}.items():
            size = self.total if name == "scores" else every.get(name, 0)
            if size:
                begin, end = end, end + size * DTYPES[dtype].itemsize
                entries[name] = {"dtype": dtype, "shape": [size], "data_offsets": [begin, end]}
        return entries

    def is_consistent(self) -> bool:
        """Return whether sizes, digests and meta are such as a table can have."""
        offsets, *aliases = (self.sizes.get(name, 0) for name in ("offsets", "alias_high", "alias_low", "alias_rows"))
        return (
            (offsets == self.prompts + 1 or (offsets == 0 and self.total % self.prompts == 0))
            and aliases == [aliases[0]] * 3
            and set(self.digests) == set(self.tensors()) - {"scores"}
            and isinstance(json.loads(self.meta), dict)
        )

    def encode(self) -> bytes:
        """Return the bytes before the data: length, JSON, and spaces up to a multiple of eight."""
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
        if len(text) > _LONGEST_HEADER:
            raise ValueError(f"a table needs meta of less than {_LONGEST_HEADER} bytes, got {len(self.meta)}")
        return len(text).to_bytes(8, "little") + text

    def summary(self, digest: str) -> bytes:
        """Return the bytes of `table.json`: facts for people, and the digest that ties it to this header."""
        fields = {
            "format": FORMAT,
            "version": int(VERSION),
            "prompts": self.prompts,
            "scores": self.total,
            "header_digest": digest,
            "meta": json.loads(self.meta),
        }
        return (json.dumps(fields, indent=2) + "\n").encode()


def read_head(fd: int, path: Path) -> bytes:
    """Read the length and the header of an open data file, as bytes."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{path} must be a safetensors file, got {size} bytes with a header of {length}")
    return os.pread(fd, 8 + length, 0)


def decode_header(head: bytes, path: Path) -> Header:
    """Decode the bytes of `read_head`; refuse a header that is not one of ours, with the reason."""
    try:
        entries = json.loads(head[8:])
        metadata = entries.pop("__metadata__")
        if (metadata["format"], metadata["version"], metadata["keys"]) != (FORMAT, VERSION, KEYS):
            raise ValueError(f"a {metadata['format']!r} of version {metadata['version']}, keys {metadata['keys']!r}")
        prompts, total, rows_per_block = (int(metadata[name]) for name in ("prompts", "scores", "rows_per_block"))
        if not 1 <= prompts <= total or rows_per_block < 1:
            raise ValueError(f"{prompts} prompts, {total} scores, {rows_per_block} rows per block")
        sizes, digests = json.loads(metadata["sizes"]), json.loads(metadata["digests"])
        header = Header(prompts, total, rows_per_block, sizes, digests, metadata["meta"])
        if entries != header.tensors() or not header.is_consistent():
            raise ValueError(f"tensors {entries} where the counts say {header.tensors()}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        rule = f"{path} must be a {FORMAT!r} of version {VERSION}, keys {KEYS!r}"
        raise ValueError(f"{rule}; got {error if isinstance(error, ValueError) else repr(error)}") from None
    return header


def hex_digest(data: bytes | memoryview) -> str:
    """Return the 128-bit digest of a header or of a column."""
    return blake2b(data, digest_size=16).hexdigest()


def checksum(scores: bytes | memoryview) -> bytes:
    """Return the 64-bit checksum of a block of rows."""
    return blake2b(scores, digest_size=8).digest()


def pending_summary(digest: str) -> str:
    """Return the name that `table.json` has until the data it belongs to is in place."""
    return f".{SUMMARY_FILE}.{digest}"


ReadRows: TypeAlias = Callable[[int, int], np.ndarray]
"""Gives the scores of rows first to last - 1, one row after the other, as float32."""


def write_table(
    directory: str | os.PathLike[str], columns: Mapping[str, np.ndarray], total: int, meta: str, read: ReadRows
) -> str:
    """Write a table of these columns, rows by ascending key, whose `total` scores `read` gives block by block.

    Returns the digest of its header, by which it can be told from another writer's.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(columns[name], DTYPES[COLUMNS[name]]) for name in COLUMNS if name in columns}
    with contextlib.ExitStack() as closing:
        with _lock_directory(path):
            _recover(path)
            file = closing.enter_context(open_temporary_file(path / DATA_FILE))
            _try_lock(file.fileno())  # so that others can tell it from what a dead writer left behind
        header = _write_data(file, arrays, total, meta, read)
        os.fsync(file.fileno())
        _commit(path, Path(file.name), header)
    return hex_digest(header.encode())


def _write_data(file: IO[bytes], columns: dict[str, np.ndarray], total: int, meta: str, read: ReadRows) -> Header:
    """Write scores, whose checksums are a column; then columns, whose digests are in the header; then the header."""
    prompts = len(columns["keys_high"])
    rows = max(1, BLOCK_BYTES // (4 * -(-total // prompts)))
    sizes = {name: len(column) for name, column in columns.items() if not name.startswith("keys")}
    blank = Header(prompts, total, rows, sizes, {}, meta)
    columns["checksums"] = np.empty(blank.blocks, DTYPES["U64"])
    names = [name for name in blank.tensors() if name != "scores"]
    # All digests have one length, so the header has its final length already.
    blank = replace(blank, digests=dict.fromkeys(names, hex_digest(b"")))
    start = len(blank.encode())
    begin = {name: start + entry["data_offsets"][0] for name, entry in blank.tensors().items()}
    file.seek(begin["scores"])
    for block, first in enumerate(range(0, prompts, rows)):
        scores = np.ascontiguousarray(read(first, min(first + rows, prompts)), DTYPES["F32"])
        columns["checksums"][block] = np.frombuffer(checksum(_bytes(scores)), DTYPES["U64"])[0]
        file.write(_bytes(scores))
    for name in names:
        file.seek(begin[name])
        file.write(_bytes(columns[name]))
    header = replace(blank, digests={name: hex_digest(_bytes(columns[name])) for name in names})
    file.seek(0)
    file.write(header.encode())
    file.flush()
    return header


def _bytes(array: np.ndarray) -> memoryview:
    return array.data.cast("B")


def _commit(path: Path, data: Path, header: Header) -> None:
    digest = hex_digest(header.encode())
    pending = path / pending_summary(digest)
    with _lock_directory(path) as directory:
        with open(pending, "wb") as file:
            file.write(header.summary(digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(data, path / DATA_FILE)
        os.replace(pending, path / SUMMARY_FILE)
        os.fsync(directory)


def _recover(path: Path) -> None:
    """Finish the move of a writer that died between its two moves, and remove the files that dead writers left."""
    if (path / DATA_FILE).exists():
        with open(path / DATA_FILE, "rb") as data, contextlib.suppress(ValueError, FileNotFoundError):
            # Nearly always there is nothing to finish; and a foreign file is about to be replaced.
            digest = hex_digest(read_head(data.fileno(), path / DATA_FILE))
            os.replace(path / pending_summary(digest), path / SUMMARY_FILE)
    for stale in [*path.glob(f".{SUMMARY_FILE}.*"), *path.glob(f".{DATA_FILE}.*")]:
        # What cannot be opened or has gone meanwhile is another writer's business: tidying must not fail a write.
        with contextlib.suppress(OSError), open(stale, "rb") as file:
            if _try_lock(file.fileno()):
                stale.unlink()


@contextlib.contextmanager
def _lock_directory(path: Path) -> Iterator[int]:
    """Keep other writers out for the moment of the moves; a file system without locks goes without."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            lock_file(fd, wait=True)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return lock_file(fd)
    return False


_READ_BYTES = 1 << 20
_ATTEMPTS, _PAUSE = 10, 0.005


class MappedTable:
    """Content of a table on disk: columns and scores are views of the mapped file.

    `touch(rows)` comes before any use of `scores`; `column(name)` checks by itself. Threads may share it: at worst
    they check the same block twice.
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
        """Return one of COLUMNS, empty where the table has none."""
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
        """Check all columns and scores now."""
        for name in list(self._unchecked):
            self._check_column(name)
        self.touch(np.arange(0, self.prompts, self.header.rows_per_block))

    def read(self, first: int, last: int) -> Float32[np.ndarray, " _"]:
        """Return the scores of rows first to last - 1, read and not mapped: a pass over all of them keeps no memory."""
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
        digest = checksum(self._read_rows(first, last))
        if digest != self.column("checksums")[block].tobytes():
            rows = f"the scores of rows {first} to {last - 1}"
            raise ValueError(f"{self.path}: {rows} must be as they were written, got a checksum of {digest.hex()}")
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
    """Open the table that was pickled or built, if its path still holds that one."""
    table = open_table(path, verify)
    if table.digest != digest:
        raise ValueError(f"{path} must hold the table with digest {digest}; got another, {table.digest}")
    return table


def open_table(directory: str | os.PathLike[str], verify: bool | None = None) -> MappedTable:
    """Open a table: `verify` None checks what is touched when it is touched, True everything now, False nothing."""
    path = Path(os.path.abspath(directory))
    for _ in range(_ATTEMPTS):
        if table := _open_once(path, verify):
            if verify:
                table.check()
            return table
        time.sleep(_PAUSE)  # a writer may have made its moves between our two looks
    raise ValueError(f"{path / SUMMARY_FILE} must carry the digest of the header of {DATA_FILE}, got another")


def _open_once(path: Path, verify: bool | None) -> MappedTable | None:
    """Open the table, or return None where the two files belong to different tables."""
    summary = _read_or_none(path / SUMMARY_FILE)
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
        if summary is None or _read_digest(summary, path / SUMMARY_FILE) != digest:
            # A writer is between its two moves, or died there.
            summary = _read_or_none(path / pending_summary(digest))
        if summary is None:
            return None
        return MappedTable(str(path), _check_header(head, summary, fd, path), head, os.dup(fd), verify)
    finally:
        os.close(fd)


def _check_header(head: bytes, summary: bytes, fd: int, path: Path) -> Header:
    """Return the header; refuse one that does not fit the size of the file or `table.json`."""
    header = decode_header(head, path / DATA_FILE)
    size, expected = os.fstat(fd).st_size, len(head) + header.tensors()["scores"]["data_offsets"][1]
    if size != expected:
        raise ValueError(f"{path / DATA_FILE} must have {expected} bytes, as its header says, got {size}")
    if summary != header.summary(hex_digest(head)):
        raise ValueError(f"{path / SUMMARY_FILE} must be as it was written, a copy of the header; got an edited one")
    return header


def _read_digest(summary: bytes, path: Path) -> str:
    try:
        return str(json.loads(summary)["header_digest"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON with a header_digest, got {error!r}") from None


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
