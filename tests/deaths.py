"""Runs that end before they are done: killed, interrupted or out of disk at any of the calls that change a file.

`python tests/deaths.py FOLDER RUN:DEATH:EVERY ...` forks a process for every EVERY-th such call of a run, ends it
there, does the run again, and prints as JSON what came of all of them. The process that forks has no threads.
"""

import builtins
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import calibrated_rewards.files as one_step
import calibrated_rewards.table.storage as table_writer
from calibrated_rewards.calibration.calibrate import calibrate, import_rollouts
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import seeds_of
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = [*(f"prompt {i}" for i in range(4)), [{"role": "user", "content": "Hi"}]]
PER_SHARD = 3
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}
DONE, WRONG, INTERRUPTED, FULL, IN_SPITE = 0, 3, 4, 5, 6
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Noted:
    """A sampler that appends to a file which prompts it was given, and takes its time."""

    log: str
    pause: float = 0.0

    def __call__(self, prompts, seeds):
        """What NumberSampler gives."""
        note(self.log, {"pid": os.getpid(), "sampling": [prompt_key(prompt).hex() for prompt in prompts]})
        time.sleep(self.pause)
        return NumberSampler()(prompts, seeds)

    def fingerprint(self):
        """Whatever the file."""
        return {"kind": "noted"}


@dataclass(frozen=True)
class NotedScorer:
    """A scorer that appends to a file how many pairs it was given, and takes its time."""

    log: str
    pause: float = 0.0

    def __call__(self, prompts, completions):
        """What NumberScorer gives."""
        note(self.log, {"pid": os.getpid(), "scoring": len(completions)})
        time.sleep(self.pause)
        return NumberScorer()(prompts, completions)

    def fingerprint(self):
        """Whatever the file."""
        return {"kind": "noted"}


def note(log: str, what: dict[str, Any]) -> None:
    """Append a line, in one call that no other process and no kill can split."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, json.dumps(what).encode() + b"\n")
    os.close(fd)


def notes(log: str) -> list[dict[str, Any]]:
    """All that was appended."""
    return [json.loads(line) for line in Path(log).read_text().splitlines()] if Path(log).exists() else []


def sampled(log: str) -> Counter[str]:
    """How often each prompt was given to the sampler."""
    return Counter(key for line in notes(log) for key in line.get("sampling", ()))


def fresh(folder: str) -> None:
    """A run from nothing."""
    calibrate(PROMPTS, Noted(f"{folder}.log"), NotedScorer(f"{folder}.log"), folder, k=3, **QUIET)


def more(folder: str) -> None:
    """A run, then one with more rollouts, prompts and reward models."""
    if not Path(folder, ".more").exists():
        calibrate(PROMPTS[:2], NumberSampler(), NumberScorer(), folder, k=2, **QUIET)
        Path(folder, ".more").touch()
    calibrate(PROMPTS, NumberSampler(), {"number": NumberScorer(), "hash": HashScorer()}, folder, k=3, **QUIET)


def imported(folder: str) -> None:
    """Rollouts made elsewhere, which get scores of a reward model besides their own."""
    rows = []
    for prompt in PROMPTS:
        drawn = NumberSampler()([prompt], [seeds_of(7, prompt_key(prompt), 0, 3)])[0]
        rows.append({"prompt": prompt, "completions": [r.completion for r in drawn], "score": [1.0, 0.5, 2.0]})
    import_rollouts(rows, folder, {"hash": HashScorer()}, scores={"given": "score"}, **QUIET)


QUIET = {"prompts_per_shard": PER_SHARD, "show_progress": False}
RUNS = {run.__name__: run for run in (fresh, more, imported)}


@dataclass
class Countdown:
    """Ends the process, in one way or another, before the call number `left` that changes a file."""

    left: int
    death: str

    def __call__(self) -> None:
        """One more call is about to be made."""
        self.left -= 1
        if self.left == -1:
            self.die()

    def die(self) -> None:
        """As the death is."""
        if self.death == "full":
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        os.kill(os.getpid(), SIGNALS[self.death])

    def install(self) -> None:
        """Watch this process: what it opens to write, writes, syncs, renames, removes and locks."""
        sys.addaudithook(self._audit)
        os.fsync = lambda fd: self()
        one_step.open = table_writer.open = self._open

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if opened and str(arguments[0]).endswith(".log"):
            return
        if opened or (event in CHANGES and self.death != "full"):
            self()

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if "b" not in mode or "r" in mode:
            return builtins.open(path, mode, **options)
        return Torn(path, mode.replace("b", ""), self)


class Torn(io.FileIO):
    """A file without a buffer, each write of which can end half way."""

    def __init__(self, path: Any, mode: str, count: Countdown) -> None:
        """Open it."""
        super().__init__(path, mode)
        self.count = count

    def write(self, data: Any) -> int:
        """All of it, or half."""
        self.count()
        whole = bytes(data)
        if self.count.left == 0:
            super().write(whole[: len(whole) // 2])
        self.count()
        return super().write(whole)


def warm() -> None:
    """Import what the first use of Arrow imports, once for all children; and do not wait for the disk.

    A kill does not lose what the kernel has: it is a loss of power that fsync is for.
    """
    pa.array(["a"])
    _ = pq.ParquetFile
    os.fsync = lambda fd: None


def child(function: Callable[..., None], *arguments: Any, count: Countdown | None = None) -> int:
    """Run it in a process of its own; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        code = WRONG
        try:
            if count:
                count.install()
            function(*arguments)
            code = DONE if count is None or count.left >= 0 else IN_SPITE
        except KeyboardInterrupt:
            code = INTERRUPTED
        except OSError as error:
            code = FULL if error.errno == ENOSPC else WRONG
        finally:
            if code == WRONG:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder: Path) -> dict[str, bytes | None]:
    """All files of a run, and what is in those that must be the same whenever and by whomever they are made."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    same = ("table.safetensors", "table.json", "run.json")
    return {str(path.relative_to(folder)): path.read_bytes() if path.name in same else None for path in found}


def temporary(folder: Path) -> list[str]:
    """Files that were being written."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.*") if path.is_file()]


def deaths(run: str, death: str, folder: Path, every: int = 1) -> Iterator[dict[str, Any]]:
    """Each `every`-th call of a run as its last, and what is left; then the run again, and what has come of it."""
    whole = folder / "whole"
    assert child(RUNS[run], str(whole)) == DONE
    expected = files(whole)
    for at in itertools.count(0, every):
        path = folder / f"{at:04d}"
        code = child(RUNS[run], str(path), count=Countdown(at, death))
        if code == DONE:
            assert files(path) == expected
            return
        left = temporary(path)
        again = child(RUNS[run], str(path))
        once = Counter({*sampled(f"{path}.log")})
        yield {
            "at": at,
            "code": code,
            "left": left,
            "again": again,
            "identical": files(path) == expected,
            "repeated": (sampled(f"{path}.log") - once).total(),
        }
        shutil.rmtree(path)


if __name__ == "__main__":
    warm()
    found = {}
    for asked in sys.argv[2:]:
        run, death, every = asked.split(":")
        folder = Path(sys.argv[1], f"{run}-{death}")
        folder.mkdir(parents=True)
        found[f"{run}:{death}"] = [*deaths(run, death, folder, int(every))]
    json.dump(found, sys.stdout)
