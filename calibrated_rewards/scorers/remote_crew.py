"""Several requests in flight: threads that work through a list of jobs, and their results as they come."""

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any


@dataclass(frozen=True, eq=False)
class Crew:
    """Threads that live as long as a call.

    Not a pool of concurrent.futures: that one is waited for, at the latest when Python ends, and a request may take
    minutes. After an error or Ctrl-C nobody waits for these, nor do they ask for more.
    """

    work: Callable[[Any], Any]
    """What is done with a job."""
    jobs: Sequence[Any]
    size: int
    """How many work at once."""
    stop: threading.Event
    """Set after an error: whatever waits inside of `work` gives up."""
    close: Callable[[], object]
    """Called after the last of them, wherever that is."""

    def results(self) -> Generator[tuple[int, Any], None, None]:
        """The number of each job and what its work gave; the first trouble ends it."""
        todo: SimpleQueue[int] = SimpleQueue()
        for number in range(len(self.jobs)):
            todo.put(number)
        done: SimpleQueue[Any] = SimpleQueue()
        count = min(self.size, len(self.jobs))
        threads = [threading.Thread(target=self._work, args=(todo, done), daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for _ in self.jobs:
                number, found, trouble = done.get()
                if trouble is not None:
                    raise trouble
                yield number, found
        except BaseException:
            self.stop.set()
            # Whoever still waits for an answer needs what is closed; it is closed after the last of them.
            threading.Thread(target=self._close_after, args=(threads,), daemon=True).start()
            raise
        self._close_after(threads)

    def _work(self, todo: "SimpleQueue[int]", done: "SimpleQueue[Any]") -> None:
        while not self.stop.is_set():
            try:
                number = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((number, self.work(self.jobs[number]), None))
            except BaseException as trouble:  # noqa: BLE001 (it is raised where the results are waited for)
                done.put((number, None, trouble))

    def _close_after(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        self.close()
