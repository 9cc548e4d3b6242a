"""From prompts as they come to shards: each prompt once, checked before anything is sampled."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, stored
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Prompt, id_key, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Particular, Rendering, Sampler


class Planning(NamedTuple):
    """What came of a list of prompts."""

    new: int
    known: int
    """Which the directory had already."""
    repeated: int
    """Which came more than once."""


def plan(
    directory: RunDirectory,
    asked: Iterable[Asked],
    sampler: Sampler | None,
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> Planning:
    """Add the prompts that the directory does not have yet; all of them, or none if one is refused.

    The settings are written before the first of them. For who holds the directory.
    """
    with taken_back(directory):
        return _planned(directory, asked, sampler, per_shard, settings, show_progress)


@contextmanager
def taken_back(directory: RunDirectory) -> Iterator[None]:
    """Remove the shards and settings that a block has added, if it fails."""
    names, settings = {*directory.names()}, directory.settings()
    try:
        yield
    except BaseException:  # Ctrl-C too
        for name in {*directory.names()} - names:
            directory.forget(name)
        if directory.settings() != settings:
            directory.write_settings(settings)
        raise


def plan_again(directory: RunDirectory, sampler: Sampler) -> None:
    """Check and render all prompts for another sampler than the one that was to draw their rollouts."""
    for name in directory.names():
        prompts = [each.prompt for each in directory.prompts(name)]
        directory.plan(name, checked(prompts, sampler))


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
    directory: RunDirectory,
    asked: Iterable[Asked],
    sampler: Sampler | None,
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool,
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
            _add(directory, next(filter(free, names)), checked(waiting, sampler), settings)
            waiting = []
    if waiting:
        _add(directory, next(filter(free, names)), checked(waiting, sampler), settings)
    directory.add_aliases(ids.new)
    return Planning(new, known, repeated)


def _add(directory: RunDirectory, name: str, prompts: list[Planned], settings: Mapping[str, Any]) -> None:
    """Make a shard. The settings come first: prompts alone would not say what their rollouts are to be of."""
    if directory.settings() != settings:
        directory.write_settings(settings)
    directory.plan(name, prompts)
