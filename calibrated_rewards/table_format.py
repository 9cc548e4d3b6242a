"""The format of a table on disk, `table.safetensors` beside `table.json`: what its header says, and its digests.

docs/reference/table_format.md is the specification; `table_mapped` reads it and `table_writer` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

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
    """What stands before the data: how much there is of everything, the digests of the columns, the caller's meta."""

    prompts: int
    total: int
    rows_per_block: int
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    meta: str

    @property
    def blocks(self) -> int:
        """How many blocks of rows have a checksum of their own."""
        return -(-self.prompts // self.rows_per_block)

    def tensors(self) -> dict[str, dict[str, Any]]:
        """The tensor entries of the header, which follow from the counts alone."""
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
        """Whether sizes, digests and meta are such as a table can have."""
        offsets, *aliases = (self.sizes.get(name, 0) for name in ("offsets", "alias_high", "alias_low", "alias_rows"))
        return (
            (offsets == self.prompts + 1 or (offsets == 0 and self.total % self.prompts == 0))
            and aliases == [aliases[0]] * 3
            and set(self.digests) == set(self.tensors()) - {"scores"}
            and isinstance(json.loads(self.meta), dict)
        )

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
        if len(text) > _LONGEST_HEADER:
            raise ValueError(f"a table needs meta of less than {_LONGEST_HEADER} bytes, got {len(self.meta)}")
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


def read_head(fd: int, path: Path) -> bytes:
    """The length and the header of an open data file, as they stand there."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{path} must be a safetensors file, got {size} bytes with a header of {length}")
    return os.pread(fd, 8 + length, 0)


def decode_header(head: bytes, path: Path) -> Header:
    """The header that `read_head` gave, refused with the reason where it is not one of ours."""
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
    """The 128-bit digest of a header or of a column."""
    return blake2b(data, digest_size=16).hexdigest()


def checksum(scores: bytes | memoryview) -> bytes:
    """The 64-bit checksum of a block of rows."""
    return blake2b(scores, digest_size=8).digest()


def pending_summary(digest: str) -> str:
    """The name that `table.json` has until the data it belongs to is in place."""
    return f".{SUMMARY_FILE}.{digest}"
