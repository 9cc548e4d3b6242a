"""Claims: which of several processes, on any machines that share a folder, works on what.

A claim is a lock on a file (flock). It ends with the process that holds it, however that ends, so nobody waits for the
dead; one that is stopped keeps its claim, and goes on with it. Children that a process forks do not hold its claims.

On NFS the server keeps the locks, and a machine that vanishes loses its own when its lease ends, after a minute or two.
Where a file system knows no locks everything is claimed by everyone: work is done twice, and nothing goes wrong.
"""

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TAKEN = {errno.EACCES, errno.EAGAIN}
_held: set[int] = set()


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the file, which exists, for the time of the block; gives whether we do. With `wait`, until we do."""
    fd = os.open(path, os.O_RDWR)  # to write, since NFS asks that of an exclusive lock
    _held.add(fd)
    try:
        yield _locked(fd, path, wait)
    finally:
        # In a forked child it is closed already, and the number may be another file's.
        if fd in _held:
            _held.remove(fd)
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was just forked may not have let go yet
            os.close(fd)


def _locked(fd: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        warnings.warn(
            f"{path.parent} is on a file system without locks ({error.strerror}): with several processes, work is "
            "done more than once, though its result is the same",
            stacklevel=3,
        )
    return True


def _let_go() -> None:
    """In a child: a lock lasts as long as anybody has its file open, and an engine's child may outlive its parent."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
