"""Whether an adapter gives a framework the rewards of the calibrated reward, however the framework calls it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import without_tensors
from calibrated_rewards.testing.check_scorer import titled

Call: TypeAlias = Callable[[list[Prompt], list[Completion], list[Any] | None], Any]
"""Drives an adapter as its framework does: prompts, completions, ids or None; a reward for each, in their order."""

THREADS = 8
NOBODYS = "A prompt that no table has: 93b1f0c2a7"
ODD_TEXTS = ("", " ", "\n", "é 🙂 \u200b", "word " * 300)


@runtime_checkable
class Rewarding(Protocol):
    """A calibrated reward, as far as an adapter is checked against it."""

    def score(self, prompts: list[Any], completions: list[Any], ids: list[Any] | None = None) -> Any:
        """Something with a list of `reward`."""


@dataclass(frozen=True)
class AdapterVerdict:
    """What was checked of an adapter, and that all of it held."""

    subject: str
    checks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.subject}: {len(self.checks)} checks passed"


def check_adapter(
    call: Call,
    reward: Rewarding,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    ids: Sequence[Any] | None = None,
) -> AdapterVerdict:
    """Run all checks on an adapter; AssertionError that says which did not hold, and where.

    `call(prompts, completions, ids)` hands the pairs to the adapter in the framework's shape, and takes the rewards out
    of its answer; `reward` is the one behind the adapter. The rewards have to be equal to the last bit of float32, so
    take a scorer that minds no batch, such as `testing.HashScorer`. With `ids`, prompts that only their ids tell
    apart are asked about too.

    >>> from calibrated_rewards import CalibratedReward, ReferenceTable
    >>> from calibrated_rewards.testing.suites import HashScorer
    >>> reward = CalibratedReward(HashScorer(), ReferenceTable.build([("Hi", [0.0, 1.2]), ("Ho", [0.0])]))
    >>> def ours(prompts, completions, ids):
    ...     return reward(prompts=prompts, completions=completions)
    >>> print(check_adapter(ours, reward, ["Hi", "Hi", "Ho"], ["Hello!", "Go away", "Ha"]))
    ours: 10 checks passed
    """
    asked = Pairs(list(prompts), list(completions), None if ids is None else list(ids))
    many = [len(prompts), len(completions), *([] if ids is None else [len(ids)])]
    if len(set(many)) > 1 or many[0] < 2:
        raise ValueError(f"check_adapter needs as many prompts as completions and ids, 2 or more, got {many}")
    subject = Adapter(call, reward, asked)
    if len(set(subject.wanted(asked).tolist())) < 2:
        raise ValueError("check_adapter needs pairs with different rewards, or no mix-up shows: got one reward for all")
    return AdapterVerdict(subject.name, tuple(_checks(subject)))


@dataclass(frozen=True)
class Pairs:
    """Prompts, completions, and the prompts' ids."""

    prompts: list[Prompt]
    completions: list[Completion]
    ids: list[Any] | None

    def at(self, places: Sequence[int]) -> "Pairs":
        """Some of them, in that order."""
        prompts, completions = [self.prompts[i] for i in places], [self.completions[i] for i in places]
        return Pairs(prompts, completions, None if self.ids is None else [self.ids[i] for i in places])

    def texts(self, texts: Sequence[str]) -> "Pairs":
        """Other completions of the first prompt: texts, or messages if these are messages."""
        one = self.at([0] * len(texts))
        chat = not isinstance(self.completions[0], str)
        return Pairs(one.prompts, [[{"role": "assistant", "content": t}] if chat else t for t in texts], one.ids)

    def asked_of(self, prompt: str) -> "Pairs":
        """The same completions and ids, of another prompt: a text, or messages if these are messages."""
        said = [prompt if isinstance(p, str) else [{"role": "user", "content": prompt}] for p in self.prompts]
        return Pairs([*said], self.completions, self.ids)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, the reward behind it, and the pairs that it is asked about."""

    call: Call
    reward: Rewarding
    pairs: Pairs

    @property
    def name(self) -> str:
        """How a verdict names it."""
        return titled(self.call)

    def given(self, pairs: Pairs) -> Float32[np.ndarray, "..."]:
        """What the adapter gives, as float32; nan for None."""
        return _numbers(self.answer(pairs))

    def answer(self, pairs: Pairs) -> Any:
        """The same, as it comes."""
        copy = deepcopy(pairs)
        return self.call(copy.prompts, copy.completions, copy.ids)

    def wanted(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """What the reward gives, as float32; nan for None."""
        copy = deepcopy(pairs)
        return _numbers(self.reward.score(copy.prompts, copy.completions, copy.ids).reward)

    def hold(self, pairs: Pairs, given: Float32[np.ndarray, "..."], when: str) -> None:
        """AssertionError unless these are the rewards."""
        wanted = self.wanted(pairs)
        if given.shape != wanted.shape:
            raise AssertionError(f"{self.name} gives shape {given.shape} for {len(wanted)} pairs, {when}")
        apart = np.flatnonzero((given != wanted) & ~(np.isnan(given) & np.isnan(wanted)))
        if len(apart):
            at = int(apart[0])
            where = f"prompt {start_of(pairs.prompts[at])}, completion {start_of(pairs.completions[at])}"
            more = f" (and {len(apart) - 1} others of {len(wanted)})" if len(apart) > 1 else ""
            raise AssertionError(f"{self.name} gives {given[at]}, the reward {wanted[at]}, {when}: {where}{more}")

    def follows(self, pairs: Pairs, when: str) -> None:
        """AssertionError unless the adapter raises where the reward does, and else gives the same."""
        try:
            self.wanted(pairs)
        except Exception as error:  # whatever the reward refuses, the adapter has to refuse
            try:
                given = self.answer(pairs)
            except (Exception, SystemExit):  # noqa: BLE001 (some frameworks hide all but an exit)
                return
            said = f"{type(error).__name__}: {start_of(str(error))}"
            raise AssertionError(
                f"{self.name} gives {start_of(given)} where the reward raises {said}, {when}: an error that is "
                "hidden trains on a number that nobody meant"
            ) from error
        try:
            given = self.answer(pairs)
        except Exception as error:
            raise AssertionError(f"{self.name} raises {error!r} where the reward gives a number, {when}") from error
        self.hold(pairs, _numbers(given), when)


def _checks(adapter: Adapter) -> Iterator[str]:
    pairs, n = adapter.pairs, len(adapter.pairs.prompts)
    adapter.hold(pairs, adapter.given(pairs), "all in a batch")
    yield "the rewards of score(), to the last bit of float32"
    alone = [adapter.given(pairs.at([i])) for i in range(n)]
    adapter.hold(pairs, np.concatenate([each.reshape(-1) for each in alone]), "one at a time")
    yield "one at a time = in a batch"
    for order, when in ((np.arange(n)[::-1], "in reverse"), (np.random.default_rng(0).permutation(n), "permuted")):
        adapter.hold(pairs.at(order.tolist()), adapter.given(pairs.at(order.tolist())), when)
    yield "permuted"
    for places in (range(0, n, 2), range(1, n, 2), range(n // 3), range(n // 3, n)):
        if len(places):
            adapter.hold(pairs.at(places), adapter.given(pairs.at(places)), "a slice of a batch, groups cut through")
    yield "slices of a batch, groups cut through"
    twice = [*range(n), *range(n), 0, 0]
    adapter.hold(pairs.at(twice), adapter.given(pairs.at(twice)), "with repeated pairs")
    adapter.hold(pairs, adapter.given(pairs), "called again")
    yield "repeated"
    adapter.hold(pairs.at([]), adapter.given(pairs.at([])), "an empty batch")
    yield "empty"
    adapter.follows(pairs.texts(ODD_TEXTS), "for empty, blank, odd and long completions")
    yield "empty, blank, odd and long completions"
    nobodys = Pairs(pairs.prompts, pairs.completions, None if pairs.ids is None else [NOBODYS] * n).asked_of(NOBODYS)
    adapter.follows(nobodys.at([0]), "for a prompt that no table has")
    yield "an unknown prompt is no reward"
    if pairs.ids is not None:
        adapter.follows(pairs.asked_of(NOBODYS), "for prompts that only their ids tell apart")
        yield "the ids are passed on"
    _holds_in_threads(adapter)
    yield f"{THREADS} threads at once"
    _leaves_alone(adapter)
    yield "lists left alone"


def _holds_in_threads(adapter: Adapter) -> None:
    pairs, n = adapter.pairs, len(adapter.pairs.prompts)
    places = [i % n for i in range(max(4 * THREADS, n))]
    with ThreadPoolExecutor(THREADS) as pool:
        given = list(pool.map(adapter.given, [pairs.at([i]) for i in places]))
    adapter.hold(pairs.at(places), np.concatenate([g.reshape(-1) for g in given]), f"from {THREADS} threads at once")


def _leaves_alone(adapter: Adapter) -> None:
    copy = deepcopy(adapter.pairs)
    adapter.call(copy.prompts, copy.completions, copy.ids)
    if repr(copy) != repr(adapter.pairs):
        raise AssertionError(f"{adapter.name} changes the lists that the framework goes on to use")


def _numbers(answer: Any) -> Float32[np.ndarray, "..."]:
    """Rewards as float32, None as nan; an infinite or a nan one is refused."""
    plain = without_tensors(answer)
    if not all(one is None or np.isfinite(one).all() for one in plain):
        raise AssertionError(f"a reward is a finite number or None, got {start_of(plain)}")
    each = np.asarray([np.nan if one is None else one for one in plain], np.float64)
    return each.astype(np.float32)
