"""Decoding settings: what the trainer will use, and calibration with it, whatever the engine calls them.

What a sampler is, what it gives, and the one place where its answer is checked."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import isfinite
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from calibrated_rewards.prompts import Completion, Prompt, name_of, start_of


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn. They belong to the reference policy: other settings are another policy.

    The defaults are those under which a KL to the reference is what RLHF's objective means: nothing but temperature
    bends the model's distribution. With top_p, top_k or min_p the reference gives some completions no probability.

    >>> Decoding(max_tokens=128, temperature=0.8)
    Decoding(max_tokens=128, temperature=0.8, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, stop=(), ...)
    """

    max_tokens: int
    """Most tokens of a completion; give the trainer's own number: a completion that is cut is another one."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the model's own end tokens; they are cut off. Special tokens are no
    text: with a transformers model one of them, such as "<|im_end|>", is taken by its id; else give stop_token_ids."""
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError(f"Decoding needs stop to be a tuple of texts, such as ({self.stop!r},), got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(map(_whole, self.stop_token_ids)))
        object.__setattr__(self, "max_tokens", _whole(self.max_tokens))
        object.__setattr__(self, "top_k", _whole(self.top_k))
        rules = {
            "a whole max_tokens >= 1": _is_count(self.max_tokens, 1),
            # Logits are divided by it, and must stay finite.
            "a finite temperature > 0, of 1e-4 or more (K greedy completions are one)": self.temperature >= 1e-4
            and isfinite(self.temperature),
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "a whole top_k >= 0": _is_count(self.top_k, 0),
            "0 <= min_p < 1": 0 <= self.min_p < 1,
            "a finite repetition_penalty > 0": isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "stop texts that are not empty": all(isinstance(text, str) and text for text in self.stop),
            "whole stop_token_ids >= 0": all(_is_count(token, 0) for token in self.stop_token_ids),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"Decoding needs {rule}, got {self!r}")

    def fingerprint(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        return {**asdict(self), "stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}


def _whole(value: Any) -> Any:
    """A whole number as an int, whatever its type, as JSON and sums may have it; anything else as it is."""
    counts = isinstance(value, Real) and not isinstance(value, bool)
    return int(value) if counts and value % 1 == 0 else value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
