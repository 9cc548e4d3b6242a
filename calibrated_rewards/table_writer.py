"""Writing a table so that a reader sees the old one or the new one, and so that a kill at any moment does no harm.

Everything goes to temporary names in the same directory, is synced, and is moved into place: the data, then
`table.json`, which until then lies there as `.table.json.<digest of the new header>`. A writer that dies between the
two moves has therefore left a table that can be read, and the next writer finishes the move.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeAlias
from uuid import uuid4

import numpy as np

from calibrated_rewards.table_format import (
    BLOCK_BYTES,
    COLUMNS,
    DATA_FILE,
    DTYPES,
    SUMMARY_FILE,
    Header,
    checksum,
    hex_digest,
    pending_summary,
    read_head,
)

ReadRows: TypeAlias = Callable[[int, int], np.ndarray]
"""The scores of rows first to last - 1, one row after the other, float32."""


def write_table(
    directory: str | os.PathLike[str], columns: Mapping[str, np.ndarray], total: int, meta: str, read: ReadRows
) -> str:
    """Write the table of these columns, rows by ascending key, whose `total` scores `read` hands out block by block.

    Returns the digest of its header, by which it can be told from another writer's.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    given = {name: np.ascontiguousarray(columns[name], DTYPES[COLUMNS[name]]) for name in COLUMNS if name in columns}
    with _temporary_file(path) as (file, name):
        header = _write_data(file, given, total, meta, read)
        os.fsync(file.fileno())
        _commit(path, name, header)
    return hex_digest(header.encode())


def _write_data(file: IO[bytes], columns: dict[str, np.ndarray], total: int, meta: str, read: ReadRows) -> Header:
    """Scores first, since their checksums are a column; then columns, since their digests are in the header."""
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


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file that its writer keeps locked, so that others can tell it from what a dead writer left behind."""
    name = path / f".{DATA_FILE}.{uuid4().hex}"
    with _locked(path):
        _recover(path)
        file = open(name, "xb")  # noqa: SIM115 (closed below, when the table is in place)
        _try_lock(file.fileno())
    try:
        with file:
            yield file, name
    except OSError as error:  # a full disk does not say of which file
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(path / DATA_FILE)) from error
    finally:
        name.unlink(missing_ok=True)


def _commit(path: Path, data: Path, header: Header) -> None:
    digest = hex_digest(header.encode())
    pending = path / pending_summary(digest)
    with _locked(path) as directory:
        with open(pending, "wb") as file:
            file.write(header.summary(digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(data, path / DATA_FILE)
        os.replace(pending, path / SUMMARY_FILE)
        os.fsync(directory)


def _recover(path: Path) -> None:
    """Finish the move of a writer that died between its two, and remove what dead writers left."""
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
def _locked(path: Path) -> Iterator[int]:
    """One writer at a time, for the moment of the moves; some network file systems know no locks, and go without."""
    import fcntl

    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
