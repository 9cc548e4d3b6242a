"""check_adapter passes what hands everything on, and fails each way in which an adapter can be wrong."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.prompts import id_key
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.testing.check_adapter import check_adapter
from calibrated_rewards.testing.suites import HashScorer

PROMPTS = ["Hi", "Ho", "Hi", "Hum", "Hi", "Ho"]
COMPLETIONS = ["one", "two", "three", "four", "five", "six"]
IDS = ["a", "b", "a", "c", "a", "b"]


def table() -> ReferenceTable:
    """References of three prompts, each with an id as a name beside its own."""
    rng = np.random.default_rng(0)
    rows = zip(("Hi", "Ho", "Hum"), ("a", "b", "c"), strict=True)
    return ReferenceTable.build([(prompt, rng.normal(size=8), [id_key(name)]) for prompt, name in rows])


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> CalibratedReward:
    """A reward without a model; an id alone tells what the scorer reads."""
    originals = Originals.write(tmp_path_factory.mktemp("originals") / "prompts.jsonl", table(), PROMPTS)
    return CalibratedReward(HashScorer(), table(), Exponential(3.0), originals=originals)


def passed_on(reward: CalibratedReward) -> Callable[..., Any]:
    return lambda prompts, completions, ids: reward.score(prompts, completions, ids).reward


def test_what_hands_everything_on_passes(reward):
    """With and without ids, as a list and as a tensor; the verdict says how many checks there were."""
    assert str(check_adapter(passed_on(reward), reward, PROMPTS, COMPLETIONS, IDS)).endswith(": 11 checks passed")

    def tensor(prompts, completions, _):
        return torch.tensor(reward(prompts=prompts, completions=completions), dtype=torch.float32)

    assert len(check_adapter(tensor, reward, PROMPTS, COMPLETIONS).checks) == 10


def test_messages_are_asked_about_as_messages():
    """A conversation's odd completions and unknown prompts are conversations too."""
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    answers = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    known = CalibratedReward(
        HashScorer(), ReferenceTable.build([(chat, [-1.0, 0.0, 1.0]) for chat in chats[:2] + chats[3:4]])
    )
    seen = []

    def call(prompts, completions, _):
        seen.extend([*prompts, *completions])
        return known.score(prompts, completions).reward

    check_adapter(call, known, chats, answers)

    assert {type(each) for each in seen} == {list}


def test_a_skipped_row_is_none_on_both_sides():
    """An adapter that gives None where the reward does agrees; one that gives 0 there does not."""
    lenient = CalibratedReward(HashScorer(), table(), on_missing="skip")
    check_adapter(passed_on(lenient), lenient, PROMPTS, COMPLETIONS)

    def zero(prompts, completions, _):
        return [0.0 if each is None else each for each in lenient(prompts, completions)]

    with pytest.raises(AssertionError, match=r"gives 0.0, the reward nan, for a prompt that no table has"):
        check_adapter(zero, lenient, PROMPTS, COMPLETIONS)


def reversed_order(reward):
    return lambda p, c, i: reward.score(p, c, i).reward[::-1]


def first_prompt_for_all(reward):
    return lambda p, c, i: reward.score([p[0]] * len(p), c, [i[0]] * len(p)).reward if p else []


def one_prompt_kept(reward):
    """Keeps the prompt of its first call, as an object that lives too long does."""
    kept: list[Any] = []

    def call(p, c, i):
        kept.extend(zip(p, i, strict=True)) if not kept else None
        return reward.score([kept[n % 6][0] for n in range(len(p))], c, [kept[n % 6][1] for n in range(len(p))]).reward

    return call


def sorted_by_prompt(reward):
    """Scores group by group, and forgets to sort back."""

    def call(p, c, i):
        order = sorted(range(len(p)), key=lambda n: p[n])
        return reward.score([p[n] for n in order], [c[n] for n in order], [i[n] for n in order]).reward

    return call


def ids_dropped(reward):
    return lambda p, c, i: reward.score(p, c).reward


def silent_zero(reward):
    def call(p, c, i):
        try:
            return reward.score(p, c, i).reward
        except KeyError:
            return [0.0] * len(p)

    return call


def silent_nan(reward):
    def call(p, c, i):
        try:
            return reward.score(p, c, i).reward
        except KeyError:
            return [float("nan")] * len(p)

    return call


def stripped(reward):
    return lambda p, c, i: reward.score(p, [each.strip() for each in c], i).reward


def clipped(reward):
    return lambda p, c, i: [min(each, 0.5) for each in reward.score(p, c, i).reward]


def rounded(reward):
    return lambda p, c, i: [float(np.float16(each)) for each in reward.score(p, c, i).reward]


def centred(reward):
    def call(p, c, i):
        found = np.array(reward.score(p, c, i).reward)
        return found - found.mean() if len(found) else found

    return call


def not_empty(reward):
    return lambda p, c, i: reward.score(p, c, i).reward or [0.0]


def column(reward):
    return lambda p, c, i: np.array(reward.score(p, c, i).reward)[:, None]


def repeats_merged(reward):
    """One answer for each different pair."""
    return lambda p, c, i: [
        reward.score([a], [b], [d]).reward[0] for a, b, d in dict.fromkeys(zip(p, c, i, strict=True))
    ]


def lists_emptied(reward):
    def call(p, c, i):
        found = reward.score(p, c, i).reward
        c.clear()
        return found

    return call


def infinite(reward):
    return lambda p, c, i: [
        float("-inf") if not each.strip() else r for each, r in zip(c, reward.score(p, c, i).reward, strict=True)
    ]


def shared_slot(reward):
    """A slot that all threads write to, and each reads from after a while."""
    slot: dict[str, Any] = {}
    barrier = threading.Event()

    def call(p, c, i):
        slot["pairs"] = (p, c, i)
        barrier.wait(0.002)
        return reward.score(*slot["pairs"]).reward

    return call


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (reversed_order, "all in a batch"),
        (first_prompt_for_all, "all in a batch"),
        (one_prompt_kept, "one at a time"),
        (sorted_by_prompt, "all in a batch"),
        (ids_dropped, "for prompts that only their ids tell apart"),
        (silent_zero, "where the reward raises UnknownPromptError"),
        (silent_nan, "where the reward raises UnknownPromptError"),
        (stripped, "for empty, blank, odd and long completions"),
        (clipped, "all in a batch"),
        (rounded, "all in a batch"),
        (centred, "all in a batch"),
        (not_empty, "an empty batch"),
        (column, "gives shape"),
        (repeats_merged, "with repeated pairs"),
        (lists_emptied, "changes the lists"),
        (infinite, "a reward is a finite number"),
        (shared_slot, "from 8 threads at once"),
    ],
)
def test_what_is_wrong_is_found(reward, broken, complaint):
    """Each broken adapter fails, at the check that is about it."""
    with pytest.raises(AssertionError, match=complaint):
        check_adapter(broken(reward), reward, PROMPTS, COMPLETIONS, IDS)


def test_pairs_that_show_nothing_are_refused(reward):
    """Lists of different lengths, one pair, and pairs that are all worth the same."""
    for prompts, completions, ids in [(["Hi"], ["a", "b"], None), (["Hi"], ["a"], None), (PROMPTS, COMPLETIONS, ["a"])]:
        with pytest.raises(ValueError, match="as many prompts as completions and ids, 2 or more, got"):
            check_adapter(passed_on(reward), reward, prompts, completions, ids)
    with pytest.raises(ValueError, match="pairs with different rewards"):
        check_adapter(passed_on(reward), reward, ["Hi", "Hi"], ["same", "same"])
