"""Many callers with one item each, served in batches: what a trainer needs that asks for one sample at a time.

>>> lengths = Coalescer(lambda items: [len(item) for item in items])
>>> waiting = [lengths.submit(word) for word in ("a", "bb", "ccc")]
>>> [future.result() for future in waiting]
[1, 2, 3]
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

_alive: "WeakSet[Coalescer]" = WeakSet()


class Full(RuntimeError):
    """More is waiting than there is room for: try again later."""


@dataclass(frozen=True, eq=False)
class Coalescer:
    """Gathers what comes within a few milliseconds, and has it worked on at once, in a thread of its own.

    The thread is there while there is work. An item that the work cannot do fails alone: a batch that fails is halved
    until the item is found.
    """

    work: Callable[[list[Any]], Sequence[Any]]
    """One result for each item."""
    max_batch: int = 64
    max_wait: float = 0.01
    """Seconds that the first item of a batch waits, at most, for others to join it; less if none come."""
    max_queue: int = 8192
    """Items that may wait; one more raises `Full`."""
    _waiting: deque[tuple[Any, "Future[Any]"]] = field(default_factory=deque, init=False, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _working: list[threading.Thread] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1 or not 0 <= self.max_wait < float("inf"):
            raise ValueError(
                "Coalescer needs max_batch, max_queue >= 1 and a finite max_wait >= 0, "
                f"got {self.max_batch}, {self.max_queue} and {self.max_wait}"
            )
        _alive.add(self)

    def submit(self, item: Any) -> "Future[Any]":
        """The result of an item, in time."""
        return self.submit_all([item])[0]

    def submit_all(self, items: Sequence[Any]) -> "list[Future[Any]]":
        """The results of several items, all or none of which are taken."""
        if threading.current_thread() in self._working:
            raise RuntimeError("the work on a batch asks for a batch, and would wait for itself: call the scorer in it")
        futures: list[Future[Any]] = [Future() for _ in items]
        with self._changed:
            if len(self._waiting) + len(items) > self.max_queue:
                raise Full(f"{len(self._waiting)} items are waiting, of at most {self.max_queue}: try again later")
            self._waiting.extend(zip(items, futures, strict=True))
            if items and not self._working:
                thread = threading.Thread(target=self._serve, name="coalescer", daemon=True)
                self._working.append(thread)
                thread.start()
            self._changed.notify_all()
        return futures

    @property
    def waiting(self) -> int:
        """Items that nobody works on yet."""
        return len(self._waiting)

    def _serve(self) -> None:
        while batch := self._next():
            taken = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            self._do(taken)

    def _next(self) -> list[tuple[Any, "Future[Any]"]]:
        """The next batch; none when nothing is left to do, and then this thread is no more."""
        with self._changed:
            deadline = time.monotonic() + self.max_wait
            while 0 < len(self._waiting) < self.max_batch and time.monotonic() < deadline:
                before = len(self._waiting)
                self._changed.wait(min(self.max_wait / 4, deadline - time.monotonic()))
                if len(self._waiting) == before:
                    break
            batch = [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]
            if not batch:
                self._working.clear()
            return batch

    def _do(self, batch: list[tuple[Any, "Future[Any]"]]) -> None:
        error = self._tried(batch) if batch else None
        if error is not None:
            self._divide(batch, error)

    def _divide(self, batch: list[tuple[Any, "Future[Any]"]], error: BaseException) -> None:
        """Find the items that a batch failed for; a server that is away, or an exit, is not for an item."""
        if len(batch) == 1 or isinstance(error, OSError) or not isinstance(error, Exception):
            for _, future in batch:
                future.set_exception(error)
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            self._do(half)

    def _tried(self, batch: list[tuple[Any, "Future[Any]"]]) -> BaseException | None:
        """Work on a batch: its results are given out, or the error comes back."""
        try:
            results = self.work([item for item, _ in batch])
            if len(results) != len(batch):
                raise ValueError(f"a batch of {len(batch)} items gave {len(results)} results")
        except BaseException as error:  # noqa: BLE001 (it is raised where the answer is waited for)
            return error
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
        return None

    def _forget(self) -> None:
        """In a forked process: its parent's thread is not here, and its parent's callers are not ours."""
        for field_, empty in (("_waiting", deque()), ("_working", []), ("_changed", threading.Condition())):
            object.__setattr__(self, field_, empty)


def _after_fork() -> None:
    for coalescer in _alive:
        coalescer._forget()


os.register_at_fork(after_in_child=_after_fork)
