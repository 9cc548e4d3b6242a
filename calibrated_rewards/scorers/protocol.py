"""The definition of a scorer, and the one way to call it: from one thread at a time, its scores checked.

Every call that `CalibratedReward`, `calibrate` and the members of an ensemble make goes through `score`. A scorer that
several threads may call at once says so by an attribute, `thread_safe = True`. `Loaded` is a scorer that pickles as the
recipe by which it is loaded, not as its weights.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, iscoroutine, signature
from typing import Any, NoReturn, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.callable_fingerprint import describe, place_free_name
from calibrated_rewards.models.lazy import Lazy, Recipe, fields_only
from calibrated_rewards.prompts import (
    Completion,
    Prompt,
    canonical_chat,
    name_of as name_of,  # noqa: PLC0414 (scorers import it from here)
    start_of,
)

TEXTS_OF_CHATS = (
    "completions are texts here, also where prompts are messages: a function that reads completion[0]['content'], as "
    "functions for TRL do, has to take a text as well: text = c if isinstance(c, str) else c[0]['content']"
)
_OTHER = {"prompts": "completion", "completions": "prompt"}


@runtime_checkable
class Scorer(Protocol):
    """A callable that scores completions: `scorer(prompts, completions)`, two lists of one length, gives numbers.

    One thread at a time calls it, whatever number of threads ask a reward. A scorer that several threads may call at
    once says so by an attribute, `thread_safe = True`, on its class, on the object or on the function.
    """

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Any:
        """Score each pair, higher is better: a list, a numpy array or a torch tensor."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A scorer or sampler with an identity: two that have the same fingerprint do the same."""

    def fingerprint(self) -> dict[str, Any]:
        """Name as JSON all that the scores depend on: weights, tokenizer, template, precision, truncation."""


@runtime_checkable
class ReadsMessages(Protocol):
    """A scorer that declares whether it scores an answer alike as a text and as messages, tool calls included."""

    @property
    def reads_messages(self) -> bool:
        """True if both have the same score."""


def score(scorer: Scorer, prompts: Iterable[Prompt], completions: Iterable[Completion]) -> Float32[np.ndarray, " n"]:
    """Call any scorer and check its scores: one for each pair, none of them nan or infinite."""
    prompts, completions = check_pairs(prompts, completions)
    if not prompts:
        return np.empty(0, np.float32)
    with nullcontext() if is_thread_safe(scorer) else lock_for(scorer):
        # Copies: what a scorer does to its arguments is its own affair. The answer is copied before the next call.
        try:
            answer = call(scorer, deepcopy(prompts), deepcopy(completions))
        except (TypeError, AttributeError) as error:
            chats = any(
                not isinstance(p, str) and isinstance(c, str) for p, c in zip(prompts, completions, strict=True)
            )
            if chats and not reads_messages(scorer):  # TRL's own functions are given messages there
                error.add_note(TEXTS_OF_CHATS)
            raise
        return check_scores(answer, prompts, completions, name_of(scorer))


def score_with(
    compute: Callable[[list[Prompt], list[Completion]], Float32[np.ndarray, " n"]],
    scorer: Scorer,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
) -> Float32[np.ndarray, " n"]:
    """Check the pairs, compute their scores and check these: what a scorer's own `__call__` does."""
    prompts, completions = check_pairs(prompts, completions)
    if not prompts:
        return np.empty(0, np.float32)
    return check_finite(compute(prompts, completions), prompts, completions, name_of(scorer))


def call(scorer: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    """Call a scorer by position, or by name, as TRL does, if `completions` is not its second argument.

    TRL's functions have their arguments in any order, and often no prompts: `def reward(completions, **kwargs)`.
    """
    try:
        parameters = {n: each for n, each in signature(scorer).parameters.items() if each.kind != each.POSITIONAL_ONLY}
    except (TypeError, ValueError):  # a builtin without a signature
        parameters = {}
    if "completions" not in parameters:
        return scorer(prompts, completions)
    second = list(parameters)[1:2] == ["completions"]
    known = ("prompts", "completions", *list(parameters)[: 2 * second])  # the first may have any name
    lacking = [name for name, each in parameters.items() if name not in known and _is_required(each)]
    if lacking:
        raise TypeError(
            f"{name_of(scorer)} needs {', '.join(lacking)} beside prompts and completions: a scorer is given nothing "
            "else, so what else it needs has to be found by the prompt"
        )
    if second:
        return scorer(prompts, completions)
    takes_prompts = "prompts" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return scorer(completions=completions, **({"prompts": prompts} if takes_prompts else {}))


def _is_required(parameter: Parameter) -> bool:
    by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return by_name and parameter.default is parameter.empty


def check_pairs(prompts: Iterable[Any], completions: Iterable[Completion]) -> tuple[list[Any], list[Completion]]:
    """Return prompts and completions as lists of one length; refuse a text in the place of a list.

    >>> check_pairs("Hi", "Hello")
    Traceback (most recent call last):
    TypeError: prompts are a list, one for each completion, got the text 'Hi'
    """
    for name, values in (("prompts", prompts), ("completions", completions)):
        if isinstance(values, str):  # it would be read by letters
            raise TypeError(f"{name} are a list, one for each {_OTHER[name]}, got the text {start_of(values)}")
    prompts, completions = list(prompts), list(completions)
    if len(prompts) != len(completions):
        raise ValueError(
            f"each completion needs its prompt, got {len(prompts)} prompts and {len(completions)} completions"
        )
    for i, completion in enumerate(completions):
        if completion is None or isinstance(completion, bytes | int | float):
            raise TypeError(f"a completion is a text or a list of messages, completion {i} is {start_of(completion)}")
    return prompts, completions


def check_scores(
    answer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion], name: str
) -> Float32[np.ndarray, " n"]:
    """Return a scorer's answer as a new array of one finite number for each pair; errors call the scorer `name`."""
    if iscoroutine(answer):
        answer.close()
        raise TypeError(f"{name} is asynchronous, and a scorer is not awaited: call it through asyncio.run")
    try:
        numbers = np.asarray(without_tensors(answer))
        if numbers.dtype.kind not in "biufO":
            raise TypeError(f"numbers of type {numbers.dtype}")
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused with its pair
            scores = numbers.astype(np.float32)  # a copy: the scorer may go on to use its array
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} gave no list of numbers: {start_of(answer)}") from error
    if scores.shape != (len(prompts),):
        hint = (
            "" if scores.shape else ". A function of one prompt and one completion: calibrated_rewards.scorers.Function"
        )
        raise ValueError(
            f"a scorer gives one number a completion, {name} gave shape {scores.shape} for {len(prompts)}{hint}"
        )
    return check_finite(scores, prompts, completions, name)


def check_finite(
    scores: Float32[np.ndarray, " n"], prompts: Sequence[Prompt], completions: Sequence[Completion], name: str
) -> Float32[np.ndarray, " n"]:
    """Return the scores if each is a number; else raise an error that names the first pair whose score is not."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"a score is a finite number, {name} gave {scores[i]} for completion {start_of(completions[i])} "
            f"of prompt {start_of(prompts[i])} (and {len(bad) - 1} others of {len(scores)}): look for a None, for nan "
            "among the weights, or for scores that float32 cannot hold"
        )
    return scores


def fingerprint(scorer: object) -> dict[str, Any]:
    """Return the fingerprint of a scorer or sampler; of a plain callable its name and digests of code and state."""
    if isinstance(scorer, Fingerprinted) and not isinstance(scorer, type):
        return scorer.fingerprint()
    function = scorer
    while isinstance(function, partial):
        function = function.func
    return {"kind": "callable", "name": place_free_name(function), **describe(scorer)}


def reads_messages(scorer: object) -> bool:
    """Return whether a scorer may be given messages where it was calibrated with texts; a plain function may not."""
    if isinstance(scorer, ReadsMessages):
        return bool(scorer.reads_messages)
    return type(scorer).__module__.startswith("calibrated_rewards.")


def check_prompts(scorer: object, prompts: Sequence[Prompt]) -> None:
    """Let a scorer that has a `check` refuse the prompts that it cannot score, before anything is drawn for them."""
    if callable(check := getattr(scorer, "check", None)):
        check(prompts)


def is_thread_safe(scorer: object) -> bool:
    """Return whether several threads may call a scorer at once: only if it says so.

    >>> is_thread_safe(len)
    False
    """
    if isinstance(scorer, partial):
        return is_thread_safe(scorer.func)
    return getattr(scorer, "thread_safe", False) is True


class _Locks:
    """The locks of scorers by id, each for as long as a call holds it: its caller holds the scorer as well."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew, in a forked process: nobody there releases the locks of its parent's threads."""
        self.guard, self.by_id = threading.Lock(), WeakValueDictionary[int, Any]()

    def lock_for(self, scorer: object) -> Any:
        """Return the reentrant lock that all who call this scorer at this moment share."""
        with self.guard:
            lock = self.by_id.get(id(scorer))
            if lock is None:
                lock = self.by_id[id(scorer)] = threading.RLock()
            return lock


_locks = _Locks()
lock_for = _locks.lock_for
os.register_at_fork(after_in_child=_locks.reset)


def to_plain(messages: Prompt | Completion) -> Any:
    """Write messages as lists and dicts, the same for all forms of the same messages; a text stays as it is.

    >>> to_plain([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}])
    [{'content': 'Hi', 'role': 'user'}]
    """
    if isinstance(messages, str):
        return messages
    return json.loads(canonical_chat(messages)) if len(messages) else []


def without_tensors(answer: Any) -> Any:
    """Turn torch's tensors into arrays, without importing torch: numpy knows no gradient, bfloat16 or other device."""
    if type(answer).__module__.partition(".")[0] == "torch":
        return answer.detach().to("cpu").float().numpy()
    return [without_tensors(each) for each in answer] if isinstance(answer, list | tuple) else answer


def refuse_pickle(scorer: object) -> NoReturn:
    """Refuse to pickle a scorer whose model was given as an object: nothing says how another process would load it."""
    raise TypeError(
        f"{type(scorer).__name__} holds a model in memory and is not pickled with its weights; "
        "save the model and use load_scorer(name_or_path, ...), which pickles as how to load it"
    )


@dataclass(frozen=True, repr=False)
class Loaded:
    """A scorer and its recipe. In another process, after pickling, it loads again when it is first called."""

    recipe: Recipe

    thread_safe = property(lambda self: is_thread_safe(self.scorer), doc="True if the loaded scorer is.")
    __getstate__ = fields_only

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(self.scorer, self.scorer, prompts, completions)

    @Lazy
    def scorer(self) -> Scorer:
        """Load the scorer that does the work, of the kind that the recipe leads to; the same one from then on."""
        return self.recipe.load()  # type: ignore[no-any-return]

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        return fingerprint(self.scorer)

    def __repr__(self) -> str:
        if "scorer" not in self.__dict__:
            return f"Loaded({self.recipe.name!r})"
        from calibrated_rewards.scorers.ensemble import Cost  # which imports this file

        identity, kind = self.fingerprint(), type(self.scorer).__name__
        if isinstance(self.scorer, Cost):
            identity, kind = identity["of"], f"Cost({type(self.scorer.scorer).__name__})"
        labels, limit = identity.get("labels"), identity.get("text", {}).get("max_length")
        details = [f"{labels}"] * (labels is not None) + [f"max_length={limit}"] * (limit is not None)
        return f"Loaded({', '.join([repr(self.recipe.name), kind, *details])})"

    def __hash__(self) -> int:
        """Hash the name: a recipe may hold options that have no hash."""
        return hash(self.recipe.name)
