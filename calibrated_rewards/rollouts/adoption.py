"""Rollouts made elsewhere become shards of a directory like those that were drawn here."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from calibrated_rewards.prompts import prompt_key, start_of
from calibrated_rewards.rollouts.directory import RunDirectory
from calibrated_rewards.rollouts.imported import Imported
from calibrated_rewards.rollouts.planning import Ids, checked, taken_back
from calibrated_rewards.rollouts.shard import State, empty
from calibrated_rewards.rollouts.sources import Asked

logger = logging.getLogger(__name__)
NOTHING = State([], {})


def adopt(
    directory: RunDirectory,
    found: Iterable[Imported],
    columns: Sequence[str],
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> int:
    """Keep the rollouts of prompts that the directory does not have yet, with their scores of `columns`; how many.

    For who holds the directory. All of them, or none if one is refused; the settings are written before the first.
    """
    with taken_back(directory):
        return _adopted(directory, found, columns, per_shard, settings, show_progress)


def _adopted(
    directory: RunDirectory,
    found: Iterable[Imported],
    columns: Sequence[str],
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool,
) -> int:
    old, ids = {*directory.keys()}, Ids(directory.aliases())
    names, waiting, new, known = directory.free_names(), list[Imported](), 0, 0
    # What is there already has these scores, or will never have them.
    lacking = [
        c for name in directory.names()[:1] for c in columns if c not in (directory.state(name) or NOTHING).scored
    ]
    for item in tqdm(found, desc="rollouts", unit=" prompts", delay=3, disable=None if show_progress else True):
        key = prompt_key(item.prompt)
        ids.add(Asked(item.prompt, item.id), key)
        for column in columns:
            if column not in item.scores:
                raise ValueError(f"each rollout needs its score of {column!r}, got none for {start_of(item.prompt)}")
        if key in old and lacking:
            raise ValueError(
                f"the directory has rollouts of {start_of(item.prompt)} without scores of {lacking[0]!r}: score them "
                "by a reward model, or import into another directory"
            )
        known += key in old
        if key in old:
            continue
        new += 1
        waiting.append(item)
        if len(waiting) == per_shard:
            _keep(directory, names, waiting, columns, settings)
            waiting = []
    if waiting:
        _keep(directory, names, waiting, columns, settings)
    if known:
        logger.warning("%s has rollouts of %d prompts already, and keeps those", directory.path, known)
    directory.add_aliases(ids.new)
    return new


def _keep(
    directory: RunDirectory,
    names: Iterator[str],
    found: list[Imported],
    columns: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Settings and rollouts first: a shard exists from the moment that its prompts do."""
    if directory.settings() != settings:
        directory.write_settings(settings)
    shard = empty(checked([item.prompt for item in found], None))
    keys = [planned.key for planned in shard.prompts]
    name = next(name for name in names if directory.is_free(name, keys))
    # Nobody knows their seeds: what is drawn later gets those of numbers that these do not have.
    shard = shard.drawn([item.rollouts for item in found], [[None] * len(item.rollouts) for item in found])
    for column in columns:
        shard = shard.scored(column, [item.scores[column] for item in found])
    directory.save(name, shard)
    directory.plan(name, list(shard.prompts))
