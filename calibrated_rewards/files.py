"""Error messages that name settings: as keyword arguments for callers from Python, as options on the command line.

An error is worded where it is raised, once; only the settings in it are marked, and each audience reads its own names.

>>> message = Message(f"the file has no splits: leave out {setting('split', 'train')}")
>>> str(ValueError(message))
'the file has no splits: leave out split=train'
>>> message.with_options({"split": "--split {value}"})
'the file has no splits: leave out --split train'

Claims: which of several processes, on any machines that share a folder, works on what.

A claim is a lock on a file (flock). It ends with the process that holds it, however that ends, so nobody waits for the
dead; one that is stopped keeps its claim, and goes on with it. Children that a process forks do not hold its claims.

On NFS the server keeps the locks, and a machine that vanishes loses its own when its lease ends, after a minute or two.
Where a file system knows no locks everything is claimed by everyone: work is done twice, and nothing goes wrong.

Import a function that a file names, from installed modules and PYTHONPATH, never from the current folder.

A module that lies where a command is run, beside a reward.json that names it, may be anybody's. Python puts that folder
in front of its path for `python -m`, for `python -c` and in a notebook, not for a console script.

>>> import_function("json:dumps")([1])
'[1]'
"""

import errno
import fcntl
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# Around a setting, and before an option of its own: characters that no text of ours or of a user's has.
START, OPTION, END = "\x02", "\x04", "\x03"
MARKS = re.compile(f"{START}|{OPTION}[^{END}]*{END}|{END}")


def setting(name: str, value: str = "", *, option: str = "") -> str:
    """Mark a keyword argument for `Message`; `option` is how the command line says this value, if not as all others.

    >>> Message(f"say {setting('cost', 'False', option='--no-cost')}").with_options({"cost": "--cost"})
    'say --no-cost'
    """
    return f"{START}{name}={value}{OPTION}{option}{END}"


class Message(str):
    """The message of an error; as a string it is the one for Python, without marks."""

    marked: str

    def __new__(cls, marked: str) -> "Message":
        """Make it of a text in which settings are marked."""
        message = super().__new__(cls, MARKS.sub("", marked))
        message.marked = marked
        return message

    def with_options(self, options: Mapping[str, str], other: str = "--option {name}={value}") -> str:
        """The message with an option for each setting; `other` is the form of one without an entry."""
        first, *rest = self.marked.split(START)
        parts = [first]
        for each in rest:
            named, _, text = each.partition(END)
            keyword, _, own = named.partition(OPTION)
            name, _, value = keyword.partition("=")
            option = (own or options.get(name, other)).replace("{name}", name).replace("{flag}", name.replace("_", "-"))
            parts += [option.replace("{value}", value or "..."), text]
        return "".join(parts)


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


_SEARCHING = threading.Lock()
# Set when the entry that `python -m` added is gone for good.
_LEFT = threading.Event()


def import_function(place: str) -> Any:
    """The object at `module:name`, a dotted name inside the module."""
    module, _, path = place.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        raise ValueError(f"a function that is saved is module:name, got {place!r:.80}")
    try:
        with without_current_folder():
            found: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the function {place} cannot be imported ({error}); the current folder is not searched: install the "
            "module, or put its folder into PYTHONPATH"
        ) from error
    for name in path.split("."):
        found = getattr(found, name)
    return found


def leave_current_folder() -> None:
    """Take out of sys.path what `python -m` put in front: a torch.py that lies there would be imported by a command."""
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    _LEFT.set()


@contextmanager
def without_current_folder() -> Iterator[None]:
    """Search sys.path without the entries that Python added for the current folder; modules loaded already stay."""
    with _SEARCHING:
        entries = _of_current_folder()
        for at in reversed(entries):
            del sys.path[at]
        try:
            yield
        finally:
            for at, entry in entries.items():
                sys.path.insert(at, entry)


def _of_current_folder() -> dict[int, str]:
    """Places in sys.path: relative entries, and under `python -m` the first that is this folder.

    A later one, of PYTHONPATH or an editable install, was asked for by name. Of a script, the first is its own folder.
    """
    here = os.path.realpath(os.curdir)
    same = [(at, entry) for at, entry in enumerate(sys.path) if os.path.realpath(entry or os.curdir) == here]
    relative = {at: entry for at, entry in same if not os.path.isabs(entry)}
    by_module = getattr(sys.modules.get("__main__"), "__spec__", None) is not None
    added = by_module and not sys.flags.safe_path and not _LEFT.is_set()
    first = [(at, entry) for at, entry in same if os.path.isabs(entry)][:1] if added else []
    return {**relative, **dict(first)}
