"""Write rows as parts, one for each shard of a run, and join the parts as one Parquet or JSONL file or saved dataset.

A part is written in one step together with the counts of what is in it, so that a run that was killed finds how far
it came. Both the parts and what they are joined to depend on their rows alone.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calibrated_rewards.files import replace_file
from calibrated_rewards.training.offline.datasets import Row

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["parquet", "jsonl", "datasets"]
FILES = {"parquet": "train.parquet", "jsonl": "train.jsonl", "datasets": "train"}
COUNTS = b"counts"
# Rows of a row group: parts of few rows are joined.
ROWS_A_GROUP = 20_000


def write_part(path: Path, rows: Sequence[Row], counts: Mapping[str, float], file_format: Format) -> None:
    """Write the rows of a shard and what was counted beside them."""
    text = json.dumps(dict(sorted(counts.items())))
    if file_format == "jsonl":
        encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each row
        with replace_file(path) as file:
            file.write("\n".join([text, *map(encode, rows), ""]).encode())
        return
    import pyarrow.parquet as pq

    table = make_table(rows).replace_schema_metadata({COUNTS: text})
    with replace_file(path) as file:
        pq.write_table(table, file, compression="lz4")  # read once more, so fast


def read_counts(path: Path, file_format: Format) -> dict[str, float] | None:
    """Read what was counted beside a part's rows; None if the part is not there."""
    if not path.exists():
        return None
    if file_format == "jsonl":
        with path.open("rb") as file:
            return dict(json.loads(file.readline()))
    import pyarrow.parquet as pq

    return dict(json.loads(pq.read_schema(path).metadata[COUNTS]))


def make_table(rows: Sequence[Row]) -> "pa.Table":
    """Make rows a table; ValueError if a column has several types, as arguments of tool calls may."""
    import pyarrow as pa

    kinds = {"tokens": pa.int64(), "logprob": pa.float64()}  # known even where all are None
    columns = {}
    for name in rows[0] if rows else ():
        try:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):  # messages of one prompt after another: each is converted once
                starts = [at == 0 or values[at] is not values[at - 1] for at in range(len(values))]
                unique = pa.array(compress(values, starts))
                columns[name] = unique.take(pa.array(at - 1 for at in accumulate(starts)))
            else:
                columns[name] = pa.array(values, kinds.get(name))
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} needs one type, which JSONL does not ask for: {error}") from error
    return pa.table(columns)


def join_parts(parts: Sequence[Path], path: Path, file_format: Format) -> None:
    """Write the rows of all parts, in order, in one step."""
    if file_format == "jsonl":
        with replace_file(path) as file:
            for part in parts:
                with part.open("rb") as lines:
                    lines.readline()
                    shutil.copyfileobj(lines, file, 1 << 20)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = [pq.read_schema(part).remove_metadata() for part in parts]
    try:
        # Keys that only some messages have are null in the others.
        schema = pa.unify_schemas([each for each in schemas if len(each)], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"a column needs one type in all shards, which JSONL does not ask for: {error}") from error
    if file_format == "parquet":
        with replace_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in iterate_groups(parts, schema):
                writer.write_table(table)
        return
    rows = parts[0].with_name("rows.arrow")
    with pa.OSFile(str(rows), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for table in iterate_groups(parts, schema):
            stream.write_table(table)
    save_dataset(rows, path)


def iterate_groups(parts: Sequence[Path], schema: "pa.Schema") -> Iterator["pa.Table"]:
    """Read the rows of parts in groups of some size, with all columns that any of them has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[pa.Table] = []
    for part in parts:
        table = pq.ParquetFile(part).read(use_threads=False)
        if len(table):
            waiting.append(table.cast(schema).replace_schema_metadata(None))
        if sum(map(len, waiting)) >= ROWS_A_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def save_dataset(rows: Path, path: Path) -> None:
    """Save a file of Arrow's stream as a folder for `datasets.load_from_disk`, which is renamed once it is whole."""
    from hashlib import file_digest

    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    with rows.open("rb") as file:
        digest: Any = file_digest(file, "md5").hexdigest()[:16]  # as long as those of `datasets`
    unfinished = rows.with_name("saved")
    shutil.rmtree(unfinished, ignore_errors=True)
    # A fingerprint of its own making would depend on when the file was written.
    Dataset(MemoryMappedTable.from_file(str(rows)), fingerprint=digest).save_to_disk(unfinished)
    if path.exists():  # of an attempt that was stopped after this
        doomed = rows.with_name("removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    os.replace(unfinished, path)
