"""Call a scorer from one thread at a time, unless it says that several may call it at once.

A scorer says so by an attribute, `thread_safe = True`. Every call that goes through `scorers.score` comes by here:
those of `CalibratedReward`, of `calibrate` and of the members of an ensemble.

Prompts and completions in the one form that JSON has for them.

What a scorer is, and the one place where its answer is checked."""

import json
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from inspect import Parameter, iscoroutine, signature
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.callable_fingerprint import describe, place_free_name
from calibrated_rewards.prompts import (
    Completion,
    Prompt,
    canonical_chat,
    name_of as name_of,  # noqa: PLC0414 (scorers import it from here)
    start_of,
)


class _Lock:
    """A reentrant lock that can be referred to weakly."""

    def __init__(self, owner: object) -> None:
        self.owner, self.lock = owner, threading.RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def is_thread_safe(scorer: object) -> bool:
    """Whether a scorer says that several threads may call it at once; one that says nothing may not.

    >>> is_thread_safe(len)
    False
    """
    if isinstance(scorer, partial):
        return is_thread_safe(scorer.func)
    return getattr(scorer, "thread_safe", False) is True


class _Registry:
    """The locks of scorers by id, each for as long as a call uses it; its caller holds the scorer, so the id is its."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew, in a forked process: nobody there releases the locks of its parent's threads."""
        self.guard, self.locks = threading.Lock(), WeakValueDictionary[int, _Lock]()

    def lock_for(self, scorer: object) -> _Lock:
        """The lock that all who call this scorer at this moment share."""
        with self.guard:
            lock = self.locks.get(id(scorer))
            if lock is None:
                lock = self.locks[id(scorer)] = _Lock(scorer)
            return lock


_registry = _Registry()
lock_for = _registry.lock_for
os.register_at_fork(after_in_child=_registry.forget)


def plain(said: Prompt | Completion) -> Any:
    """A text as it is; messages as lists and dicts, the same for all ways to write the same messages.

    >>> plain([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}])
    [{'content': 'Hi', 'role': 'user'}]
    """
    if isinstance(said, str):
        return said
    return json.loads(canonical_chat(said)) if len(said) else []


TEXTS_OF_CHATS = (
    "completions are texts here, also where prompts are messages: a function that reads completion[0]['content'], as "
    "functions for TRL do, has to take a text as well: text = c if isinstance(c, str) else c[0]['content']"
)
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


@runtime_checkable
class ReadsMessages(Protocol):
    """A scorer that says whether it scores an answer alike as a text and as messages, tool calls included."""

    @property
    def reads_messages(self) -> bool:
        """Whether it does."""


def reads_messages(scorer: object) -> bool:
    """Whether a scorer may be given messages where it was calibrated with texts; a plain function may not."""
    if isinstance(scorer, ReadsMessages):
        return bool(scorer.reads_messages)
    return type(scorer).__module__.startswith("calibrated_rewards.")


def score(scorer: Scorer, prompts: Iterable[Prompt], completions: Iterable[Completion]) -> Float32[np.ndarray, " n"]:
    """The scores that any scorer gives, checked: one for each pair, none of them nan or infinite."""
    asked, answered = paired(prompts, completions)
    if not asked:
        return np.empty(0, np.float32)
    with nullcontext() if is_thread_safe(scorer) else lock_for(scorer):
        # Copies: what a scorer does to its arguments is its own affair. The answer is copied before the next call.
        try:
            answer = call(scorer, deepcopy(asked), deepcopy(answered))
        except (TypeError, AttributeError) as error:
            if not reads_messages(scorer) and _are_texts_of_chats(asked, answered):
                error.add_note(TEXTS_OF_CHATS)
            raise
        return checked(answer, asked, answered, name_of(scorer))


def _are_texts_of_chats(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> bool:
    """Whether completions are texts where prompts are messages: TRL's own functions are given messages there."""
    return any(not isinstance(p, str) and isinstance(c, str) for p, c in zip(prompts, completions, strict=True))


def call(scorer: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    """Call a scorer by position, or by name, as TRL does, if `completions` is not its second argument.

    TRL's functions have their arguments in any order, and often no prompts: `def reward(completions, **kwargs)`.
    """
    parameters = _parameters(scorer)
    if "completions" not in parameters:
        return scorer(prompts, completions)
    second = list(parameters)[1:2] == ["completions"]
    known = ("prompts", "completions", *list(parameters)[: 2 * second])  # the first may have any name
    lacking = [name for name, each in parameters.items() if name not in known and _is_asked(each)]
    if lacking:
        raise TypeError(
            f"{name_of(scorer)} needs {', '.join(lacking)} beside prompts and completions: a scorer is given nothing "
            "else, so what else it needs has to be found by the prompt"
        )
    if second:
        return scorer(prompts, completions)
    takes_prompts = "prompts" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return scorer(completions=completions, **({"prompts": prompts} if takes_prompts else {}))


def _parameters(scorer: Any) -> dict[str, Parameter]:
    """The arguments that can be given by name; none for a builtin without a signature."""
    try:
        named = signature(scorer).parameters
    except (TypeError, ValueError):
        return {}
    return {name: each for name, each in named.items() if each.kind is not each.POSITIONAL_ONLY}


def _is_asked(parameter: Parameter) -> bool:
    by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return by_name and parameter.default is parameter.empty


def checked(
    answer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion], who: str
) -> Float32[np.ndarray, " n"]:
    """An answer as scores of its own memory: one finite number for each pair; errors call the answerer `who`."""
    given = _as_array(answer, who)
    if given.shape != (len(prompts),):
        hint = "" if given.shape else ". A function of one prompt and one completion: scorers.function.Function"
        raise ValueError(
            f"a scorer gives one number a completion, {who} gave shape {given.shape} for {len(prompts)}{hint}"
        )
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
            f"of prompt {start_of(prompts[i])} (and {len(bad) - 1} others of {len(scores)}): look for a None, for nan "
            "among the weights, or for scores that float32 cannot hold"
        )
    return scores


def fingerprint(scorer: object) -> dict[str, Any]:
    """What a scorer or sampler says of itself; of one without such a method its name, and digests of code and state."""
    if isinstance(scorer, Fingerprinted) and not isinstance(scorer, type):
        return scorer.fingerprint()
    named = scorer
    while isinstance(named, partial):
        named = named.func
    return {"kind": "callable", "name": place_free_name(named), **describe(scorer)}


def without_tensors(answer: Any) -> Any:
    """Torch's tensors as arrays, without importing torch: numpy knows no gradient, no bfloat16, no other device."""
    if type(answer).__module__.partition(".")[0] == "torch":
        return answer.detach().to("cpu").float().numpy()
    return [without_tensors(each) for each in answer] if isinstance(answer, list | tuple) else answer


def _as_array(answer: Any, who: str) -> Float32[np.ndarray, "..."]:
    if iscoroutine(answer):
        answer.close()
        raise TypeError(f"{who} is asynchronous, and a scorer is not awaited: call it through asyncio.run")
    try:
        numbers = np.asarray(without_tensors(answer))
        if numbers.dtype.kind not in "biufO":
            raise TypeError(f"numbers of type {numbers.dtype}")
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused with its pair
            return numbers.astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{who} gave no list of numbers: {start_of(answer)}") from error
