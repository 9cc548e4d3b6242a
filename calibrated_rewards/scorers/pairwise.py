"""Preference models, which compare two completions, as scorers: the mean probability to beat cached references."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

from calibrated_rewards.files import write_file
from calibrated_rewards.prompts import KEY_BYTES, Completion, Prompt, UnknownPromptError, as_key, start_of
from calibrated_rewards.scorers.protocol import (
    check_pairs,
    fingerprint,
    is_thread_safe,
    name_of,
    reads_messages,
    to_plain,
    without_tensors,
)

# How far rounding may carry a probability out of [0, 1].
ROUNDING = 1e-5


@runtime_checkable
class Preference(Protocol):
    """A callable that compares: `preference(prompts, firsts, seconds)`, lists of one length, gives as many numbers."""

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion], /
    ) -> Any:
        """Return for each prompt the probability that its first completion is better than its second."""


def check_comparisons(
    prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
) -> tuple[list[Prompt], list[Completion], list[Completion]]:
    """Return prompts, first and second completions as three lists of one length."""
    if not len(prompts) == len(firsts) == len(seconds):
        raise ValueError(
            f"a comparison has a prompt and two completions, got {len(prompts)}, {len(firsts)} and {len(seconds)}"
        )
    return *check_pairs(prompts, firsts), check_pairs(prompts, seconds)[1]


def compare(
    preference: Preference, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
) -> Float64[np.ndarray, " n"]:
    """Call a preference model and check its answer: one probability for each pair."""
    prompts, firsts, seconds = check_comparisons(prompts, firsts, seconds)
    answer = preference(prompts, firsts, seconds) if len(prompts) else []
    try:
        chances = np.asarray(without_tensors(answer), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name_of(preference)} gave no list of probabilities: {start_of(answer)}") from error
    if chances.shape != (len(prompts),):
        raise ValueError(f"a preference gives one number a pair, got shape {chances.shape} for {len(prompts)} pairs")
    bad = np.flatnonzero(~((chances >= -ROUNDING) & (chances <= 1 + ROUNDING)))
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"a preference is a probability in [0, 1], got {chances[i]} for {start_of(firsts[i])} against "
            f"{start_of(seconds[i])} (log-odds need a sigmoid)"
        )
    return np.clip(chances, 0.0, 1.0)


@dataclass(frozen=True)
class BothOrders:
    """A preference asked in both orders: the mean of P(a beats b) and 1 - P(b beats a).

    Models favour a place, mostly the first. This cancels it: the answers of (a, b) and (b, a) then add up to 1.

    >>> first_is_better = lambda prompts, firsts, seconds: [0.9] * len(prompts)
    >>> BothOrders(first_is_better)(["Hi"], ["Hello!"], ["Go away"])
    array([0.5])
    """

    preference: Preference

    reads_messages = property(lambda self: reads_messages(self.preference), doc="True if the preference model does.")
    thread_safe = property(lambda self: is_thread_safe(self.preference), doc="True if the preference model is.")

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
    ) -> Float64[np.ndarray, " n"]:
        """Return for each prompt the probability that its first completion is better than its second."""
        prompts, firsts, seconds = check_comparisons(prompts, firsts, seconds)
        both = compare(self.preference, [*prompts, *prompts], [*firsts, *seconds], [*seconds, *firsts])
        ahead, behind = both[: len(prompts)], both[len(prompts) :]
        return np.asarray((ahead + (1 - behind)) / 2)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the answers depend on."""
        return {"kind": "both orders", "of": fingerprint(self.preference)}


@dataclass(frozen=True)
class References:
    """The reference completions of each prompt, found by the prompt's key; one JSONL file on disk.

    >>> references = References.of([("Hi", ["Hello!", "Go away"])])
    >>> references("Hi")
    ('Hello!', 'Go away')
    """

    by_key: Mapping[bytes, Sequence[Completion]]

    thread_safe = True  # only read

    def __repr__(self) -> str:
        return f"References({len(self.by_key)} prompts)"

    def __hash__(self) -> int:
        return hash(frozenset(self.by_key))

    @classmethod
    def of(cls, rows: Iterable[tuple[Prompt, Sequence[Completion]]]) -> "References":
        """Build them from (prompt, completions) pairs, a prompt only once."""
        by_key: dict[bytes, Sequence[Completion]] = {}
        for prompt, completions in rows:
            key = as_key(prompt)
            if key in by_key:
                raise ValueError(f"a prompt has one list of references, got two for {start_of(prompt)}")
            by_key[key] = check_references(completions, prompt)
        return cls(by_key)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "References":
        """Read them from the file that `save` wrote."""
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = ((line, f"{os.fspath(path)} line {at}") for at, line in enumerate(file, 1))
            return cls.of(_parse_line(line, place) for line, place in lines if line.strip())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to one JSONL file, a prompt a line by ascending key: equal references are equal bytes."""
        write_file(path, "".join(f"{line}\n" for line in self._lines()))

    def __call__(self, prompt: Prompt) -> Sequence[Completion]:
        """Return the references of a prompt; UnknownPromptError if there are none."""
        key = as_key(prompt)
        if key not in self.by_key:
            raise UnknownPromptError(
                f"the references ({len(self.by_key)} prompts) have none for {start_of(prompt)}, key {key.hex()}"
            )
        return self.by_key[key]

    def fingerprint(self) -> dict[str, Any]:
        """Count the prompts and digest all references."""
        digest = blake2b("\n".join(self._lines()).encode(), digest_size=16).hexdigest()
        return {"kind": "references", "prompts": len(self.by_key), "digest": digest}

    def _lines(self) -> list[str]:
        return [
            json.dumps({"key": key.hex(), "completions": [to_plain(c) for c in self.by_key[key]]})
            for key in sorted(self.by_key)
        ]


@dataclass(frozen=True, eq=False)
class MeanWin:
    """A scorer made of a preference: the mean probability to beat the references of the prompt, in [0, 1].

    A completion that is itself one of the references is not compared with that one (with one of them, if several are
    the same text): the references' own scores, which a calibration is made of, are then means over the *others*, as
    those of a fresh completion are means over completions that are not its own. Compared with itself, each would be
    drawn towards 1/2. It goes by the text, so a pair always has the same score. The only reference there is ties: 1/2.

    >>> longer = lambda prompts, firsts, seconds: [float(len(a) > len(b)) for a, b in zip(firsts, seconds)]
    >>> scorer = MeanWin(longer, References.of([("Hi", ["Hello!", "Go away", "No"])]))
    >>> scorer(["Hi", "Hi"], ["Welcome", "Go away"])
    array([0.6666667, 1.       ], dtype=float32)
    """

    preference: Preference
    references: Callable[[Prompt], Sequence[Completion]]
    """The references of a prompt: `References`, or a function of yours."""

    reads_messages = property(lambda self: reads_messages(self.preference), doc="True if the preference model does.")
    thread_safe = property(
        lambda self: is_thread_safe(self.preference) and is_thread_safe(self.references),
        doc="True if the preference model and the references are.",
    )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        prompts, completions = check_pairs(prompts, completions)
        rivals = [self._find_rivals(prompt, own) for prompt, own in zip(prompts, completions, strict=True)]
        counts = np.array([len(others) for others in rivals], dtype=np.int64)
        at = np.repeat(np.arange(len(rivals)), counts)
        chances = compare(
            self.preference,
            [prompts[i] for i in at.tolist()],
            [completions[i] for i in at.tolist()],
            [other for others in rivals for other in others],
        )
        wins = np.bincount(at, weights=chances, minlength=len(rivals))
        return np.where(counts > 0, wins / np.maximum(counts, 1), 0.5).astype(np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        return {
            "kind": "mean win",
            "preference": fingerprint(self.preference),
            "references": fingerprint(self.references),
        }

    def _find_rivals(self, prompt: Prompt, completion: Completion) -> list[Completion]:
        """Return the references of a prompt, without one that is the completion itself."""
        others, own = list(check_references(self.references(prompt), prompt)), to_plain(completion)
        same = next((i for i, other in enumerate(others) if to_plain(other) == own), None)
        return others if same is None else others[:same] + others[same + 1 :]


def check_references(completions: Any, prompt: Prompt | bytes) -> tuple[Completion, ...]:
    """Return the references of a prompt as a tuple; refuse anything but one or more texts, or lists of messages.

    >>> check_references("Hello!", "Hi")
    Traceback (most recent call last):
    ValueError: references are a list of completions, one or more, got 'Hello!' for 'Hi'
    """
    listed = isinstance(completions, Sequence | np.ndarray) and not isinstance(completions, str | bytes)
    if not listed or not len(completions):
        raise ValueError(
            f"references are a list of completions, one or more, got {start_of(completions)} for {start_of(prompt)}"
        )
    for completion in completions:
        if isinstance(completion, bytes | Mapping) or not isinstance(completion, Sequence | np.ndarray):
            raise ValueError(
                f"a reference is a text or a list of messages, got {start_of(completion)} for {start_of(prompt)}"
            )
    return tuple(completions)


def _parse_line(line: str, place: str) -> tuple[bytes, Sequence[Completion]]:
    try:
        row = json.loads(line)
        key, completions = bytes.fromhex(row["key"]), row["completions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is no row of references, got {start_of(line)}: {error!r}") from error
    if len(key) != KEY_BYTES:
        raise ValueError(f"{place} needs a key of {KEY_BYTES} bytes, got {len(key)}")
    return key, completions
