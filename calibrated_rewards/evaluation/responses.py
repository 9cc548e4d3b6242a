"""The rollouts of a run as numbers, prompt by prompt: tokens, scores, and how far each is from the reference.

What a divergence gives is kept beside the rollouts, in `divergence/00000.parquet` for the shard of that name.
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
from jaxtyping import Float
from tqdm import tqdm

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import read_table
from calibrated_rewards.evaluation.outcomes import Precision
from calibrated_rewards.files import replace_file
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.scorers.protocol import fingerprint

Distances = Sequence[Sequence[Any]]
Measure = Callable[[Sequence[Prompt], Sequence[Sequence[Rollout]]], Distances]


@runtime_checkable
class KnowsPrecision(Protocol):
    """A measure that says how finely it reads."""

    def precision(self) -> Precision:
        """The dtype that its models are read in, and whether rounding is all that they differ by."""


_OF = b"calibrated-rewards divergence"
_KEPT = pa.schema([("key", pa.binary(16)), ("number", pa.int32()), ("kl", pa.float64()), ("as_drawn", pa.bool_())])


@dataclass(frozen=True)
class Responses:
    """What is known of m completions of each prompt."""

    tokens: Float[np.ndarray, "P m"]
    """nan where the sampler does not say."""
    scores: Mapping[str, Float[np.ndarray, "P m"]]
    empty: int = 0
    """Completions without a text, or with nothing but white space."""


def responses(path: Path, prompts: Mapping[bytes, Prompt], scorers: Sequence[str], m: int) -> Responses:
    """The first m completions of these prompts, in this order, from a run that has them."""
    tokens: dict[bytes, list[float]] = {}
    scores: dict[str, dict[bytes, npt.NDArray[np.float32]]] = {name: {} for name in scorers}
    directory, empty = RunDirectory(path), 0
    for name in directory.names():
        shard = directory.load(name)
        for i, planned in enumerate(shard.prompts):
            if planned.key in prompts:
                empty += sum(_is_empty(rollout.completion) for rollout in shard.rollouts[i][:m])
            tokens[planned.key] = [np.nan if r.tokens is None else float(r.tokens) for r in shard.rollouts[i][:m]]
            for scorer in shard.scores.keys() & {*scorers}:
                scores[scorer][planned.key] = shard.scores[scorer][i][:m]
    found = {scorer: _rows(f"{path}, {scorer}", own, prompts, m) for scorer, own in scores.items()}
    return Responses(_rows(str(path), tokens, prompts, m), found, empty)


def _is_empty(completion: Completion) -> bool:
    parts: Any = [{"content": completion}] if isinstance(completion, str) else completion
    return not any(str(each.get("content") or "").strip() for each in parts)


def distances(
    path: Path, prompts: Mapping[bytes, Prompt], measure: Measure, m: int, show_progress: bool = True
) -> tuple[Float[np.ndarray, "P m"], int]:
    """What `measure` gives for the first m completions, and of how many other tokens were read than were drawn."""
    found: dict[bytes, list[tuple[float, bool]]] = {}
    directory, said = RunDirectory(path), json.dumps(fingerprint(measure), sort_keys=True)
    hidden = None if show_progress else True
    with tqdm(total=len(prompts), desc="KL", unit=" prompts", delay=3, leave=False, disable=hidden) as bar:
        for name in directory.names():
            wanted = [key for key in directory.keys_of(name) if key in prompts]
            file = path / "divergence" / f"{name}.parquet"
            kept = _read(file, said)
            if any(len(kept.get(key, [])) < m for key in wanted):
                shard = directory.load(name)
                pairs = zip(shard.prompts, shard.rollouts, strict=True)
                asked = [(planned, rollouts) for planned, rollouts in pairs if planned.key in prompts]
                rows = [kept.setdefault(planned.key, []) for planned, _ in asked]
                # Of the whole shard in one call, for which the models change their precision once.
                missing = [rollouts[len(row) : m] for row, (_, rollouts) in zip(rows, asked, strict=True)]
                for row, more in zip(rows, measure([planned.prompt for planned, _ in asked], missing), strict=True):
                    row += [(float(kl), bool(same)) for kl, same in more]
                _write(file, said, kept)
            bar.update(len(wanted))
            found |= {key: kept[key][:m] for key in wanted}
    kl = _rows(f"the KL of {path}", {key: [kl for kl, _ in own] for key, own in found.items()}, prompts, m)
    return kl, sum(not same for key in prompts for _, same in found[key])


def _rows(what: str, rows: Mapping[bytes, Any], prompts: Mapping[bytes, Prompt], m: int) -> Float[np.ndarray, "P m"]:
    for key, prompt in prompts.items():
        if len(rows.get(key, [])) != m:
            raise ValueError(
                f"an evaluation needs m={m} completions of each prompt, scored; {what} has {len(rows.get(key, []))} "
                f"for {start_of(prompt)}: make the same call again, or give another directory"
            )
    return np.array([rows[key] for key in prompts], np.float64)


def _read(file: Path, said: str) -> dict[bytes, list[tuple[float, bool]]]:
    """What is kept of the same two models."""
    if not file.exists():
        return {}
    table = read_table(file)
    if (table.schema.metadata or {}).get(_OF) != said.encode():
        return {}
    kept: dict[bytes, list[tuple[float, bool]]] = {}
    for row in table.to_pylist():
        kept.setdefault(row["key"], []).append((row["kl"], row["as_drawn"]))
    return kept


def _write(file: Path, said: str, kept: Mapping[bytes, Sequence[tuple[float, bool]]]) -> None:
    rows = [
        {"key": key, "number": number, "kl": kl, "as_drawn": same}
        for key, own in kept.items()
        for number, (kl, same) in enumerate(own)
    ]
    with replace_file(file) as handle:
        pq.write_table(pa.Table.from_pylist(rows, _KEPT.with_metadata({_OF: said})), handle, compression="zstd")
