"""Rollouts made elsewhere become shards of a directory like those that were drawn here."""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from calibrated_rewards.prompts import prompt_key, start_of
from calibrated_rewards.rollouts.directory import RunDirectory
from calibrated_rewards.rollouts.imported import Imported
from calibrated_rewards.rollouts.planning import Ids, checked
from calibrated_rewards.rollouts.shard import empty
from calibrated_rewards.rollouts.sources import Asked


def adopt(
    directory: RunDirectory,
    found: Iterable[Imported],
    columns: Sequence[str],
    per_shard: int,
    show_progress: bool = True,
) -> int:
    """Keep the rollouts of prompts that the directory does not have yet, with their scores of `columns`; how many.

    For who holds the directory.
    """
    old, ids = {*directory.keys()}, Ids(directory.aliases())
    number, waiting, new = directory.free(), list[Imported](), 0
    for item in tqdm(found, desc="rollouts", unit=" prompts", delay=3, disable=None if show_progress else True):
        key = prompt_key(item.prompt)
        ids.add(Asked(item.prompt, item.id), key)
        for column in columns:
            if column not in item.scores:
                raise ValueError(f"each rollout needs its score of {column!r}, got none for {start_of(item.prompt)}")
        if key in old:
            continue
        new += 1
        waiting.append(item)
        if len(waiting) == per_shard:
            _keep(directory, f"{number:05d}", waiting, columns)
            number, waiting = number + 1, []
    if waiting:
        _keep(directory, f"{number:05d}", waiting, columns)
    directory.add_aliases(ids.new)
    return new


def _keep(directory: RunDirectory, name: str, found: list[Imported], columns: Sequence[str]) -> None:
    """Rollouts first: a shard exists from the moment that its prompts do."""
    shard = empty(checked([item.prompt for item in found], None))
    # Nobody knows their seeds: what is drawn later gets those of numbers that these do not have.
    shard = shard.drawn([item.rollouts for item in found], [[None] * len(item.rollouts) for item in found])
    for column in columns:
        shard = shard.scored(column, [item.scores[column] for item in found])
    directory.save(name, shard)
    directory.plan(name, list(shard.prompts))
