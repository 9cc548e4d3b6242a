"""From prompts as they come to shards: each prompt once, checked before anything is sampled."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from calibrated_rewards.error_messages import Message, setting
from calibrated_rewards.prompts import Prompt, id_key, prompt_key, start_of
from calibrated_rewards.rollouts.directory import RunDirectory
from calibrated_rewards.rollouts.shard import Planned
from calibrated_rewards.rollouts.shard_files import stored
from calibrated_rewards.rollouts.sources import Asked
from calibrated_rewards.samplers.protocol import Particular, Rendering, Sampler


class Planning(NamedTuple):
    """What came of a list of prompts."""

    new: int
    known: int
    """Which the directory had already."""
    repeated: int
    """Which came more than once."""


def plan(
    directory: RunDirectory, asked: Iterable[Asked], sampler: Sampler | None, per_shard: int, show_progress: bool = True
) -> Planning:
    """Add the prompts that the directory does not have yet; all of them, or none if one is refused.

    For who holds the directory.
    """
    before = directory.names()
    try:
        return _planned(directory, asked, sampler, per_shard, show_progress)
    except BaseException:  # Ctrl-C too
        for name in {*directory.names()} - {*before}:
            directory.forget(name)
        raise


def planned(prompt: Prompt, sampler: Sampler | None) -> Planned:
    """A prompt with its key, and the text that the policy reads where that is another."""
    rendered = sampler.rendered(prompt) if isinstance(sampler, Rendering) else None
    # Empty where only a server knows.
    return Planned(prompt_key(prompt), prompt, None if rendered == prompt else rendered or None)


def checked(prompts: list[Prompt], sampler: Sampler | None) -> list[Planned]:
    """Prompts that can be kept, and that the sampler can complete."""
    for prompt in prompts:
        text, _ = stored(prompt)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"a prompt is whole characters, got half of one in {start_of(prompt)}")
    if isinstance(sampler, Particular):
        sampler.check(prompts)
    return [planned(prompt, sampler) for prompt in prompts]


class Ids:
    """Which prompt each id leads to; an id that leads to two is refused."""

    def __init__(self, known: dict[bytes, bytes]) -> None:
        self.known = known
        self.new: dict[bytes, bytes] = {}

    def add(self, asked: Asked, key: bytes) -> None:
        """One more prompt, with the id that it may have."""
        if asked.id is None:
            return
        alias = id_key(asked.id)
        owner = self.known.get(alias) or self.new.setdefault(alias, key)
        if owner != key:
            raise ValueError(f"an id leads to one prompt, got id {asked.id!r} again for {start_of(asked.prompt)}")


def _planned(
    directory: RunDirectory, asked: Iterable[Asked], sampler: Sampler | None, per_shard: int, show_progress: bool
) -> Planning:
    old, seen, ids = {*directory.keys()}, set[bytes](), Ids(directory.aliases())
    names, free = directory.free_names(), partial(directory.is_free, keys=())
    new, known, repeated = 0, 0, 0
    waiting: list[Prompt] = []
    for item in tqdm(asked, desc="prompts", unit=" prompts", delay=3, disable=None if show_progress else True):
        key = prompt_key(item.prompt)
        ids.add(item, key)
        repeated += key in seen
        if key in seen:
            continue
        seen.add(key)
        known += key in old
        if key in old:
            continue
        if sampler is None:
            raise ValueError(
                Message(
                    f"there is no sampler to draw rollouts of the new prompt {start_of(item.prompt)}: "
                    f"name one, {setting('sampler')}"
                )
            )
        new += 1
        waiting.append(item.prompt)
        if len(waiting) == per_shard:
            directory.plan(next(filter(free, names)), checked(waiting, sampler))
            waiting = []
    if waiting:
        directory.plan(next(filter(free, names)), checked(waiting, sampler))
    directory.add_aliases(ids.new)
    return Planning(new, known, repeated)
