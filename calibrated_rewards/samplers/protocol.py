"""What a sampler is, what it gives, and the one place where its answer is checked."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from hashlib import blake2b
from math import isfinite
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import name_of

Finish: TypeAlias = Literal["stop", "length"]
Seeds: TypeAlias = Sequence[Sequence[int]]


class Rollout(NamedTuple):
    """A completion of the reference policy, and how it came to its end."""

    completion: Completion
    tokens: int | None = None
    """How many were drawn, the one that ended it included."""
    finish: Finish | None = None
    """"stop": it ended by itself; "length": it was cut; None: the engine does not say."""
    logprob: float | None = None
    """The sum over its tokens of the log-probability that each was drawn with."""


@runtime_checkable
class Sampler(Protocol):
    """Draws completions: `sampler(prompts, seeds)` gives each prompt one completion for each of its seeds."""

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds, /) -> Sequence[Sequence[Any]]:
        """Rollouts, or completions alone. Prompt i has len(seeds[i]) of them; equal seeds give equal completions.

        An engine that cannot promise the latter makes of the seeds what it can; what it drew is kept.
        """


@runtime_checkable
class Particular(Protocol):
    """A sampler that knows beforehand which prompts it cannot complete."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError for a prompt that is empty, or too long with its completion, or refused by the template."""


@runtime_checkable
class Rendering(Protocol):
    """A sampler that can say which text a prompt becomes."""

    def rendered(self, prompt: Prompt) -> str:
        """What the policy reads: the chat template's text for messages, a text as it is."""


def seeds_of(seed: int, key: bytes, first: int, last: int) -> list[int]:
    """The seeds of a prompt's rollouts first to last - 1: 63 bits that depend on nothing but seed, key and number.

    >>> seeds_of(0, bytes(16), 2, 4) == seeds_of(0, bytes(16), 0, 4)[2:]
    True
    """
    start = blake2b(key + str(seed).encode(), digest_size=32)
    return [_number(start.copy(), number) for number in range(first, last)]


def sample(sampler: Sampler, prompts: Iterable[Prompt], seeds: Seeds) -> list[list[Rollout]]:
    """The rollouts that any sampler gives, checked: as many as there are seeds, each a text or messages."""
    asked = list(prompts)
    if len(asked) != len(seeds):
        raise ValueError(f"each prompt needs its seeds, got {len(asked)} prompts and seeds for {len(seeds)}")
    # Copies: what a sampler does to its arguments is its own affair.
    given = sampler(deepcopy(asked), [[*own] for own in seeds]) if asked else []
    who = name_of(sampler)
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(asked):
        raise ValueError(
            f"a sampler gives a list of completions for each of {len(asked)} prompts, {who} gave {start_of(given)}"
        )
    return [_rollouts(each, prompt, len(own), who) for each, prompt, own in zip(given, asked, seeds, strict=True)]


def _rollouts(given: Any, prompt: Prompt, wanted: int, who: str) -> list[Rollout]:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != wanted:
        raise ValueError(f"{who} gives {wanted} completions for {start_of(prompt)}, got {start_of(given)}")
    return [_rollout(each, prompt, who) for each in given]


def _rollout(given: Any, prompt: Prompt, who: str) -> Rollout:
    rollout = given if isinstance(given, Rollout) else Rollout(given)
    said, tokens, finish, logprob = rollout
    if not isinstance(said, str | list | tuple):
        kind = type(said).__name__
        raise TypeError(f"a completion is a text or a list of messages, {who} gave {kind} for {start_of(prompt)}")
    rules = {
        "tokens is a count": tokens is None or 0 <= tokens < 2**31,
        'finish is "stop", "length" or None': finish in ("stop", "length", None),
        "logprob is a finite number": logprob is None or isfinite(logprob),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"of a rollout, {rule}; {who} gave {rollout!r:.120} for {start_of(prompt)}")
    # Half a character, which JSON can bring and UTF-8 cannot keep, is what a tokenizer writes for bytes that are none.
    whole = said.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(said, str) else said
    own = None if tokens is None else int(tokens), None if logprob is None else float(logprob)
    return Rollout(whole, own[0], finish, own[1])


def _number(digest: Any, number: int) -> int:
    digest.update(b":" + str(number).encode())
    return int.from_bytes(digest.digest()[:8], "little") >> 1
