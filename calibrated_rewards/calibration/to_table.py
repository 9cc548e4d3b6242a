"""From the shards of a run to its table: sorted scores by prompt, other names for it, fingerprints, probes."""

import json
from collections.abc import Iterator
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Shard, loaded, read_scores, read_table, stored
from calibrated_rewards.files import write_file
from calibrated_rewards.prompts import as_key
from calibrated_rewards.table.reference_table import ReferenceTable, Row

PROBED_PROMPTS = 8


def tabulated(directory: RunDirectory, column: str, name: str | None) -> ReferenceTable:
    """The table of a reward model, made anew only where the shards are other than those it was made of.

    Others may be at work on more prompts or rollouts: those that have no score yet wait for the table they will make.
    """
    at = directory.table(name)
    with directory.locked():
        if (stamp := _stamp(directory, column)) != _made_of(at):
            settings = directory.settings()
            meta = {
                "scorer": settings["scorers"][column],
                "sampler": settings.get("sampler"),
                "seed": settings.get("seed"),
                "form": _form(directory),
                "probes": _probes(directory, column),
            }
            ReferenceTable.build(_rows(directory, column), path=at, meta=meta)
            write_file(at / ".made_of", f"{stamp} {_digest(at)}")
    return ReferenceTable.load(at)


def _rows(directory: RunDirectory, column: str) -> Iterator[Row]:
    """A row for each prompt. A text that several become for the policy leads to the one it is, or to the first."""
    ids: dict[bytes, list[bytes]] = {}
    for alias, key in directory.aliases().items():
        ids.setdefault(key, []).append(alias)
    taken = {*directory.keys()}
    for name in directory.names():
        for planned, scores in zip(directory.prompts(name), scores_of(directory, name, column), strict=True):
            if not len(scores):
                continue
            aliases: list[Any] = ids.get(planned.key, [])
            if planned.rendered is not None and (text := as_key(planned.rendered)) not in taken:
                taken.add(text)
                aliases = [*aliases, planned.rendered]
            yield Row(planned.prompt, scores, aliases)


def _form(directory: RunDirectory) -> dict[str, str]:
    """Whether the prompts and completions that scorers read are texts, messages or both."""
    files = (file for name in directory.names() if (file := directory.rollouts(name)).exists())
    chats: dict[str, set[bool]] = {"chat": set(), "completion_chat": set()}
    for file in files:
        columns = read_table(file, [*chats])
        for name, own in chats.items():
            own.update(columns.column(name).unique().to_pylist())
    kinds = {name: "both" if len(own) != 1 else "messages" if True in own else "text" for name, own in chats.items()}
    return {"prompts": kinds["chat"], "completions": kinds["completion_chat"]}


def scores_of(directory: RunDirectory, name: str, column: str) -> list[Float32[np.ndarray, " _"]]:
    """The scores that each prompt of a shard has so far, by number of the rollout."""
    prompts, path = directory.prompts(name), directory.rollouts(name)
    return read_scores(path, prompts, column) if path.exists() else [np.empty(0, np.float32)] * len(prompts)


def _probes(directory: RunDirectory, column: str) -> list[dict[str, Any]]:
    """Of some prompts, the same ones always, the rollouts with the lowest and the highest score."""
    found = []
    wanted = {*nsmallest(PROBED_PROMPTS, directory.keys())}
    for name in directory.names():
        for at, planned in enumerate(directory.prompts(name)):
            if planned.key in wanted:
                found.append((planned.key, _extremes(directory.load(name), at, column)))
    return [probe for _, probes in sorted(found, key=lambda pair: pair[0]) for probe in probes]


def _extremes(shard: Shard, at: int, column: str) -> list[dict[str, Any]]:
    scores = shard.scores[column][at] if column in shard.scores else np.empty(0)
    prompt = loaded(*stored(shard.prompts[at].prompt))
    chosen = dict.fromkeys([int(scores.argmin()), int(scores.argmax())] if len(scores) else [])
    completions = [rollout.completion for rollout in shard.rollouts[at]]
    return [{"prompt": prompt, "completion": completions[i], "score": float(scores[i])} for i in chosen]


def _stamp(directory: RunDirectory, column: str) -> str:
    """Changes whenever a shard, an id or a setting does."""
    settings = directory.settings()
    own = [column, settings["scorers"][column], settings.get("sampler"), settings.get("seed")]
    digest = blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=16)
    files = [file for name in directory.names() if (file := directory.rollouts(name)).exists()]
    for file in [*files, *sorted(directory.path.glob("aliases/*.parquet"))]:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    return digest.hexdigest()


def _made_of(at: Path) -> str | None:
    """What the table was made of; None if there is none, one that does not open, or another one by now."""
    try:
        ReferenceTable.load(at)
        stamp, _, digest = (at / ".made_of").read_bytes().decode("ascii", "replace").partition(" ")
    except (OSError, ValueError):
        return None
    return stamp if digest == _digest(at) else None


def _digest(at: Path) -> str:
    return str(json.loads((at / "table.json").read_bytes())["header_digest"])
