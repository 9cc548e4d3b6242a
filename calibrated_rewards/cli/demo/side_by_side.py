"""Run functions side by side, each in a process of its own, and show what they say.

Where a model is as small as the demo's, two threads of one process are hardly faster than one; two processes of one
thread are. The functions keep their results in files.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Seconds from one look at the processes to the next, and until one that was asked to stop is killed.
LOOK, PATIENCE = 0.5, 20.0
# The ending of the file with an error's traceback, beside the log.
ERROR = ".error"


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def silence_loading() -> None:
    """Turn off the progress bars and reports of transformers, which are about many small loads."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run_side_by_side(parts: Mapping[str, Callable[[], object]], folder: Path, processes: int) -> None:
    """Run all parts, at most so many at a time; with one process, in this one, one after the other.

    What a part says comes with its name before each line, and is kept in the folder. If one fails, or this process is
    interrupted, the others are stopped as by Ctrl-C.
    """
    if processes < 2 or len(parts) < 2:
        for do in parts.values():
            do()
        return
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, count_cores() // processes)
    waiting, running = dict(parts), list[Part]()
    try:
        while waiting or running:
            for name in [*waiting][: processes - len(running)]:
                running.append(Part.start(name, waiting.pop(name), folder / f"{name}.log", threads))
            time.sleep(LOOK)
            ended = [part for part in running if not part.process.is_alive()]
            for part in running:
                part.show()
            for part in ended:
                part.check()
            running = [part for part in running if part not in ended]
    except BaseException:
        for part in running:
            part.stop()
        raise


@dataclass
class Part:
    """A function that runs in another process, and the file of what it says."""

    name: str
    process: BaseProcess
    log: Path
    shown: int = 0
    """Characters of the log that were shown."""

    @classmethod
    def start(cls, name: str, do: Callable[[], object], log: Path, threads: int) -> "Part":
        """Start the process; what an earlier one said is lost."""
        log.write_text("")
        log.with_suffix(ERROR).unlink(missing_ok=True)
        process = get_context("spawn").Process(target=run_part, args=(do, log, threads))
        process.start()
        return cls(name, process, log)

    def show(self) -> None:
        """Show the whole lines that were written since the last time."""
        text = self.log.read_text(errors="replace")
        end = text.rfind("\n") + 1
        sys.stderr.write("".join(f"{self.name}: {line}\n" for line in text[self.shown : end].splitlines()))
        sys.stderr.flush()
        self.shown = max(self.shown, end)

    def check(self) -> None:
        """Raise RuntimeError if the process has failed."""
        if self.process.exitcode:
            error = self.log.with_suffix(ERROR)
            if error.exists():
                raise RuntimeError(f"{self.name} failed: {error.read_text().splitlines()[-1]}; see {error}")
            raise RuntimeError(f"{self.name} ended with {self.process.exitcode}; what it said is in {self.log}")

    def stop(self) -> None:
        """Interrupt the process as Ctrl-C does, which loses nothing that is saved."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGINT)
            self.process.join(PATIENCE)
            self.process.kill()


def run_part(do: Callable[[], object], log: Path, threads: int) -> None:
    """Run a function with so many threads; what it and its libraries write goes to the log."""
    import torch

    torch.set_num_threads(threads)
    silence_loading()
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        do()
    except BaseException as error:
        log.with_suffix(ERROR).write_text(traceback.format_exc())
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """End at once where the process that started this one is gone: nobody would see the end."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
