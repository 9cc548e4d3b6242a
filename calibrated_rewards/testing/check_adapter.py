"""Check that an adapter gives a framework exactly the rewards of the calibrated reward, however it is called."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import without_tensors
from calibrated_rewards.testing.subject import describe

Call: TypeAlias = Callable[[list[Prompt], list[Completion], list[Any] | None], Any]
"""Calls an adapter as its framework does: prompts, completions, ids or None; a reward for each, in their order."""

THREADS = 8
UNKNOWN = "A prompt that no table has: 93b1f0c2a7"
ODD_TEXTS = ("", " ", "\n", "é 🙂 \u200b", "word " * 300)


@runtime_checkable
class Rewarding(Protocol):
    """The part of a calibrated reward that an adapter is compared with."""

    def score(self, prompts: list[Any], completions: list[Any], ids: list[Any] | None = None) -> Any:
        """Return an object with a list `reward`."""


@dataclass(frozen=True)
class AdapterVerdict:
    """An adapter's name and the checks that it passed; a check that fails raises instead."""

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
    """Run all checks on an adapter; AssertionError that names the check that failed, and the pair.

    `call(prompts, completions, ids)` hands the pairs to the adapter in the framework's shape, and takes the rewards out
    of its answer; `reward` is the one behind the adapter. The rewards have to be equal to the last bit of float32, so
    take a scorer that does not depend on its batch, such as `testing.HashScorer`. With `ids`, prompts that only their
    ids tell apart are tried too.

    >>> from calibrated_rewards import CalibratedReward, ReferenceTable
    >>> from calibrated_rewards.testing.suites import HashScorer
    >>> reward = CalibratedReward(HashScorer(), ReferenceTable.build([("Hi", [0.0, 1.2]), ("Ho", [0.0])]))
    >>> def ours(prompts, completions, ids):
    ...     return reward(prompts=prompts, completions=completions)
    >>> print(check_adapter(ours, reward, ["Hi", "Hi", "Ho"], ["Hello!", "Go away", "Ha"]))
    ours: 10 checks passed
    """
    pairs = Pairs(list(prompts), list(completions), None if ids is None else list(ids))
    counts = [len(prompts), len(completions), *([] if ids is None else [len(ids)])]
    if len(set(counts)) > 1 or counts[0] < 2:
        raise ValueError(f"check_adapter needs as many prompts as completions and ids, 2 or more, got {counts}")
    subject = Adapter(call, reward)
    if len(set(subject.expect(pairs).tolist())) < 2:
        raise ValueError("check_adapter needs pairs with different rewards, or no mix-up shows: got one reward for all")
    return AdapterVerdict(subject.name, tuple(_run_checks(subject, pairs)))


@dataclass(frozen=True)
class Pairs:
    """Prompts, completions, and the prompts' ids."""

    prompts: list[Prompt]
    completions: list[Completion]
    ids: list[Any] | None

    def at(self, places: Sequence[int]) -> "Pairs":
        """Select pairs by their indices, in that order."""
        prompts, completions = [self.prompts[i] for i in places], [self.completions[i] for i in places]
        return Pairs(prompts, completions, None if self.ids is None else [self.ids[i] for i in places])

    def with_completions(self, texts: Sequence[str]) -> "Pairs":
        """Give the first prompt other completions: texts, or messages if these are messages."""
        first = self.at([0] * len(texts))
        chat = not isinstance(self.completions[0], str)
        return Pairs(first.prompts, [[{"role": "assistant", "content": t}] if chat else t for t in texts], first.ids)

    def with_prompt(self, text: str) -> "Pairs":
        """Give the same completions and ids another prompt: a text, or messages if these are messages."""
        prompts = [text if isinstance(p, str) else [{"role": "user", "content": text}] for p in self.prompts]
        return Pairs([*prompts], self.completions, self.ids)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter and the reward behind it."""

    call: Call
    reward: Rewarding

    @property
    def name(self) -> str:
        """The adapter's name in a verdict."""
        return describe(self.call)

    def answer(self, pairs: Pairs) -> Float32[np.ndarray, "..."]:
        """Call the adapter on copies; its rewards as float32, nan for None."""
        copy = deepcopy(pairs)
        return _as_array(self.call(copy.prompts, copy.completions, copy.ids))

    def expect(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """Call the reward on copies; its rewards as float32, nan for None."""
        copy = deepcopy(pairs)
        return _as_array(self.reward.score(copy.prompts, copy.completions, copy.ids).reward)

    def compare_rewards(self, pairs: Pairs, rewards: Float32[np.ndarray, "..."], when: str) -> None:
        """AssertionError unless these are the rewards of the pairs."""
        expected = self.expect(pairs)
        if rewards.shape != expected.shape:
            raise AssertionError(f"{self.name} gives shape {rewards.shape} for {len(expected)} pairs, {when}")
        apart = np.flatnonzero((rewards != expected) & ~(np.isnan(rewards) & np.isnan(expected)))
        if len(apart):
            at = int(apart[0])
            where = f"prompt {start_of(pairs.prompts[at])}, completion {start_of(pairs.completions[at])}"
            more = f" (and {len(apart) - 1} others of {len(expected)})" if len(apart) > 1 else ""
            raise AssertionError(f"{self.name} gives {rewards[at]}, the reward {expected[at]}, {when}: {where}{more}")

    def compare_errors(self, pairs: Pairs, when: str) -> None:
        """AssertionError unless the adapter raises where the reward does, and else gives the same."""
        copy = deepcopy(pairs)
        try:
            self.expect(pairs)
        except Exception as error:  # whatever the reward refuses, the adapter has to refuse
            try:
                answer = self.call(copy.prompts, copy.completions, copy.ids)
            except (Exception, SystemExit):  # noqa: BLE001 (some frameworks hide all but an exit)
                return
            raise AssertionError(
                f"{self.name} gives {start_of(answer)} where the reward raises {type(error).__name__}: "
                f"{start_of(str(error))}, {when}: an error that is hidden trains on a number that nobody meant"
            ) from error
        try:
            answer = self.call(copy.prompts, copy.completions, copy.ids)
        except Exception as error:
            raise AssertionError(f"{self.name} raises {error!r} where the reward gives a number, {when}") from error
        self.compare_rewards(pairs, _as_array(answer), when)


def _run_checks(adapter: Adapter, pairs: Pairs) -> Iterator[str]:
    n = len(pairs.prompts)
    everything = range(n)
    slices = [range(0, n, 2), range(1, n, 2), range(n // 3), range(n // 3, n)]
    twice, when_sliced = [*everything, *everything, 0, 0], "a slice of a batch, groups cut through"
    permutation = np.random.default_rng(0).permutation(n).tolist()
    adapter.compare_rewards(pairs, adapter.answer(pairs), "all in a batch")
    yield "the rewards of score(), to the last bit of float32"
    alone = [adapter.answer(pairs.at([i])).reshape(-1) for i in everything]
    adapter.compare_rewards(pairs, np.concatenate(alone), "one at a time")
    yield "one at a time = in a batch"
    for name, selections in {
        "permuted": ((everything[::-1], "in reverse"), (permutation, "permuted")),
        "slices of a batch, groups cut through": [(places, when_sliced) for places in slices if len(places)],
        "repeated": ((twice, "with repeated pairs"), (everything, "called again")),
        "empty": (([], "an empty batch"),),
    }.items():
        for places, when in selections:
            adapter.compare_rewards(pairs.at(places), adapter.answer(pairs.at(places)), when)
        yield name
    adapter.compare_errors(pairs.with_completions(ODD_TEXTS), "for empty, blank, odd and long completions")
    yield "empty, blank, odd and long completions"
    unknown = Pairs(pairs.prompts, pairs.completions, None if pairs.ids is None else [UNKNOWN] * n).with_prompt(UNKNOWN)
    adapter.compare_errors(unknown.at([0]), "for a prompt that no table has")
    yield "an unknown prompt is no reward"
    if pairs.ids is not None:
        adapter.compare_errors(pairs.with_prompt(UNKNOWN), "for prompts that only their ids tell apart")
        yield "the ids are passed on"
    places = [i % n for i in range(max(4 * THREADS, n))]
    with ThreadPoolExecutor(THREADS) as pool:
        rewards = [each.reshape(-1) for each in pool.map(adapter.answer, [pairs.at([i]) for i in places])]
    adapter.compare_rewards(pairs.at(places), np.concatenate(rewards), f"from {THREADS} threads at once")
    yield f"{THREADS} threads at once"
    copy = deepcopy(pairs)
    adapter.call(copy.prompts, copy.completions, copy.ids)
    if repr(copy) != repr(pairs):
        raise AssertionError(f"{adapter.name} changes the lists that the framework goes on to use")
    yield "lists left alone"


def _as_array(answer: Any) -> Float32[np.ndarray, "..."]:
    """Rewards as float32, nan for None; AssertionError for one that is nan or infinite."""
    plain = without_tensors(answer)
    if not all(one is None or np.isfinite(one).all() for one in plain):
        raise AssertionError(f"a reward is a finite number or None, got {start_of(plain)}")
    return np.asarray([np.nan if one is None else one for one in plain], np.float64).astype(np.float32)
