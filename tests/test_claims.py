"""Claims: one holder at a time, whatever becomes of it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from calibrated_rewards.files import claim

HOLDER = """
import sys
from pathlib import Path
from calibrated_rewards.files import claim
with claim(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""

# Forks twice as it holds the claim: once it then leaves the block, once it is killed in it.
FORKER = """
import os, signal, sys, time
from pathlib import Path
from calibrated_rewards.files import claim

def fork():
    child = os.fork()
    if not child:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    return child

file = Path(sys.argv[1])
with claim(file):
    first = fork()
with claim(file) as free_again:
    print(free_again, first, fork(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Its child opens another file in the block, which gets the number of the claim's, and leaves.
LEAVER = """
import os, sys
from pathlib import Path
from calibrated_rewards.files import claim

file = Path(sys.argv[1])
with claim(file):
    child = os.fork()
    if not child:
        other = os.open(file, os.O_RDWR)
    else:
        os.waitpid(child, 0)
    if child:
        with claim(file) as ours:
            print(ours, flush=True)
if not child:
    os.write(1, b"still ") if os.fstat(other) else None
    os._exit(0)
"""


@pytest.fixture
def file(tmp_path):
    """What is claimed."""
    (tmp_path / "file").touch()
    return tmp_path / "file"


def holder(file):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline()


def held(file):
    with claim(file) as ours:
        return ours


def test_a_claim_is_of_one_and_ends_with_it(file):
    """Another process is refused while the first lives, and not when it is killed."""
    assert held(file)
    process, answer = holder(file)
    with process:
        assert answer == "True\n"
        assert not held(file)
        process.kill()
        process.wait()
    assert held(file)


def test_a_claim_ends_with_its_block(file):
    """Also in this process, and by an error."""
    with claim(file) as ours:
        assert ours
        assert not held(file)
    assert held(file)
    with pytest.raises(ZeroDivisionError), claim(file):
        1 / 0  # noqa: B018 (an error in the block)
    assert held(file)


def test_who_waits_is_next(file):
    """With wait=True the claim comes when the holder goes."""
    come = threading.Event()

    def waits():
        with claim(file, wait=True) as ours:
            assert ours
            come.set()

    with claim(file):
        thread = threading.Thread(target=waits)
        thread.start()
        assert not come.wait(0.05)
    assert come.wait(10)
    thread.join()


def test_children_hold_no_claims(file):
    """The lock of a process that forked ends with its block, and with itself, though its child lives on."""
    forker = subprocess.Popen([sys.executable, "-c", FORKER, str(file)], stdout=subprocess.PIPE, text=True)
    with forker:
        free_again, *children = forker.stdout.readline().split()
        assert forker.wait() == -signal.SIGKILL
        try:
            assert free_again == "True"
            patience = time.monotonic() + 10  # the child lets go when it first runs
            while not held(file):
                assert time.monotonic() < patience
        finally:
            for child in children:
                os.kill(int(child), signal.SIGKILL)


def test_a_child_that_leaves_the_block_ends_nothing(file):
    """What it closes there is not what its parent holds, nor another file of its own."""
    forker = subprocess.run([sys.executable, "-c", LEAVER, str(file)], capture_output=True, text=True, check=False)
    assert forker.stdout.split() == ["still", "False"], forker.stderr


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    """A claim on a shard that somebody took back is an error, and no empty shard."""
    with pytest.raises(FileNotFoundError), claim(tmp_path / "gone"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_everybody_goes_ahead(file, monkeypatch):
    """A file system that refuses locks: told, and everything is everyone's."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="without locks"), claim(file) as ours:
        assert ours
