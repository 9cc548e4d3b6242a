"""A stop watch for what the library is given to call, in processor time: other work on a machine adds little to it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from calibrated_rewards.scorers.protocol import fingerprint


@dataclass
class Watch:
    """Seconds of processor time by name, added up over threads."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time spent inside."""
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def restart(self) -> None:
        """Forget what was, and begin now."""
        self.seconds.clear()
        self.since = time.process_time(), time.perf_counter()

    def parts(self, rest: str) -> dict[str, float]:
        """The seconds of each part, what is left since the start as `rest`, all of them, and those on the wall."""
        whole, wall = time.process_time() - self.since[0], time.perf_counter() - self.since[1]
        return {**self.seconds, rest: whole - sum(self.seconds.values()), "all": whole, "wall": wall}


@dataclass(frozen=True)
class Watched:
    """A sampler or a scorer by the watch; it says of itself what the one inside says."""

    inner: Any
    watch: Watch
    name: str

    def __call__(self, *given: Any) -> Any:
        """What the one inside gives."""
        with self.watch(self.name):
            return self.inner(*given)

    def fingerprint(self) -> dict[str, Any]:
        """That of the one inside."""
        return fingerprint(self.inner)
