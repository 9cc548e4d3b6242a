"""What a scorer is, and the one place where its answer is checked."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from hashlib import blake2b
from types import CodeType, FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.serial import is_thread_safe, lock_for

_OTHER = {"prompts": "completion", "completions": "prompt"}


@runtime_checkable
class Scorer(Protocol):
    """Scores completions: `scorer(prompts, completions)`, two lists of one length, gives as many numbers.

    One thread at a time calls it, whatever number of threads ask a reward. A scorer that several threads may call at
    once says so by an attribute, `thread_safe = True`, on its class, on the object or on the function.
    """

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Any:
        """One score for each pair, higher is better: a list, a numpy array or a torch tensor."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A scorer or sampler that can say what it is: two that say the same do the same."""

    def fingerprint(self) -> dict[str, Any]:
        """What its scores depend on, as JSON: weights, tokenizer, template, precision, truncation."""


def score(scorer: Scorer, prompts: Iterable[Prompt], completions: Iterable[Completion]) -> Float32[np.ndarray, " n"]:
    """The scores that any scorer gives, checked: one for each pair, none of them nan or infinite."""
    asked, answered = paired(prompts, completions)
    if not asked:
        return np.empty(0, np.float32)
    with nullcontext() if is_thread_safe(scorer) else lock_for(scorer):
        # Copies: what a scorer does to its arguments is its own affair. The answer is copied before the next call.
        return checked(scorer(deepcopy(asked), deepcopy(answered)), asked, answered, name_of(scorer))


def checked(
    answer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion], who: str
) -> Float32[np.ndarray, " n"]:
    """An answer as scores of its own memory: one finite number for each pair; errors call the answerer `who`."""
    given = _as_array(answer, who)
    if given.shape != (len(prompts),):
        raise ValueError(f"a scorer gives one number a completion, {who} gave shape {given.shape} for {len(prompts)}")
    # A copy: the scorer may go on to use its array.
    return finite(given.copy(), prompts, completions, who)


def paired(prompts: Iterable[Any], completions: Iterable[Completion]) -> tuple[list[Any], list[Completion]]:
    """Prompts and completions as lists of one length; a text in the place of a list is refused, not read by letters.

    >>> paired("Hi", "Hello")
    Traceback (most recent call last):
    TypeError: prompts are a list, one for each completion, got the text 'Hi'
    """
    for name, given in (("prompts", prompts), ("completions", completions)):
        if isinstance(given, str):
            raise TypeError(f"{name} are a list, one for each {_OTHER[name]}, got the text {start_of(given)}")
    asked, answered = list(prompts), list(completions)
    if len(asked) != len(answered):
        raise ValueError(f"each completion needs its prompt, got {len(asked)} prompts and {len(answered)} completions")
    for i, completion in enumerate(answered):
        if completion is None or isinstance(completion, bytes | int | float):
            raise TypeError(f"a completion is a text or a list of messages, completion {i} is {start_of(completion)}")
    return asked, answered


def finite(
    scores: Float32[np.ndarray, " n"], prompts: Sequence[Prompt], completions: Sequence[Completion], who: str
) -> Float32[np.ndarray, " n"]:
    """The scores, if each is a number; else an error that names the first pair whose score is not."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"a score is a finite number, {who} gave {scores[i]} for completion {start_of(completions[i])} "
            f"of prompt {start_of(prompts[i])} (and {len(bad) - 1} others of {len(scores)}): look for nan among the "
            "weights, or for scores that float32 cannot hold"
        )
    return scores


def fingerprint(scorer: object) -> dict[str, Any]:
    """What a scorer, or a sampler, says of itself; for one that says nothing, its name and what its code is."""
    if isinstance(scorer, Fingerprinted):
        return scorer.fingerprint()
    if isinstance(scorer, partial):
        said = {"arguments": repr(scorer.args), "keywords": repr(scorer.keywords)}
        return {**fingerprint(scorer.func), **said}
    code = {"code": _digest(scorer.__code__)} if isinstance(scorer, FunctionType) else {}
    return {"kind": "callable", "name": name_of(scorer), **code}


def without_tensors(answer: Any) -> Any:
    """Torch's tensors as arrays, without importing torch: numpy knows no gradient, no bfloat16, no other device."""
    if type(answer).__module__.partition(".")[0] == "torch":
        return answer.detach().to("cpu").float().numpy()
    return [without_tensors(each) for each in answer] if isinstance(answer, list | tuple) else answer


def name_of(scorer: object) -> str:
    """What errors call a scorer: the function's or the class's name."""
    named = scorer if isinstance(scorer, type | FunctionLike) else type(scorer)
    return f"{named.__module__}.{named.__qualname__}"


@runtime_checkable
class FunctionLike(Protocol):
    """What has a name of its own: functions, methods, classes."""

    __module__: str
    __qualname__: str


def _digest(code: CodeType) -> str:
    """Of a function's own code: not of what it calls, nor of what it closes over."""
    digest = blake2b(code.co_code, digest_size=8)
    for constant in (*code.co_consts, code.co_names):
        digest.update((_digest(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    return digest.hexdigest()


def _as_array(answer: Any, who: str) -> Float32[np.ndarray, "..."]:
    try:
        numbers = np.asarray(without_tensors(answer))
        if numbers.dtype.kind not in "biufO":
            raise TypeError(f"numbers of type {numbers.dtype}")
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused with its pair
            return numbers.astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{who} gave no list of numbers: {start_of(answer)}") from error
