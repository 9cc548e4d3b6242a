"""A table as a repository of the Hub: its files, its card, and the rollouts of its run in a form that the viewer shows.

The rollouts become one Parquet file under `data/`, which `datasets.load_dataset(name)` reads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.table.card import Card, check_secrets, write_card

if TYPE_CHECKING:
    from calibrated_rewards.table.reference_table import ReferenceTable

DATA = "data/rollouts.parquet"
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": DATA}]}]
# The columns of a run's file of rollouts beside the scores, those that people read first.
FIRST, LAST = ["prompt", "completion"], ["number", "tokens", "finish", "logprob", "seed", "chat", "completion_chat"]
SUMMARY = "The scores of a reward model for completions that a reference policy drew, sorted by prompt."
CODE = """from calibrated_rewards import ReferenceTable

table = ReferenceTable.from_pretrained("{name}")"""
ROLLOUTS = """## Rollouts

The completions themselves, {rows:,} rows: `prompt`, `completion`, {scores}. Where the column `chat` is true, the prompt
is a list of messages as JSON; `key` is the key of the prompt in the table.

```python
from datasets import load_dataset

rollouts = load_dataset("{name}", split="train")
```"""


def write_repository(
    table: "ReferenceTable",
    folder: Path,
    name: str,
    *,
    licence: str | None = None,
    base_model: Sequence[str] = (),
    rollouts: bool = False,
    card: bool = True,
    force: bool = False,
) -> None:
    """Write what `push_to_hub` uploads: the table, its card, and its rollouts if they are asked for."""
    if not force:
        check_secrets(table.meta, "the table")
    table.save(folder)
    # Where there is no file for the viewer, it would read table.json as data.
    metadata: dict[str, Any] = {"viewer": False}
    sections = []
    if rollouts:
        rows, scores = write_rollouts(table, folder / DATA)
        columns = ", ".join(f"`{column}`" for column in scores)
        metadata, sections = {"configs": CONFIGS}, [ROLLOUTS.format(rows=rows, scores=columns, name=name)]
    if card:
        code = CODE.format(name=name)
        text = Card(name, "reference-table", SUMMARY, code, {}, licence, base_model, metadata, sections)
        write_card(folder, text, {"": table})


def find_run(table: "ReferenceTable") -> Path:
    """Find the run directory that a table lies in; ValueError if it stands alone, or has no rollouts."""
    at = Path(table.path) if table.path else None
    places = [] if at is None else [at, at.absolute().parent]
    run = next((place for place in places if (place / "run.json").is_file()), None)
    if run is None or not list_shards(run):
        where = table.path or "in memory"
        raise ValueError(f"rollouts are pushed from the folder of a calibration run, the table ({where}) is in none")
    return run


def list_shards(run: Path) -> list[Path]:
    """List a run's files of rollouts."""
    # Other names, such as "00000 (1).parquet", are copies that somebody synchronises.
    return sorted(path for path in run.glob("rollouts/*.parquet") if path.stem.isdecimal())


def write_rollouts(table: "ReferenceTable", path: Path) -> tuple[int, list[str]]:
    """Join a run's files of rollouts as one, with the same columns; return its number of rows and columns of scores.

    Rollouts that a reward model has not scored have nulls in its column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards, rows = list_shards(find_run(table)), 0
    scores = sorted({name for file in shards for name in pq.read_schema(file).names if name.startswith("score:")})
    first = pq.read_schema(shards[0])
    schema = pa.schema(
        [
            *(first.field(name) for name in FIRST),
            *(pa.field(name, pa.float32()) for name in scores),
            *(first.field(name) for name in LAST),
            pa.field("key", pa.string()),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for file in shards:
            shard = pq.ParquetFile(file, page_checksum_verification=True).read()
            keys = pa.array([key.hex() for key in shard.column("key").to_pylist()], pa.string())
            columns = [shard.column(n) if n in shard.column_names else pa.nulls(len(shard)) for n in schema.names[:-1]]
            arrays = [column.cast(field.type) for column, field in zip([*columns, keys], schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            rows += len(shard)
    return rows, scores


def upload(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    message: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder to the Hub, to a new repository if there is none, and return the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        repo_type=repo_type,
        folder_path=folder,
        revision=revision,
        commit_message=message,
        ignore_patterns=[".*"],
    )
    return str(commit.commit_url)
