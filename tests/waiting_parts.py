"""Functions for processes of their own, which wait for files and for one another."""

import os
import sys
import time
from pathlib import Path

DEADLINE = 120.0


def note_and_wait(path: Path) -> None:
    """Write the number of this process into a file, and wait for what will not come."""
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    path.write_text(str(os.getpid()))
    time.sleep(DEADLINE)


def wait_and_fail(path: Path) -> None:
    """Wait until a file is there, then raise, as a part of the demo that fails late."""
    wait_for(path)
    int("three")


def wait_for(path: Path) -> str:
    """Wait until a file has content, and return it."""
    end = time.monotonic() + DEADLINE
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)
    return path.read_text()
