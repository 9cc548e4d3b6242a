# ruff: noqa: ARG001, D102 (a scorer takes both lists, whichever it reads)
"""A scorer is called by one thread at a time, unless it says that several may call it at once."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import tiny

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.reward.batching import score_one
from calibrated_rewards.reward.combined import CombinedReward
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.ensemble import Cost, Ensemble, Function
from calibrated_rewards.scorers.pairwise import BothOrders, MeanWin, References
from calibrated_rewards.scorers.protocol import is_thread_safe, lock_for, score
from calibrated_rewards.scorers.remote import Native, Remote
from calibrated_rewards.testing.suites import HashScorer, NumberScorer

TABLE = ReferenceTable.build([(f"p{i}", [0.0, 4.0, 8.0]) for i in range(16)])
THREADS = 8


@dataclass(eq=False)
class Tracking:
    """Scores by length through an attribute, and counts how many threads are inside at once."""

    thread_safe: bool = False
    pause: float = 0.002
    inside: int = 0
    most: int = 0
    now: list[Any] = field(default_factory=list)

    def __call__(self, prompts: Any, completions: Any, /) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.now = completions
        time.sleep(self.pause)
        scores = [float(len(completion)) for completion in self.now]
        self.inside -= 1
        return scores


def in_threads(ask: Any) -> list[Any]:
    """What 16 calls in 8 threads give, number i for prompt i and a completion of i letters."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda i: ask([f"p{i}"], ["x" * i]), range(16)))


def alone() -> list[Any]:
    """The same rewards from one thread."""
    reward = CalibratedReward(lambda prompts, completions: [float(len(c)) for c in completions], TABLE)
    return [reward([f"p{i}"], ["x" * i]) for i in range(16)]


def test_a_reward_calls_its_scorer_from_one_thread_at_a_time():
    """A scorer that keeps its input in an attribute mixes threads up by itself, and in a reward it does not."""
    bare, inside = Tracking(), Tracking()

    assert [float(scores[0]) for scores in in_threads(bare)] != list(range(16))
    assert in_threads(CalibratedReward(inside, TABLE)) == alone()
    assert (bare.most > 1, inside.most) == (True, 1)


def test_a_scorer_that_says_it_is_thread_safe_is_called_by_many():
    """As remote scorers need it: requests of several threads are in flight together."""
    scorer = Tracking(thread_safe=True, pause=0.05)
    in_threads(CalibratedReward(scorer, TABLE))

    assert scorer.most > 1


def test_every_way_to_a_scorer_is_serialised():
    """score_one, score, a second reward around the same scorer, and one in an ensemble, all at the same time."""
    scorer = Tracking()
    first, second = CalibratedReward(scorer, TABLE), CalibratedReward(Cost(Cost(scorer)), TABLE)
    third = CalibratedReward(Ensemble([scorer, HashScorer()], shifts=[0, 0], scales=[1, 1e9]), TABLE)

    def ask(prompts: Any, completions: Any) -> Any:
        score_one(first, prompts[0], completions[0])
        third.score(prompts, completions)
        return [first(prompts, completions), second(prompts, completions), score(scorer, prompts, completions).tolist()]

    answers = in_threads(ask)

    assert scorer.most == 1
    assert [answer[:2] for answer in answers] == [[rewards, rewards] for rewards in alone()]
    assert [answer[2] for answer in answers] == [[float(i)] for i in range(16)]


def test_a_scorer_may_ask_the_reward_that_it_is_in():
    """The lock is the thread's own: a call within a call of the same thread does not wait for itself."""

    def nested(prompts: Any, completions: Any) -> Any:
        inner = score(nested, prompts, [c[1:] for c in completions]) if completions[0] else np.zeros(len(completions))
        return inner + 1

    assert score(nested, ["p"], ["xxx"]).tolist() == [4.0]


def test_an_error_releases_the_lock():
    """After a call that raised, the next thread is served."""

    def failing(prompts: Any, completions: Any) -> Any:
        raise ZeroDivisionError

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
            pool.submit(score, failing, ["p"], ["c"]).result(timeout=5)


def test_a_buffer_that_is_used_again_is_copied_before_the_next_call():
    """The answer is read under the lock: the next thread's call overwrites the array that this one was given."""
    buffer = np.zeros(1, np.float32)

    def reusing(prompts: Any, completions: Any) -> Any:
        buffer[0] = len(completions[0])
        time.sleep(0.001)
        return buffer

    assert in_threads(CalibratedReward(reusing, TABLE)) == alone()


def says(flag: bool) -> Any:
    """A function that says whether it is thread-safe."""

    def scorer(prompts: Any, completions: Any) -> Any:
        return [0.0] * len(prompts)

    scorer.thread_safe = flag  # type: ignore[attr-defined]
    return scorer


def test_what_is_made_of_scorers_is_thread_safe_if_all_of_them_are():
    """Cost, Ensemble, Function, MeanWin, rewards and combined rewards, of a mixed set and of safe ones."""
    safe, unsafe = says(True), says(False)
    rewards = {flag: CalibratedReward(scorer, TABLE) for flag, scorer in ((True, safe), (False, unsafe))}

    for flag, scorer in ((True, safe), (False, unsafe), (False, lambda p, c: [0.0] * len(p))):
        assert is_thread_safe(Cost(scorer)) is flag
        assert is_thread_safe(partial(scorer)) is flag
        assert is_thread_safe(Ensemble([safe, Cost(scorer)])) is flag
        assert is_thread_safe(Function(scorer, name="mine")) is flag
        assert is_thread_safe(CalibratedReward(scorer, TABLE)) is flag
        assert is_thread_safe(MeanWin(BothOrders(scorer), References.of([("Hi", ["Hello"])]))) is flag
    assert is_thread_safe(CombinedReward({"a": rewards[True], "b": rewards[True]}))
    assert not is_thread_safe(CombinedReward({"a": rewards[True], "b": rewards[False]}))
    assert not is_thread_safe(Ensemble([safe], how=lambda members: members.mean(0)))
    assert is_thread_safe(CalibratedReward(None, TABLE))


def test_what_the_library_says_of_its_own():
    """Servers, the fakes, and models, which take turns by a lock of the model's own."""
    assert is_thread_safe(Remote("http://rm", Native("rm")))
    assert is_thread_safe(HashScorer())
    assert is_thread_safe(NumberScorer())
    assert SequenceClassifier.thread_safe is True


def test_a_model_keeps_its_word_in_threads():
    """Eight threads with inputs of other lengths get the scores that one thread gets."""
    scorer = SequenceClassifier(tiny.classifier(), tiny.tokenizer(template=None))
    texts = ["word " * (1 + i % 7) + str(i) for i in range(32)]
    expected = scorer(["Hi "] * len(texts), texts)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda text: float(score(scorer, ["Hi "], [text])[0]), texts))

    assert np.allclose(found, expected, atol=1e-5)


def test_a_reward_pickles_while_a_thread_is_inside():
    """No lock is part of a reward or of a scorer."""
    reward = CalibratedReward(HashScorer(), TABLE)
    with lock_for(reward.scorer):
        copy = pickle.loads(pickle.dumps(reward))

    assert copy(["p1"], ["x"]) == reward(["p1"], ["x"])


def test_a_forked_process_does_not_wait_for_its_parents_threads():
    """A fork during another thread's call: the child has none of that thread, and takes a lock of its own."""
    entered, leave = threading.Event(), threading.Event()

    def waiting(prompts: Any, completions: Any) -> Any:
        entered.set()
        leave.wait(20)
        return [1.0] * len(prompts)

    caller = threading.Thread(target=score, args=(waiting, ["p"], ["c"]))
    caller.start()
    entered.wait(5)
    leave_in_child = get_context("fork").Process(target=scored_at_once, args=(waiting, leave))
    leave_in_child.start()
    leave_in_child.join(10)
    leave.set()
    caller.join()

    assert leave_in_child.exitcode == 0


def scored_at_once(scorer: Any, leave: threading.Event) -> None:
    """In the child: nobody is inside, so a call goes through."""
    leave.set()
    score(scorer, ["p"], ["c"])
