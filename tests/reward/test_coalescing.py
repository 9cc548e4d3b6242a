"""Single calls become batches: all answered, each with its own, and what fails fails alone."""

import os
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jaxtyping
import pytest

from calibrated_rewards.reward.batching import Coalescer, Full


def squares(items: list[int]) -> list[int]:
    if any(item < 0 for item in items):
        raise ValueError(f"no square of {min(items)}")
    return [item * item for item in items]


def test_many_callers_get_their_own_answers() -> None:
    """Sixty-four threads, a hundred calls each, and far fewer batches than calls."""
    sizes: list[int] = []

    def work(items: list[int]) -> list[int]:
        sizes.append(len(items))
        time.sleep(1e-3)
        return squares(items)

    coalescer = Coalescer(work, max_batch=32)

    def caller(number: int) -> list[int]:
        return [coalescer.submit(1000 * number + i).result() for i in range(20)]

    with ThreadPoolExecutor(64) as pool:
        found = [*pool.map(caller, range(64))]

    assert found == [[(1000 * number + i) ** 2 for i in range(20)] for number in range(64)]
    assert max(sizes) <= 32
    assert sum(sizes) == 64 * 20
    assert len(sizes) < 64 * 20 / 8


def test_an_item_that_fails_fails_alone() -> None:
    """Those that came in its batch are answered, whichever place it has among them."""
    gate, first = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        first.set()
        gate.wait(10)
        return squares(items)

    coalescer = Coalescer(work, max_batch=16, max_wait=0.0)
    futures = {0: coalescer.submit(0)}
    first.wait(10)
    futures |= {item: coalescer.submit(item) for item in (1, 2, -3, 4, 5, -6, 7)}
    gate.set()

    for item, future in futures.items():
        if item < 0:
            with pytest.raises(ValueError, match=f"no square of {item}"):
                future.result(10)
        else:
            assert future.result(10) == item * item


def test_a_server_that_is_away_is_asked_once() -> None:
    """It is not for an item that it does not answer."""
    calls: list[int] = []

    def away(items: list[int]) -> list[int]:
        calls.append(len(items))
        raise ConnectionError("nobody is there")

    futures = Coalescer(away).submit_all(list(range(64)))
    for future in futures:
        with pytest.raises(ConnectionError):
            future.result(10)
    assert calls == [64]


def test_work_that_asks_for_itself_is_an_error() -> None:
    """It would wait for the batch that it is itself working on."""
    loop: list[Coalescer] = []
    loop.append(Coalescer(lambda items: [loop[0].submit(item).result() for item in items]))
    with pytest.raises(RuntimeError, match="would wait for itself"):
        loop[0].submit(1).result(10)


def test_a_forked_process_has_a_queue_of_its_own() -> None:
    """Its parent's thread is not there, whatever that was in the midst of."""
    begun = threading.Event()

    def slow(items: list[int]) -> list[int]:
        begun.set()
        time.sleep(0.2)
        return squares(items)

    coalescer = Coalescer(slow, max_wait=0.0)
    mine = coalescer.submit_all([1, 2])
    begun.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
        child = os.fork()
    if child == 0:
        found = 1
        try:
            found = 0 if coalescer.submit(3).result(20) == 9 else 2
        finally:
            os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [future.result(10) for future in mine] == [1, 4]


def test_a_full_queue_says_so_and_takes_all_or_nothing() -> None:
    """What is one too many is refused at once; what was accepted is answered."""
    gate, first = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        first.set()
        gate.wait(10)
        return squares(items)

    coalescer = Coalescer(work, max_queue=4, max_wait=0.0)
    working = coalescer.submit(9)
    first.wait(10)
    taken = coalescer.submit_all([1, 2, 3])
    with pytest.raises(Full, match="3 items are waiting, of at most 4"):
        coalescer.submit_all([4, 5])
    assert coalescer.waiting == 3
    gate.set()
    assert [future.result(10) for future in [working, *taken]] == [81, 1, 4, 9]


def test_a_cancelled_item_is_left_out() -> None:
    """Whoever gave up waiting costs no work."""
    gate, first = threading.Event(), threading.Event()
    seen: list[int] = []

    def work(items: list[int]) -> list[int]:
        first.set()
        gate.wait(10)
        seen.extend(items)
        return squares(items)

    coalescer = Coalescer(work, max_wait=0.0)
    kept: list[Future[Any]] = [coalescer.submit(1)]
    first.wait(10)
    assert coalescer.submit(2).cancel()
    kept.append(coalescer.submit(3))
    gate.set()
    assert [future.result(10) for future in kept] == [1, 9]
    assert seen == [1, 3]


def test_work_that_forgets_an_item_is_an_error() -> None:
    """Answers that cannot be told apart are nobody's."""
    coalescer = Coalescer(lambda items: [])
    with pytest.raises(ValueError, match="gave 0 results"):
        coalescer.submit(1).result(10)


def test_no_thread_stays_when_nothing_is_left() -> None:
    """And a new one comes with the next item."""
    coalescer = Coalescer(squares)
    for item in range(3):
        assert coalescer.submit(item).result(10) == item * item
        deadline = time.monotonic() + 10
        while any(thread.name == "coalescer" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
    assert coalescer.submit_all([]) == []


def test_settings_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room, no batch, no time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for wrong in ({"max_batch": 0}, {"max_queue": 0}, {"max_wait": -1.0}, {"max_wait": float("inf")}):
        with pytest.raises(ValueError, match="Coalescer needs"):
            Coalescer(squares, **wrong)
