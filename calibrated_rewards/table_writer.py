"""Writing a table so that a reader sees the old one or the new one, and so that a kill at any moment does no harm.

Everything goes to temporary names in the same directory, is synced, and is moved into place: the data, then `table.json`,
which until then lies there as `.table.json.<digest of the new header>`. A writer that dies between the two moves has
therefore left a table that can be read, and the next writer finishes the move.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
from jaxtyping import Float32

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

Reader = Callable[[int, int], Float32[np.ndarray, " T"]]
"""The scores of rows first to last - 1, one after the other."""


def write_table(
    directory: str | os.PathLike[str], columns: Mapping[str, np.ndarray], total: int, meta: str, read: Reader
) -> None:
    """Write the table whose columns are given and whose `total` scores `read` hands out, in rows of ascending keys."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    given = {
        name: np.ascontiguousarray(columns[name], DTYPES[dtype]) for name, dtype in COLUMNS.items() if name in columns
    }
    with _temporary_file(path) as (file, name):
        header = _write_data(file, given, total, meta, read)
        os.fsync(file.fileno())
        _commit(path, name, header)


def _write_data(file: BinaryIO, columns: dict[str, np.ndarray], total: int, meta: str, read: Reader) -> Header:
    """Scores first, since the checksums before them come of them, then the columns, then the header."""
    prompts = len(columns["keys_high"])
    rows = max(1, BLOCK_BYTES // (4 * -(-total // prompts)))
    sizes = {name: len(column) for name, column in columns.items() if not name.startswith("keys")}
    columns = {**columns, "checksums": np.empty(-(-prompts // rows), DTYPES["U64"])}
    # Digests have one length, so zeros in their place give the header the length that it will have.
    blank = {name: hex_digest(b"") for name, column in columns.items() if len(column)}
    header = Header(prompts, total, rows, sizes, blank, meta)
    start = len(header.encode())
    begin = {name: start + entry["data_offsets"][0] for name, entry in header.tensors().items()}
    file.seek(begin["scores"])
    for block, first in enumerate(range(0, prompts, rows)):
        scores = np.ascontiguousarray(read(first, min(first + rows, prompts)), DTYPES["F32"])
        columns["checksums"][block] = np.frombuffer(checksum(scores.data.cast("B")), DTYPES["U64"])[0]
        file.write(scores.data)
    for name in blank:
        file.seek(begin[name])
        file.write(columns[name].data)
    header = replace(header, digests={name: hex_digest(columns[name].data.cast("B")) for name in blank})
    file.seek(0)
    file.write(header.encode())
    file.flush()
    return header


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file that its writer keeps locked, so that others can tell it from what a dead writer left behind."""
    name = path / f".{DATA_FILE}.{uuid4().hex}"
    with _locked(path):
        _recover(path)
        file = open(name, "xb")  # noqa: SIM115 (closed below, when the table is in place)
        _try_lock(file.fileno())
    try:
        with file:
            yield file, name
    finally:
        name.unlink(missing_ok=True)


def _commit(path: Path, data: Path, header: Header) -> None:
    digest = hex_digest(header.encode())
    with _locked(path):
        pending = path / pending_summary(digest)
        with open(pending, "wb") as file:
            file.write(header.summary(digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(data, path / DATA_FILE)
        os.replace(pending, path / SUMMARY_FILE)
        _sync(path)


def _recover(path: Path) -> None:
    """Finish the move of a writer that died between its two, and remove what dead writers left."""
    if (path / DATA_FILE).exists():
        fd = os.open(path / DATA_FILE, os.O_RDONLY)
        with contextlib.suppress(
            ValueError, FileNotFoundError
        ):  # a foreign file, or, as nearly always, nothing to finish
            os.replace(path / pending_summary(hex_digest(read_head(fd, path))), path / SUMMARY_FILE)
        os.close(fd)
    for stale in [*path.glob(f".{SUMMARY_FILE}.*"), *path.glob(f".{DATA_FILE}.*")]:
        with open(stale, "rb") as file:
            if _try_lock(file.fileno()):
                stale.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, for the moment of the moves; some network file systems know no locks, and go without."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
