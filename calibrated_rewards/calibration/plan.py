"""Add prompts to a run: each once, checked before anything is sampled, in shards of a fixed size."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, encode_text
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Prompt, id_key, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Particular, Rendering, Sampler


def add_prompts(
    directory: RunDirectory,
    asked: Iterable[Asked],
    sampler: Sampler | None,
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> "NewPrompts":
    """Add the prompts that a locked directory does not have yet; all of them, or none if one is refused.

    The settings are written before the first: prompts alone would not say what their rollouts are to be of.
    """
    new = NewPrompts(directory)
    names = filter(directory.is_free, directory.free_names())
    with undo_on_error(directory):
        for prompts in new.read(show_bar(asked, "prompts", " prompts", show_progress), per_shard):
            if sampler is None:
                raise ValueError(
                    Message(
                        f"there is no sampler to draw rollouts of the new prompt {start_of(prompts[0])}: "
                        f"name one, {setting('sampler')}"
                    )
                )
            planned = plan_prompts(prompts, sampler)
            if directory.settings() != settings:
                directory.write_settings(settings)
            directory.write_prompts(next(names), planned)
        directory.add_aliases(new.ids.new)
    return new


class NewPrompts:
    """Reads the prompts that a directory does not have yet, each once, and counts the others."""

    def __init__(self, directory: RunDirectory) -> None:
        self.old, self.ids = {*directory.keys()}, Ids(directory.aliases())
        self.new = self.known = self.repeated = 0

    def read(self, asked: Iterable[Asked], size: int) -> Iterator[list[Prompt]]:
        """Read the new prompts in batches."""
        seen, batch = set[bytes](), list[Prompt]()
        for item in asked:
            key = prompt_key(item.prompt)
            self.ids.add(item, key)
            self.repeated += key in seen
            if key in seen:
                continue
            seen.add(key)
            self.known += key in self.old
            if key in self.old:
                continue
            self.new += 1
            batch.append(item.prompt)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


class Ids:
    """Records the prompt that each id leads to; refuses an id that leads to two."""

    def __init__(self, known: dict[bytes, bytes]) -> None:
        self.known = known
        self.new: dict[bytes, bytes] = {}

    def add(self, asked: Asked, key: bytes) -> None:
        """Add a prompt, with the id that it may have."""
        if asked.id is None:
            return
        alias = id_key(asked.id)
        owner = self.known.get(alias) or self.new.setdefault(alias, key)
        if owner != key:
            raise ValueError(f"an id leads to one prompt, got id {asked.id!r} again for {start_of(asked.prompt)}")


def plan_prompts(prompts: list[Prompt], sampler: Sampler | None) -> list[Planned]:
    """Check that prompts can be kept and completed by the sampler; add their keys, and the texts that it reads."""
    for prompt in prompts:
        text, _ = encode_text(prompt)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"a prompt is whole characters, got half of one in {start_of(prompt)}")
    if isinstance(sampler, Particular):
        sampler.check(prompts)
    if not isinstance(sampler, Rendering):
        return [Planned(prompt_key(prompt), prompt) for prompt in prompts]
    rendered = [sampler.rendered(prompt) for prompt in prompts]
    # Empty where only a server knows.
    return [
        Planned(prompt_key(prompt), prompt, None if text == prompt else text or None)
        for prompt, text in zip(prompts, rendered, strict=True)
    ]


def replan(directory: RunDirectory, sampler: Sampler) -> None:
    """Check and render all prompts for another sampler than the one that was to draw their rollouts."""
    for name in directory.names():
        prompts = [planned.prompt for planned in directory.prompts(name)]
        directory.write_prompts(name, plan_prompts(prompts, sampler))


@contextmanager
def undo_on_error(directory: RunDirectory) -> Iterator[None]:
    """Remove the shards and settings that a block has added, if it fails."""
    names, settings = {*directory.names()}, directory.settings()
    try:
        yield
    except BaseException:  # Ctrl-C too
        for name in {*directory.names()} - names:
            directory.remove(name)
        if directory.settings() != settings:
            directory.write_settings(settings)
        raise


def show_bar(items: Iterable[Any], title: str, unit: str, show: bool = True) -> Iterator[Any]:
    """Show a progress bar on a terminal for what takes more than three seconds."""
    return iter(tqdm(items, desc=title, unit=unit, delay=3, disable=None if show else True))
