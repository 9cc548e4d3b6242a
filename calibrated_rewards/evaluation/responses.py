"""Rollouts of a run as numbers, prompt by prompt: tokens, scores, and the KL of each completion.

A measured KL is cached beside the rollouts, in `divergence/00000.parquet` for the shard of that name.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float64
from tqdm import tqdm

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import SCORE, read_table
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.results import Precision
from calibrated_rewards.files import replace_file
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.scorers.protocol import fingerprint

Measure = Callable[[Sequence[Prompt], Sequence[Sequence[Rollout]]], Sequence[Sequence[Any]]]
"""For each rollout of each prompt its KL, and whether its text makes as many tokens as were drawn."""
_MODELS = b"calibrated-rewards divergence"
_CACHE = pa.schema([("key", pa.binary(16)), ("number", pa.int32()), ("kl", pa.float64()), ("as_drawn", pa.bool_())])


@runtime_checkable
class KnowsPrecision(Protocol):
    """A measure of KL that reports its numerical precision."""

    def precision(self) -> Precision:
        """Return the dtype that its models are read in, and the rounding that they differ by if that is all."""


@dataclass(frozen=True)
class Responses:
    """Tokens and scores of m completions of each prompt."""

    tokens: Float[np.ndarray, "P m"]
    """nan where the sampler does not count them."""
    scores: Mapping[str, Float[np.ndarray, "P m"]]
    empty: int = 0
    """Completions without a text, or with nothing but white space."""


def read_responses(path: Path, prompts: Mapping[bytes, Prompt], scorers: Sequence[str], m: int) -> Responses:
    """Read the first m completions of these prompts, in this order; ValueError if a run has fewer."""
    tokens: dict[bytes, list[float]] = {}
    scores: dict[str, dict[bytes, npt.NDArray[np.float32]]] = {name: {} for name in scorers}
    directory, empty = RunDirectory(path), 0
    for name in directory.names():
        shard = directory.load(name)
        for i, planned in enumerate(shard.prompts):
            rollouts = shard.rollouts[i][:m]
            if planned.key in prompts:
                empty += sum(_is_empty(rollout.completion) for rollout in rollouts)
            tokens[planned.key] = [np.nan if r.tokens is None else float(r.tokens) for r in rollouts]
            for scorer in shard.scores.keys() & {*scorers}:
                scores[scorer][planned.key] = shard.scores[scorer][i][:m]
    arrays = {scorer: _stack(f"{path}, {scorer}", rows, prompts, m) for scorer, rows in scores.items()}
    return Responses(_stack(str(path), tokens, prompts, m), arrays, empty)


def _is_empty(completion: Completion) -> bool:
    messages: Any = [{"content": completion}] if isinstance(completion, str) else completion
    return not any(str(each.get("content") or "").strip() for each in messages)


def measure_kl(
    path: Path, prompts: Mapping[bytes, Prompt], measure: Measure, m: int, show_progress: bool = True
) -> tuple[Float[np.ndarray, "P m"], int]:
    """Measure the KL of the first m completions, and count those of which other tokens were read than drawn."""
    rows: dict[bytes, list[tuple[float, bool]]] = {}
    directory, models = RunDirectory(path), json.dumps(fingerprint(measure), sort_keys=True)
    hidden = None if show_progress else True
    with tqdm(total=len(prompts), desc="KL", unit=" prompts", delay=3, leave=False, disable=hidden) as bar:
        for name in directory.names():
            keys = [key for key in directory.keys_of(name) if key in prompts]
            file = path / "divergence" / f"{name}.parquet"
            cache = _read_cache(file, models)
            if any(len(cache.get(key, [])) < m for key in keys):
                shard = directory.load(name)
                pairs = [pair for pair in zip(shard.prompts, shard.rollouts, strict=True) if pair[0].key in prompts]
                cached = [cache.setdefault(planned.key, []) for planned, _ in pairs]
                # Of the whole shard in one call, for which the models change their precision once.
                missing = [rollouts[len(row) : m] for row, (_, rollouts) in zip(cached, pairs, strict=True)]
                measured = measure([planned.prompt for planned, _ in pairs], missing)
                for row, more in zip(cached, measured, strict=True):
                    row += [(float(kl), bool(same)) for kl, same in more]
                _write_cache(file, models, cache)
            bar.update(len(keys))
            rows |= {key: cache[key][:m] for key in keys}
    kl = _stack(f"the KL of {path}", {key: [kl for kl, _ in row] for key, row in rows.items()}, prompts, m)
    return kl, sum(not same for key in prompts for _, same in rows[key])


def _stack(name: str, rows: Mapping[bytes, Any], prompts: Mapping[bytes, Prompt], m: int) -> Float[np.ndarray, "P m"]:
    for key, prompt in prompts.items():
        if len(rows.get(key, [])) != m:
            raise ValueError(
                f"an evaluation needs m={m} completions of each prompt, scored; {name} has {len(rows.get(key, []))} "
                f"for {start_of(prompt)}: make the same call again, or give another directory"
            )
    return np.array([rows[key] for key in prompts], np.float64)


def _read_cache(file: Path, models: str) -> dict[bytes, list[tuple[float, bool]]]:
    """Read the KLs that were measured with the same two models."""
    cache: dict[bytes, list[tuple[float, bool]]] = {}
    table = read_table(file) if file.exists() else None
    if table is not None and (table.schema.metadata or {}).get(_MODELS) == models.encode():
        for row in table.to_pylist():
            cache.setdefault(row["key"], []).append((row["kl"], row["as_drawn"]))
    return cache


def _write_cache(file: Path, models: str, cache: Mapping[bytes, Sequence[tuple[float, bool]]]) -> None:
    rows = [
        {"key": key, "number": number, "kl": kl, "as_drawn": same}
        for key, row in cache.items()
        for number, (kl, same) in enumerate(row)
    ]
    with replace_file(file) as handle:
        table = pa.Table.from_pylist(rows, _CACHE.with_metadata({_MODELS: models}))
        pq.write_table(table, handle, compression="zstd")


def find_scorers(run: Path) -> list[str]:
    """Name the reward models that scored a run's rollouts."""
    return [name.removeprefix(SCORE) for name in read_table(_files(run)[0]).column_names if name.startswith(SCORE)]


def read_scores(run: Path, select: str, judge: str | None = None) -> Samples:
    """Read the scores of all rollouts of a run, by the scorer that selects and by the judge, if one is named."""
    available, scorers = find_scorers(run), [select, *([judge] if judge is not None and judge != select else [])]
    for name in scorers:
        if name not in available:
            raise ValueError(
                f"the rollouts of {run} have scores of {', '.join(available) or 'nobody'}, got {name!r}. Another "
                f"scorer is added by `calibrated-rewards calibrate --reward-model NAME=PATH --out {run}`, drawing "
                "nothing."
            )
    parts: dict[bytes, list[Float64[np.ndarray, "scorers _"]]] = {}
    for path in _files(run):
        table = read_table(path, ["key", *(SCORE + name for name in scorers)])
        keys = table.column("key").to_pylist()
        scores = np.array([table.column(SCORE + name).to_numpy() for name in scorers], np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"{path} needs a score for each rollout, got some without: calibrate again.")
        starts = [place for place in range(len(keys)) if place == 0 or keys[place] != keys[place - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            parts.setdefault(keys[start], []).append(scores[:, start:end])
    rows = [np.hstack(part) for part in parts.values()]
    return Samples([row[0] for row in rows], [row[1] for row in rows] if len(scorers) > 1 else None)


def _files(run: Path) -> list[Path]:
    files = sorted((run / "rollouts").glob("*.parquet"))
    if not files:
        raise ValueError(f"{run} needs rollouts/*.parquet, got none: not calibrated yet?")
    return files
