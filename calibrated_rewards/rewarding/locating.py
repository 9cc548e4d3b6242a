"""Prompts as they arrive, whatever their form: their rows in the table, and what the reward model should read."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from calibrated_rewards.prompts import Prompt, as_key, id_key, start_of
from calibrated_rewards.table import ReferenceTable, UnknownPromptError

# In place of the key of a prompt of which only the id arrives.
_NO_PROMPT = bytes(16)
# The prompt of each row, None where that is not known.
Reading = Callable[[Int64[np.ndarray, " G"]], list[Prompt | None]]


class Located(NamedTuple):
    """Where prompts are."""

    rows: Int64[np.ndarray, " G"]
    """In the table; -1 for a prompt that it does not know."""
    prompts: list[Prompt]
    """As they were calibrated, whatever they arrived as."""


def located(
    table: ReferenceTable, prompts: Sequence[Prompt | None], ids: Sequence[Any] | None, originals: Reading | None
) -> Located:
    """Find prompts by their ids, or by themselves; ValueError if one has to be read otherwise, and nobody knows how.

    A prompt that is None is one that its id alone stands for.
    """
    keys = keys_of(prompts)
    rows = table.find(keys, ids)
    known = np.flatnonzero(rows >= 0)
    own = table.keys(rows[known])
    named: list[Any] = [None] * len(prompts) if ids is None else list(ids)
    # A row that is known by an id and no more has no other text than the one that arrives with it.
    as_it_is = [
        key == keys[at] or (prompts[at] is not None and named[at] is not None and key == id_key(named[at]))
        for at, key in zip(known.tolist(), own, strict=True)
    ]
    other = known[~np.array(as_it_is, np.bool_)]
    read = dict(enumerate(prompts))
    if len(other):
        read |= zip(other.tolist(), _originals(prompts[other[0]], rows[other], originals), strict=True)
    lost = [at for at, prompt in read.items() if prompt is None]
    if lost:
        at = lost[0]
        raise UnknownPromptError(f"prompt {at} came as the id {named[at]!r} and nothing else, which the table has not")
    return Located(rows, [prompt for prompt in read.values() if prompt is not None])


def keys_of(prompts: Sequence[Prompt | None]) -> list[bytes]:
    """The key of each prompt; of those that come many times over, worked out once."""
    texts: dict[Any, bytes] = {id(None): _NO_PROMPT}
    keys = []
    for prompt in prompts:
        name = prompt if isinstance(prompt, str) else id(prompt)
        if name not in texts:
            texts[name] = as_key(prompt)  # type: ignore[arg-type]  # None is there from the beginning
        keys.append(texts[name])
    return keys


def _originals(first: Prompt | None, rows: Int64[np.ndarray, " G"], originals: Reading | None) -> list[Prompt]:
    found = originals(rows) if originals is not None else [None]
    if any(original is None for original in found):
        raise ValueError(
            f"the table knows {start_of(first)} as another name of a prompt (its rendered template, an id), and the "
            "reward model has to read the prompt itself: give originals=, or a table in its calibration run's directory"
        )
    return [original for original in found if original is not None]
