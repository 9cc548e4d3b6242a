"""Call a scorer from one thread at a time, unless it says that several may call it at once.

A scorer says so by an attribute, `thread_safe = True`. Every call that goes through `scorers.score` comes by here:
those of `CalibratedReward`, of `calibrate` and of the members of an ensemble.
"""

import os
import threading
from functools import partial
from weakref import WeakValueDictionary


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
