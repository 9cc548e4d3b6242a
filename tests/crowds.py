"""Several processes on one directory: at once, killed, stopped, late, with other settings.

`python tests/crowds.py FOLDER` forks them all, and prints as JSON what each scene came to.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deaths
from deaths import Noted, NotedScorer, note, notes, sampled

from calibrated_rewards.calibration import run as run_module
from calibrated_rewards.calibration.calibrate import calibrate

PROMPTS = [f"prompt {i}" for i in range(12)]
PER_SHARD, K = 2, 4


class Signalled(Noted):
    """A sampler that sends its own process a signal at the second shard that it is given, half way."""

    signal = signal.SIGKILL

    def __call__(self, prompts, seeds):
        """What NumberSampler gives, if the process lives."""
        drawn = super().__call__(prompts, seeds)
        if sum(line["pid"] == os.getpid() for line in notes(self.log) if "sampling" in line) == 2:
            os.kill(os.getpid(), self.signal)
        return drawn


class Stopped(Signalled):
    """Stops, and goes on when it is told to."""

    signal = signal.SIGSTOP


class Patient(Noted):
    """A sampler that waits with its first shard until another process is at its second one."""

    def __call__(self, prompts, seeds):
        """What NumberSampler gives, not before the other has got that far, however busy the machine is."""
        while max(Counter(line["pid"] for line in notes(self.log) if "sampling" in line).values(), default=0) < 2:
            time.sleep(0.01)
        return super().__call__(prompts, seeds)


def work(
    folder: Path,
    sampler: Callable[..., Noted] = Noted,
    prompts: list[str] = PROMPTS,
    k: int = K,
    pause: float = 0.03,
    **options: Any,
) -> None:
    """What each process does; it notes the scores that its table has for each of its prompts."""
    log = f"{folder}.log"
    options |= {"prompts_per_shard": PER_SHARD, "show_progress": False}
    table = calibrate(prompts, sampler(log, pause), NotedScorer(log), folder, k=k, **options)
    note(log, {"pid": os.getpid(), "rows": [table.scores(row).tolist() for row in table.rows(prompts)]})


def start(function: Callable[..., None], *arguments: Any, **options: Any) -> int:
    """Fork; a process that is done, or fails, leaves by its exit code."""
    pid = os.fork()
    if not pid:
        code = deaths.WRONG
        try:
            function(*arguments, **options)
            code = deaths.DONE
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return pid


def ended(*pids: int) -> list[int]:
    """The exit code of each, minus the signal if there was one."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def together(count: int, folder: Path, **options: Any) -> dict[str, Any]:
    """So many processes that begin at the same instant."""
    told, tell = os.pipe()
    pids = [start(_when_told, told, tell, folder, options) for _ in range(count)]
    os.close(tell)
    codes = ended(*pids)
    os.close(told)
    return came_of(folder, codes)


def _when_told(told: int, tell: int, folder: Path, options: dict[str, Any]) -> None:
    os.close(tell)
    os.read(told, 1)
    work(folder, **options)


def came_of(folder: Path, codes: list[int]) -> dict[str, Any]:
    """Exit codes, files, and who sampled what."""
    lines = notes(f"{folder}.log")
    return {
        "codes": codes,
        "temporary": deaths.temporary(folder),
        "sampled": dict(sampled(f"{folder}.log")),
        "at_work": len({line["pid"] for line in lines if "sampling" in line}),
        "rows": {line["pid"]: line["rows"] for line in lines if "rows" in line},
        "files": {name: None if data is None else data.hex() for name, data in deaths.files(folder).items()},
    }


def one_killed(folder: Path) -> dict[str, Any]:
    """Three processes, one of which is killed as it works on its second shard."""
    return came_of(
        folder, ended(start(work, folder, Signalled), start(work, folder, Patient), start(work, folder, Patient))
    )


def one_stopped(folder: Path) -> dict[str, Any]:
    """Two processes, one of which stops at its second shard until the other has done all else, and waits for it."""
    stopped = start(work, folder, Stopped)
    other = start(work, folder, Patient)
    os.waitpid(stopped, os.WUNTRACED)
    while len(sampled(f"{folder}.log")) < len(PROMPTS):
        time.sleep(0.02)
    time.sleep(5 * run_module.PAUSE)
    waits = os.waitpid(other, os.WNOHANG) == (0, 0)
    os.kill(stopped, signal.SIGCONT)
    return {"waits": waits, **came_of(folder, ended(stopped, other))}


def one_late(folder: Path) -> dict[str, Any]:
    """One process after all is done."""
    return came_of(folder, ended(start(work, folder), start(work, folder)) + ended(start(work, folder)))


def other_k(folder: Path) -> dict[str, Any]:
    """Two processes, one of which wants more rollouts."""
    return came_of(folder, ended(start(work, folder, k=2), start(work, folder)))


def other_prompts(folder: Path) -> dict[str, Any]:
    """Two processes, one of which brings more prompts when the other is at work."""
    few = start(work, folder, prompts=PROMPTS[:6])
    while not sampled(f"{folder}.log"):
        time.sleep(0.01)
    return came_of(folder, ended(few, start(work, folder)))


@dataclass(frozen=True)
class Meeting(Noted):
    """A sampler that does not go on before so many processes have begun, each with a shard of its own."""

    count: int = 1

    def __call__(self, prompts, seeds):
        """What NumberSampler gives."""
        drawn, patience = super().__call__(prompts, seeds), time.monotonic() + 30
        while len({line["pid"] for line in notes(self.log) if "sampling" in line}) < self.count:
            time.sleep(0.01)
            if time.monotonic() > patience:
                raise TimeoutError("the others do nothing")
        return drawn


def with_clusters(folder: Path) -> dict[str, Any]:
    """Two processes that have their work done by others, and one that does it itself."""
    lazy = [start(work, folder, cluster=map) for _ in range(2)]
    return came_of(folder, ended(*lazy, start(work, folder)))


class Parent(Noted):
    """A sampler that starts a process of its own, as engines do, and dies."""

    def __call__(self, prompts, seeds):
        """Nothing."""
        note(self.log, {"child": start(time.sleep, 60)})
        os.kill(os.getpid(), signal.SIGKILL)


def one_outlived(folder: Path) -> dict[str, Any]:
    """A process that forks another as it holds a shard, and is killed; the other outlives it."""
    codes = ended(start(work, folder, Parent), start(work, folder))
    for line in notes(f"{folder}.log"):
        if "child" in line:
            os.kill(line["child"], signal.SIGKILL)
    return came_of(folder, codes)


def scenes(folder: Path, races: int = 2) -> dict[str, Any]:
    """All of them."""
    alone = {f"{n} together": together(n, folder / str(n), sampler=partial(Meeting, count=n)) for n in (1, 2, 3)}
    raced = {f"race {i}": together(2, folder / f"race{i}", pause=0.0) for i in range(races)}
    told = (one_killed, one_stopped, one_late, other_k, other_prompts, with_clusters, one_outlived)
    return alone | raced | {scene.__name__: scene(folder / scene.__name__) for scene in told}


if __name__ == "__main__":
    deaths.warm()
    run_module.PAUSE = 0.05
    json.dump(scenes(Path(sys.argv[1]), *map(int, sys.argv[2:])), sys.stdout)
