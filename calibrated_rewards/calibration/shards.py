"""A shard: some prompts with their rollouts and scores, kept in Parquet files that anybody can read.

A shard is the unit of work, and the most that a kill can cost: its files are replaced in one step after each step of
the work on it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.files import replace_file
from calibrated_rewards.models.text import plain_messages
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.protocol import Rollout

# The column of a reward model's scores has its name behind this.
SCORE = "score:"
_STATE = b"calibrated-rewards shard"


class Planned(NamedTuple):
    """A prompt that is to have rollouts."""

    key: bytes
    prompt: Prompt
    rendered: str | None = None
    """The text that the policy reads, where that is another."""


class State(NamedTuple):
    """The progress of a shard: the number of rollouts of each prompt, and how many of them have each score."""

    drawn: list[int]
    scored: dict[str, list[int]]

    def is_scored(self, name: str) -> bool:
        """Check that all rollouts have the score of a reward model."""
        return self.scored.get(name, [0] * len(self.drawn)) == self.drawn


@dataclass(frozen=True)
class Shard:
    """Prompts with their rollouts by number, the seeds of these, and the scores of the first of them."""

    prompts: tuple[Planned, ...]
    rollouts: tuple[tuple[Rollout, ...], ...]
    seeds: tuple[tuple[int | None, ...], ...]
    scores: dict[str, tuple[Float32[np.ndarray, " _"], ...]] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """Count the rollouts and scores of each prompt."""
        return State([*map(len, self.rollouts)], {name: [*map(len, each)] for name, each in self.scores.items()})

    def add_rollouts(self, more: Sequence[Sequence[Rollout]], seeds: Sequence[Sequence[int | None]]) -> "Shard":
        """Return the shard with more rollouts for each prompt."""
        rollouts = tuple((*have, *new) for have, new in zip(self.rollouts, more, strict=True))
        return replace(
            self, rollouts=rollouts, seeds=tuple((*have, *new) for have, new in zip(self.seeds, seeds, strict=True))
        )

    def add_scores(self, name: str, more: Sequence[Float32[np.ndarray, " _"]]) -> "Shard":
        """Return the shard with more scores of one reward model for each prompt."""
        have = self.scores.get(name, (np.empty(0, np.float32),) * len(self.prompts))
        scores = tuple(np.concatenate([old, new]) for old, new in zip(have, more, strict=True))
        return replace(self, scores={**self.scores, name: scores})

    def find_extremes(self, at: int, name: str) -> list[int]:
        """Number the rollouts of a prompt with the lowest and the highest score of a reward model."""
        scores = self.scores[name][at] if name in self.scores else ()
        return [*dict.fromkeys([int(np.argmin(scores)), int(np.argmax(scores))])] if len(scores) else []


def new_shard(prompts: Sequence[Planned]) -> Shard:
    """Make a shard without rollouts."""
    empty: tuple[tuple[Any, ...], ...] = ((),) * len(prompts)
    return Shard(tuple(prompts), empty, empty)


def get_completion(rollout: Rollout) -> Completion:
    """Return a rollout's completion as scorers read it: in the form in which it is kept, whoever made it."""
    completion = rollout.completion
    return completion if isinstance(completion, str) or not len(completion) else plain_messages(completion)


@cache
def rollout_schema() -> Any:
    """The columns of a file of rollouts, without those of scores."""
    import pyarrow as pa

    return pa.schema(
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


@cache
def prompt_schema() -> Any:
    """The columns of a file of prompts."""
    import pyarrow as pa

    return pa.schema([("key", pa.binary(16)), ("prompt", pa.string()), ("chat", pa.bool_()), ("rendered", pa.string())])


def write_table(path: Path, schema: Any, columns: Sequence[Sequence[Any]], **options: Any) -> None:
    """Write columns as a Parquet file in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)]
    with replace_file(path) as file:
        pq.write_table(pa.table(arrays, schema=schema), file, **options)


def write_shard(path: Path, shard: Shard) -> None:
    """Write the rollouts and scores of a shard."""
    import pyarrow as pa

    rows: list[tuple[Any, ...]] = []
    for planned, rollouts, seeds in zip(shard.prompts, shard.rollouts, shard.seeds, strict=True):
        prompt = encode_text(planned.prompt)
        for number, (rollout, seed) in enumerate(zip(rollouts, seeds, strict=True)):
            completion = encode_text(rollout.completion)
            details = (rollout.tokens, rollout.finish, rollout.logprob)
            rows.append((planned.key, *prompt, number, seed, *completion, *details))
    schema = rollout_schema()
    columns: list[Sequence[Any]] = [*zip(*rows, strict=True)] if rows else [()] * len(schema)
    for name, scores in shard.scores.items():
        # Null where a rollout waits for its score.
        padded = [
            [*each.tolist(), *[None] * (len(r) - len(each))] for each, r in zip(scores, shard.rollouts, strict=True)
        ]
        schema = schema.append(pa.field(SCORE + name, pa.float32()))
        columns.append([score for each in padded for score in each])
    state = json.dumps(shard.state._asdict(), separators=(",", ":"))
    schema = schema.with_metadata({_STATE: state.encode()})
    write_table(path, schema, columns, compression="zstd", write_page_checksum=True)


def read_shard(path: Path, prompts: Sequence[Planned]) -> Shard:
    """Read the shard of these prompts; a new one if there is no file."""
    if not path.exists():
        return new_shard(prompts)
    with readable(path):
        state, table = _read_rows(path, prompts)
        texts, chats, *details, seeds = (
            table.column(name).to_pylist()
            for name in ("completion", "completion_chat", "tokens", "finish", "logprob", "seed")
        )
        completions = map(decode_text, texts, chats)
        rollouts = [Rollout(*each) for each in zip(completions, *details, strict=True)]
        spans = _spans(state)
        scores = {name: tuple(_slice_scores(table, name, state)) for name in state.scored}
        by_prompt = tuple(tuple(rollouts[span]) for span in spans)
        return Shard(tuple(prompts), by_prompt, tuple(tuple(seeds[span]) for span in spans), scores)


def read_state(path: Path) -> State | None:
    """Read the progress of a shard from the end of its file alone; None if there is no file."""
    if not path.exists():
        return None
    with readable(path):
        return _read_state(path, _open(path))


def read_scores(path: Path, prompts: Sequence[Planned], name: str) -> list[Float32[np.ndarray, " _"]]:
    """Read the scores that the rollouts of each prompt have so far, of one reward model."""
    if path.exists():
        with readable(path):
            state, table = _read_rows(path, prompts, ["key", SCORE + name])
            if name in state.scored:
                return _slice_scores(table, name, state)
    return [np.empty(0, np.float32)] * len(prompts)


def write_prompts(path: Path, prompts: Sequence[Planned]) -> None:
    """Write the prompts of a shard."""
    texts = [encode_text(planned.prompt) for planned in prompts]
    rows = [(p.key, *text, p.rendered) for p, text in zip(prompts, texts, strict=True)]
    write_table(path, prompt_schema(), [*zip(*rows, strict=True)], compression="zstd", write_page_checksum=True)


def read_prompts(path: Path) -> list[Planned]:
    """Read the prompts of a shard."""
    with readable(path):
        columns = _read_prompt_columns(path, ["key", "prompt", "chat", "rendered"])
        return [
            Planned(key, decode_text(text, chat), rendered) for key, text, chat, rendered in zip(*columns, strict=True)
        ]


def read_keys(path: Path) -> list[bytes]:
    """Read the keys of a shard's prompts."""
    with readable(path):
        return list(_read_prompt_columns(path, ["key"])[0])


def count_rows(path: Path) -> int:
    """Read the number of rows of a Parquet file from its end alone."""
    with readable(path):
        return int(_open(path).metadata.num_rows)


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """Read a Parquet file, or some of its columns, by this thread alone, since shards are many and small."""
    with readable(path):
        return _read(_open(path), columns)


def encode_text(value: Prompt | Completion) -> tuple[str, bool]:
    """Encode a prompt or completion as a text, with whether it is messages, which become JSON."""
    if isinstance(value, str):
        return value, False
    messages = plain_messages(value) if len(value) else []
    try:
        return json.dumps(messages, ensure_ascii=False), True
    except TypeError as error:
        raise TypeError(f"rollouts are kept as JSON, which cannot say {start_of(value)}: {error}") from None


def decode_text(text: str, chat: bool) -> Any:
    """Decode what `encode_text` has encoded."""
    return json.loads(text) if chat else text


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in whatever a damaged one raises as it is read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} must be a Parquet file, got one that cannot be read ({error})") from error


def _read_prompt_columns(path: Path, columns: list[str]) -> list[list[Any]]:
    file = _open(path)
    if not file.schema_arrow.equals(prompt_schema()):
        raise ValueError(f"{path} must hold the prompts of a shard, got another Parquet file")
    table = _read(file, columns)
    return [table.column(name).to_pylist() for name in columns]


def _read_rows(path: Path, prompts: Sequence[Planned], columns: list[str] | None = None) -> tuple[State, Any]:
    """Read state and rows of one file, whoever replaces it meanwhile; refuse those of other prompts."""
    file = _open(path)
    state, table = _read_state(path, file), _read(file, columns)
    keys = [key for planned, count in zip(prompts, state.drawn, strict=False) for key in [planned.key] * count]
    if len(state.drawn) != len(prompts) or table.column("key").to_pylist() != keys:
        raise ValueError(
            f"{path} must hold the rollouts of its {len(prompts)} prompts, got those of others: delete it to redo it"
        )
    return state, table


def _read_state(path: Path, file: Any) -> State:
    metadata = file.schema_arrow.metadata or {}
    if _STATE not in metadata:
        raise ValueError(f"{path} must be a shard of this library, got another Parquet file")
    state = State(**json.loads(metadata[_STATE]))
    # This text has no checksum in the file, so its counts are compared with the rows.
    counts = [state.drawn, *state.scored.values()]
    fitting = all(0 <= have <= drawn for each in counts for have, drawn in zip(each, state.drawn, strict=True))
    if not fitting or sum(state.drawn) != file.metadata.num_rows:
        raise ValueError(f"{path} must say how many rollouts it has, got {state} for {file.metadata.num_rows} rows")
    return state


def _spans(state: State) -> list[slice]:
    """The rows of each prompt."""
    return [slice(a, b) for a, b in pairwise(np.cumsum([0, *state.drawn]).tolist())]


def _slice_scores(table: Any, name: str, state: State) -> list[Float32[np.ndarray, " _"]]:
    flat = table.column(SCORE + name).to_numpy()
    spans = zip(_spans(state), state.scored[name], strict=True)
    return [flat[span][:count].astype(np.float32) for span, count in spans]


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


def _read(file: Any, columns: list[str] | None) -> Any:
    table = file.read(columns=columns, use_threads=False)
    table.validate(full=True)  # here, where the file is known: a text that is not UTF-8 would fail where it is used
    return table
