"""A shard: some prompts with their rollouts and scores, the unit of work, of files and of what a kill can cost.

Shards on disk: Parquet files that anybody can read, each replaced in one step as work on it goes on."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from calibrated_rewards.files import replace_file
from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.protocol import Rollout


class Planned(NamedTuple):
    """A prompt that is to have rollouts."""

    key: bytes
    prompt: Prompt
    rendered: str | None = None
    """What the policy reads, where that is another text."""


class State(NamedTuple):
    """How far a shard is: for each of its prompts how many rollouts there are, and how many have each score."""

    drawn: list[int]
    scored: dict[str, list[int]]


@dataclass(frozen=True)
class Shard:
    """Prompts and what there is of each: rollouts by number, their seeds, and the scores of the first of them."""

    prompts: tuple[Planned, ...]
    rollouts: tuple[tuple[Rollout, ...], ...]
    seeds: tuple[tuple[int | None, ...], ...]
    scores: dict[str, tuple[Float32[np.ndarray, " _"], ...]] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """How far it is."""
        return State([*map(len, self.rollouts)], {name: [*map(len, each)] for name, each in self.scores.items()})

    def drawn(self, more: Sequence[Sequence[Rollout]], seeds: Sequence[Sequence[int | None]]) -> "Shard":
        """With more rollouts for each prompt."""
        rollouts = tuple((*have, *new) for have, new in zip(self.rollouts, more, strict=True))
        return replace(
            self,
            rollouts=rollouts,
            seeds=tuple((*have, *new) for have, new in zip(self.seeds, seeds, strict=True)),
        )

    def scored(self, name: str, more: Sequence[Float32[np.ndarray, " _"]]) -> "Shard":
        """With more scores of one reward model for each prompt."""
        have = self.scores.get(name, (np.empty(0, np.float32),) * len(self.prompts))
        both = tuple(np.concatenate([old, new]) for old, new in zip(have, more, strict=True))
        return replace(self, scores={**self.scores, name: both})


def as_scored(rollout: Rollout) -> Completion:
    """A rollout's completion as scorers read it: the form in which it is kept, whoever made it."""
    said = rollout.completion
    return said if isinstance(said, str) or not len(said) else plain_messages(said)


def empty(prompts: Sequence[Planned]) -> Shard:
    """A shard of which nothing is done."""
    nothing: tuple[tuple[Any, ...], ...] = ((),) * len(prompts)
    return Shard(tuple(prompts), nothing, nothing)


SCORE = "score:"
_STATE = b"calibrated-rewards shard"
ROLLOUT = pa.schema(
    [
        ("key", pa.binary(16)),
        ("prompt", pa.string()),
        ("chat", pa.bool_()),
        ("number", pa.int32()),
        ("seed", pa.int64()),
        ("completion", pa.string()),
        ("completion_chat", pa.bool_()),
        ("tokens", pa.int32()),
        ("finish", pa.string()),
        ("logprob", pa.float64()),
    ]
)
PROMPT = pa.schema([("key", pa.binary(16)), ("prompt", pa.string()), ("chat", pa.bool_()), ("rendered", pa.string())])


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard; a reader finds the one before or this one, whatever happens."""
    state = json.dumps(shard.state._asdict(), separators=(",", ":"))
    columns = {name: [] for name in ROLLOUT.names} if not shard.prompts else _columns(shard)
    table = pa.table([pa.array(columns[column.name], column.type) for column in ROLLOUT], schema=ROLLOUT)
    for name, scores in shard.scores.items():
        # Null where a rollout waits for its score.
        padded = [[*own.tolist(), *[None] * (len(r) - len(own))] for own, r in zip(scores, shard.rollouts, strict=True)]
        table = table.append_column(SCORE + name, pa.array([x for own in padded for x in own], pa.float32()))
    with replace_file(path) as file:
        pq.write_table(
            table.replace_schema_metadata({_STATE: state.encode()}), file, compression="zstd", write_page_checksum=True
        )


def read_shard(path: Path, prompts: Sequence[Planned]) -> Shard:
    """The shard of these prompts as it is on disk; an empty one if nothing has been done."""
    if not path.exists():
        return empty(prompts)
    with readable(path):
        return _shard_of(path, prompts)


def _shard_of(path: Path, prompts: Sequence[Planned]) -> Shard:
    state, table = _of_these(path, prompts)
    given = {name: table.column(name).to_pylist() for name in ROLLOUT.names if name not in ("key", "prompt", "chat")}
    made = [
        Rollout(loaded(text, chat), tokens, finish, logprob)
        for text, chat, tokens, finish, logprob in zip(
            *(given[name] for name in ("completion", "completion_chat", "tokens", "finish", "logprob")), strict=True
        )
    ]
    spans = _spans(state)
    scores = {name: _scores(table, name, spans, counts) for name, counts in state.scored.items()}
    rollouts, seeds = (tuple(tuple(column[span]) for span in spans) for column in (made, given["seed"]))
    return Shard(tuple(prompts), rollouts, seeds, scores)


def state_of(path: Path) -> State | None:
    """How far the shard on disk is, from the end of its file alone; None if there is none."""
    if not path.exists():
        return None
    with readable(path):
        return _state(path, _opened(path))


def read_scores(path: Path, prompts: Sequence[Planned], name: str) -> list[Float32[np.ndarray, " _"]]:
    """The scores that the rollouts of each prompt have so far, of one reward model."""
    with readable(path):
        state, table = _of_these(path, prompts, ["key", SCORE + name])
        if name not in state.scored:
            return [np.empty(0, np.float32)] * len(prompts)
        return [*_scores(table, name, _spans(state), state.scored[name])]


def write_prompts(path: Path, prompts: Sequence[Planned]) -> None:
    """Write which prompts a shard has."""
    columns = [[p.key for p in prompts], *zip(*(stored(p.prompt) for p in prompts), strict=True)]
    columns.append([p.rendered for p in prompts])
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, PROMPT, strict=True)]
    with replace_file(path) as file:
        pq.write_table(pa.table(arrays, schema=PROMPT), file, compression="zstd", write_page_checksum=True)


def read_prompts(path: Path) -> list[Planned]:
    """Which prompts a shard has."""
    with readable(path):
        table = _prompts(path, PROMPT.names)
        columns = [table.column(name).to_pylist() for name in PROMPT.names]
        return [Planned(key, loaded(text, chat), rendered) for key, text, chat, rendered in zip(*columns, strict=True)]


def read_keys(path: Path) -> list[bytes]:
    """The keys of a shard's prompts."""
    with readable(path):
        return list(_prompts(path, ["key"]).column("key").to_pylist())


def rows_in(path: Path) -> int:
    """How many rows a Parquet file has, from its end alone."""
    with readable(path):
        return int(_opened(path).metadata.num_rows)


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A Parquet file, or some of its columns; read by this thread alone, since shards are many and small."""
    with readable(path):
        return _read(_opened(path), columns)


def stored(said: Prompt | Completion) -> tuple[str, bool]:
    """A text as it is; messages as JSON, and that they are."""
    if isinstance(said, str):
        return said, False
    messages = plain_messages(said) if len(said) else []
    try:
        return json.dumps(messages, ensure_ascii=False), True
    except TypeError as error:
        raise TypeError(f"rollouts are kept as JSON, which cannot say {start_of(said)}: {error}") from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in whatever a damaged one raises as it is read."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} must be a Parquet file, got one that cannot be read ({error})") from error


def loaded(text: str, chat: bool) -> Any:
    """What `stored` was given."""
    return json.loads(text) if chat else text


def _columns(shard: Shard) -> dict[str, list[Any]]:
    rows: list[tuple[Any, ...]] = []
    for planned, rollouts, seeds in zip(shard.prompts, shard.rollouts, shard.seeds, strict=True):
        prompt = stored(planned.prompt)
        for number, (rollout, seed) in enumerate(zip(rollouts, seeds, strict=True)):
            made = (*stored(rollout.completion), rollout.tokens, rollout.finish, rollout.logprob)
            rows.append((planned.key, *prompt, number, seed, *made))
    return dict(zip(ROLLOUT.names, map(list, zip(*rows, strict=True)) if rows else [[]] * len(ROLLOUT), strict=True))


def _prompts(path: Path, columns: list[str]) -> Any:
    file = _opened(path)
    if not file.schema_arrow.equals(PROMPT):
        raise ValueError(f"{path} must hold the prompts of a shard, got another Parquet file")
    return _read(file, columns)


def _of_these(path: Path, prompts: Sequence[Planned], columns: list[str] | None = None) -> tuple[State, Any]:
    """State and rows of one file, whoever replaces it meanwhile; refused if they are not of these prompts."""
    file = _opened(path)
    state, table = _state(path, file), _read(file, columns)
    mine = [prompt.key for prompt in prompts]
    owners = [key for key, count in zip(mine, state.drawn, strict=False) for _ in range(count)]
    if len(state.drawn) != len(mine) or table.column("key").to_pylist() != owners:
        raise ValueError(
            f"{path} must hold the rollouts of its {len(mine)} prompts, got those of others: delete it to redo it"
        )
    return state, table


def _state(path: Path, file: Any) -> State:
    metadata = file.schema_arrow.metadata or {}
    if _STATE not in metadata:
        raise ValueError(f"{path} must be a shard of this library, got another Parquet file")
    state = State(**json.loads(metadata[_STATE]))
    # This text has no checksum in the file, so what it says is compared with what is there.
    counts = [state.drawn, *state.scored.values()]
    fitting = all(0 <= have <= all_ for own in counts for have, all_ in zip(own, state.drawn, strict=True))
    if not fitting or sum(state.drawn) != file.metadata.num_rows:
        raise ValueError(f"{path} must say how many rollouts it has, got {state} for {file.metadata.num_rows} rows")
    return state


def _spans(state: State) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(np.cumsum([0, *state.drawn]).tolist())]


def _scores(table: Any, name: str, spans: list[slice], counts: list[int]) -> tuple[Float32[np.ndarray, " _"], ...]:
    flat = table.column(SCORE + name).to_numpy()
    return tuple(flat[span][:count].astype(np.float32) for span, count in zip(spans, counts, strict=True))


def _opened(path: Path) -> Any:
    return pq.ParquetFile(path, page_checksum_verification=True)


def _read(file: Any, columns: list[str] | None) -> Any:
    table = file.read(columns=columns, use_threads=False)
    table.validate(full=True)  # here, where the file is known: a text that is not UTF-8 would fail where it is used
    return table
