"""Decoding settings, the protocol of samplers, and `sample`, which calls any sampler and checks its answer."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from math import isfinite
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt, name_of, start_of

# Seconds after which a progress bar is shown.
PATIENCE = 3.0


@dataclass(frozen=True)
class Decoding:
    """Settings for drawing completions. They belong to the reference policy: other settings are another policy.

    With the defaults a KL to the reference is that of RLHF's objective: nothing but temperature changes the model's
    distribution. With top_p, top_k or min_p the reference gives some completions no probability.

    >>> Decoding(max_tokens=128, temperature=0.8)
    Decoding(max_tokens=128, temperature=0.8, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, stop=(), ...)
    """

    max_tokens: int
    """Most tokens of a completion; use the trainer's own number: a completion that is cut is another one."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the model's own end tokens; they are cut off. Special tokens are no
    text: with a transformers model one of them, such as "<|im_end|>", is found by its id; else use stop_token_ids."""
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
        """Return all settings as JSON values."""
        return {**asdict(self), "stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}


def _whole(value: Any) -> Any:
    """Convert a whole number of any type to an int; leave anything else."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return int(value) if number and value % 1 == 0 else value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


Finish: TypeAlias = Literal["stop", "length"]
Seeds: TypeAlias = Sequence[Sequence[int]]


class Rollout(NamedTuple):
    """A completion of the reference policy, with its length, its log-probability and the reason that it ended."""

    completion: Completion
    tokens: int | None = None
    """The number of tokens that were drawn, the one that ended it included."""
    finish: Finish | None = None
    """"stop": it ended by itself; "length": it was cut; None: the engine does not say."""
    logprob: float | None = None
    """The sum over its tokens of the log-probability that each was drawn with."""


@runtime_checkable
class Sampler(Protocol):
    """Draws completions: `sampler(prompts, seeds)` returns for each prompt one completion for each of its seeds."""

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds, /) -> Sequence[Sequence[Any]]:
        """Draw rollouts, or completions alone, len(seeds[i]) of prompt i; equal seeds give equal completions.

        An engine that cannot promise the latter uses the seeds as well as it can; what it drew is kept.
        """


@runtime_checkable
class Particular(Protocol):
    """A sampler that knows beforehand which prompts it cannot complete, or a scorer which ones it cannot score."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt that is empty, too long with its completion, or refused by the template: ValueError."""


@runtime_checkable
class Rendering(Protocol):
    """A sampler that can tell which text a prompt becomes."""

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the policy reads: the chat template's for messages, a text as it is."""


def seeds_of(seed: int, key: bytes, first: int, last: int) -> list[int]:
    """Derive the seeds of a prompt's rollouts first to last - 1: 63 bits of a digest of seed, key and number.

    >>> seeds_of(0, bytes(16), 2, 4) == seeds_of(0, bytes(16), 0, 4)[2:]
    True
    """
    start = blake2b(key + str(seed).encode(), digest_size=32)
    seeds = []
    for number in range(first, last):
        digest = start.copy()
        digest.update(f":{number}".encode())
        seeds.append(int.from_bytes(digest.digest()[:8], "little") >> 1)
    return seeds


def sample(sampler: Sampler, prompts: Iterable[Prompt], seeds: Seeds) -> list[list[Rollout]]:
    """Call any sampler and check its rollouts: as many as there are seeds, each a text or messages."""
    prompts = list(prompts)
    if len(prompts) != len(seeds):
        raise ValueError(f"each prompt needs its seeds, got {len(prompts)} prompts and seeds for {len(seeds)}")
    # Copies: a sampler may change its arguments.
    answer = sampler(deepcopy(prompts), [[*each] for each in seeds]) if prompts else []
    if not isinstance(answer, Sequence) or isinstance(answer, str) or len(answer) != len(prompts):
        raise ValueError(
            f"a sampler gives a list of completions for each of {len(prompts)} prompts, {name_of(sampler)} gave "
            f"{start_of(answer)}"
        )
    rollouts = []
    for prompt, own, drawn in zip(prompts, seeds, answer, strict=True):
        if not isinstance(drawn, Sequence) or isinstance(drawn, str) or len(drawn) != len(own):
            raise ValueError(
                f"{name_of(sampler)} gives {len(own)} completions for {start_of(prompt)}, got {start_of(drawn)}"
            )
        rollouts.append([_check_rollout(each, prompt, sampler) for each in drawn])
    return rollouts


def _check_rollout(drawn: Any, prompt: Prompt, sampler: Sampler) -> Rollout:
    rollout = drawn if isinstance(drawn, Rollout) else Rollout(drawn)
    completion, tokens, finish, logprob = rollout
    if not isinstance(completion, str | list | tuple):
        raise TypeError(
            f"a completion is a text or a list of messages, {name_of(sampler)} gave {type(completion).__name__} for "
            f"{start_of(prompt)}"
        )
    rules = {
        "tokens is a count": tokens is None or 0 <= tokens < 2**31,
        'finish is "stop", "length" or None': finish in ("stop", "length", None),
        "logprob is a finite number": logprob is None or isfinite(logprob),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"of a rollout, {rule}; {name_of(sampler)} gave {rollout!r:.120} for {start_of(prompt)}")
    if isinstance(completion, str):
        # Half a character, which JSON can bring and UTF-8 cannot keep, becomes what tokenizers write for invalid bytes.
        completion = completion.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    count = None if tokens is None else int(tokens)
    return Rollout(completion, count, finish, None if logprob is None else float(logprob))


def logprob_of_draw(logprob: float | None, decoding: Decoding, processed: bool) -> float | None:
    """Return an engine's log-probability if it is that of the draw: `processed`, or of a decoding that changes nothing.

    >>> logprob_of_draw(-3.5, Decoding(9, stop=("END",)), processed=False)
    -3.5
    >>> logprob_of_draw(-3.5, Decoding(9, temperature=0.7), processed=False)
    """
    plain = replace(decoding, max_tokens=1, stop=(), stop_token_ids=()) == Decoding(max_tokens=1)
    return logprob if processed or plain else None


def tokenize_prompts(text: Text, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Make prompts into tokens, as a trainer does.

    An end token, which an input of a scorer may have, is left out: it would end the completion before it begins.
    """
    text = replace(text, append_eos=False)
    return text.tokens(tokenizer, [text.opening(tokenizer, prompt) for prompt in prompts])


def fingerprint_of_prompts(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Select the parts of a `Text`'s fingerprint that a prompt's tokens depend on."""
    return {name: fingerprint[name] for name in ("chat", "template", "template_options", "special_tokens", "today")}
