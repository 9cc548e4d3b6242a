"""Score single completions in batches: callers in many threads or tasks share one call of the reward model.

`score_one`, `ascore_one` and `ascore` serve trainers that ask for one sample at a time; `Coalescer` makes batches.

>>> lengths = Coalescer(lambda items: [len(item) for item in items])
>>> futures = [lengths.submit(word) for word in ("a", "bb", "ccc")]
>>> [future.result() for future in futures]
[1, 2, 3]
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from calibrated_rewards.prompts import Completion
from calibrated_rewards.reward.lookup import Score, Scores
from calibrated_rewards.scorers.protocol import check_pairs

if TYPE_CHECKING:
    from calibrated_rewards.reward.combined import Reward

_alive: "WeakSet[Coalescer]" = WeakSet()


class Full(RuntimeError):
    """The queue has no room for more items: try again later."""


@dataclass(frozen=True, eq=False)
class Coalescer:
    """Collects items for a few milliseconds, and works on them as one batch in a thread of its own.

    The thread lives while there is work. An item that the work cannot do fails alone: a batch that fails is halved
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
        """Queue one item for a future of its result."""
        return self.submit_all([item])[0]

    def submit_all(self, items: Sequence[Any]) -> "list[Future[Any]]":
        """Queue several items, all or none, for a future of each result."""
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
        """Number of items that are queued and not worked on yet."""
        return len(self._waiting)

    def _serve(self) -> None:
        while batch := self._next():
            running = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            if running:
                self._work_on(running)

    def _next(self) -> list[tuple[Any, "Future[Any]"]]:
        """Take the next batch; an empty one when nothing is left to do, and then this thread ends."""
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

    def _work_on(self, batch: list[tuple[Any, "Future[Any]"]]) -> None:
        """Work on a batch and set its results; halve a batch that fails, until the items that fail are alone."""
        try:
            results = self.work([item for item, _ in batch])
            if len(results) != len(batch):
                raise ValueError(f"a batch of {len(batch)} items gave {len(results)} results")
        except BaseException as error:  # noqa: BLE001 (it is raised where the answer is waited for)
            # A server that is away, or an exit, is no fault of an item.
            if len(batch) == 1 or isinstance(error, OSError) or not isinstance(error, Exception):
                for _, future in batch:
                    future.set_exception(error)
                return
        else:
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
            return
        middle = len(batch) // 2
        self._work_on(batch[:middle])
        self._work_on(batch[middle:])

    def _forget(self) -> None:
        """Start empty in a forked process, which has neither its parent's thread nor its callers."""
        for name, empty in (("_waiting", deque()), ("_working", []), ("_changed", threading.Condition())):
            object.__setattr__(self, name, empty)


def _after_fork() -> None:
    for coalescer in _alive:
        coalescer._forget()


os.register_at_fork(after_in_child=_after_fork)


def score_one(reward: "Reward", prompt: Any, completion: Completion, id: Any = None) -> Score:  # noqa: A002
    """Score one completion; threads that ask at the same time share a batch."""
    score: Score = coalescer_of(reward).submit((prompt, completion, id)).result()
    return score


async def ascore_one(
    reward: "Reward",
    prompt: Any,
    completion: Completion,
    id: Any = None,  # noqa: A002
) -> Score:
    """`score_one` for asyncio: tasks that ask at the same time share a batch, and the event loop goes on."""
    score: Score = await asyncio.wrap_future(coalescer_of(reward).submit((prompt, completion, id)))
    return score


async def ascore(
    reward: "Reward",
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    ids: Sequence[Any] | None = None,
) -> Scores:
    """`reward.score` for asyncio: tasks that ask at the same time share batches, and the event loop goes on."""
    prompts, completions = check_pairs(prompts, completions)
    coalescer = coalescer_of(reward)
    if len(prompts) > coalescer.max_batch:
        return await asyncio.to_thread(reward.score, prompts, completions, ids, watch=True)
    ids = [None] * len(prompts) if ids is None else list(ids)
    futures = coalescer.submit_all(list(zip(prompts, completions, ids, strict=True)))
    return Scores.of(await asyncio.gather(*map(asyncio.wrap_future, futures)))


def coalescer_of(reward: "Reward") -> Coalescer:
    """The coalescer of a reward: it is kept in the instance, ends with it, and is neither copied nor pickled."""
    attributes = vars(reward)
    if "_coalescer" not in attributes:
        attributes.setdefault("_coalescer", Coalescer(partial(_score_items, reward)))
    coalescer: Coalescer = attributes["_coalescer"]
    return coalescer


def _score_items(reward: "Reward", items: list[tuple[Any, Completion, Any]]) -> list[Score]:
    prompts, completions, ids = (list(column) for column in zip(*items, strict=True))
    return [*reward.score(prompts, completions, ids, watch=True)]
