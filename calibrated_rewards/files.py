"""Write files in one step, lock them, and read or word what files and settings name.

`replace_file` and `write_file` replace a file in one step. `claim` holds a file for one of several processes.
`check_folder_name` refuses a name that no folder should have. `import_function` imports what a file names.

`Message` is an error message with marked settings: callers from Python read keyword arguments, users of the command
line read options.

>>> message = Message(f"the file has no splits: leave out {setting('split', 'train')}")
>>> str(ValueError(message))
'the file has no splits: leave out split=train'
>>> message.with_options({"split": "--split {value}"})
'the file has no splits: leave out --split train'
"""

import errno
import os
import re
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

# The name of a reward model or of a policy, each of which has a folder.
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` once the block has ended and its bytes are on the disk.

    A reader sees the old file or the new one, whatever happens. If the block fails, the old file stays.
    """
    path = Path(path)
    with open_temporary_file(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(file.name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def open_temporary_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file beside `path`, removed at the end if it was not moved; errors of the disk name `path`."""
    name = path.parent / f".{path.name}.{uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(name, "xb") as file:
            yield file
    except OSError as error:  # a full disk does not say of which file
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(path)) from error
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file in one step; text as UTF-8."""
    with replace_file(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def check_folder_name(name: Any, whose: str, reserved: Collection[str] = ()) -> None:
    """Refuse a name that cannot be that of a folder; `reserved` are names, in lower case, of files and folders of ours.

    >>> check_folder_name("../x", "a policy")
    Traceback (most recent call last):
        ...
    ValueError: the name of a policy is that of its folder: letters, digits, ... at most; got '../x'
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of {whose} is a str, for it is that of its folder; got {name!r:.120}")
    if not FOLDER_NAME.fullmatch(name) or name.lower() in reserved:
        rule = f"the name of {whose} is that of its folder: letters, digits, '.', '_' and '-', a hundred at most"
        others = f", and none of {', '.join(map(repr, reserved))}" if reserved else ""
        raise ValueError(f"{rule}{others}; got {name!r:.120}")


# Open files that this process has claimed.
_claimed: set[int] = set()


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold an existing file for the block, and give whether this process does; `wait` until it does.

    The claim is a lock (flock) that ends with the process, however that ends: nobody waits for the dead, and a process
    that is stopped keeps its claim. Children that it forks do not hold it. On NFS the server keeps the locks, and a
    machine that vanishes loses its own when its lease ends, after a minute or two. On a file system without locks
    everything is claimed by everyone: work is done twice, and nothing goes wrong.
    """
    fd = os.open(path, os.O_RDWR)  # to write, since NFS asks that of an exclusive lock
    _claimed.add(fd)
    try:
        yield _lock_or_warn(fd, path, wait)
    finally:
        # In a forked child it is closed already, and the number may be another file's.
        if fd in _claimed:
            import fcntl

            _claimed.remove(fd)
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was just forked may not have let go yet
            os.close(fd)


def lock_file(fd: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another has it, OSError where a file system has no locks."""
    import fcntl  # Windows has none, and can import this file

    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _lock_or_warn(fd: int, path: Path, wait: bool) -> bool:
    try:
        return lock_file(fd, wait=wait)
    except OSError as error:
        warnings.warn(
            f"{path.parent} is on a file system without locks ({error.strerror}): with several processes, work is "
            "done more than once, though its result is the same",
            stacklevel=3,
        )
    return True


def _release_claims() -> None:
    """Close all claimed files in a child: a lock lasts while any process has its file open, and a child may live on."""
    while _claimed:
        os.close(_claimed.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_claims)


# Around a setting and before an option of its own: characters that no text of ours or of a user's has.
START, OPTION, END = "\x02", "\x04", "\x03"
SETTING = re.compile(f"{START}([^=]*)=([^{OPTION}]*){OPTION}([^{END}]*){END}")


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
        message = super().__new__(cls, SETTING.sub(r"\1=\2", marked))
        message.marked = marked
        return message

    def with_options(self, options: Mapping[str, str], other: str = "--option {name}={value}") -> str:
        """Return the message with an option for each setting; `other` is the form of one without an entry."""
        parts = SETTING.split(self.marked)
        text = parts[0]
        for name, value, template, rest in zip(*(parts[at::4] for at in range(1, 5)), strict=True):
            option = template or options.get(name, other)
            option = option.replace("{name}", name).replace("{flag}", name.replace("_", "-"))
            text += option.replace("{value}", value or "...") + rest
        return text


_SEARCHING = threading.Lock()
# Set when the entry that `python -m` added is gone for good.
_LEFT = threading.Event()


def import_function(place: str) -> Any:
    """Import the object at `module:name`, a dotted name inside the module, but never from the current folder.

    A module in the folder where a command runs, beside a reward.json that names it, may be anybody's, and Python
    searches that folder first under `python -m`, under `python -c` and in a notebook.

    >>> import_function("json:dumps")([1])
    '[1]'
    """
    module, _, path = place.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        raise ValueError(f"a function that is saved is module:name, got {place!r:.80}")
    try:
        with without_current_folder():
            target: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the function {place} cannot be imported ({error}); the current folder is not searched: install the "
            "module, or put its folder into PYTHONPATH"
        ) from error
    for name in path.split("."):
        target = getattr(target, name)
    return target


def leave_current_folder() -> None:
    """Remove from sys.path the folder that `python -m` put in front: a torch.py that lies there would be imported."""
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    _LEFT.set()


@contextmanager
def without_current_folder() -> Iterator[None]:
    """Search sys.path without the entries that Python added for the current folder; modules loaded already stay."""
    with _SEARCHING:
        entries = _find_current_folder()
        for at in reversed(entries):
            del sys.path[at]
        try:
            yield
        finally:
            for at, entry in entries.items():
                sys.path.insert(at, entry)


def _find_current_folder() -> dict[int, str]:
    """Find the entries of sys.path by index: relative ones, and under `python -m` the first that is this folder.

    A later one, of PYTHONPATH or an editable install, was added on purpose. Of a script, the first is its own folder.
    """
    here = os.path.realpath(os.curdir)
    same = [(at, entry) for at, entry in enumerate(sys.path) if os.path.realpath(entry or os.curdir) == here]
    relative = {at: entry for at, entry in same if not os.path.isabs(entry)}
    by_module = getattr(sys.modules.get("__main__"), "__spec__", None) is not None
    added = by_module and not sys.flags.safe_path and not _LEFT.is_set()
    first = [(at, entry) for at, entry in same if os.path.isabs(entry)][:1] if added else []
    return {**relative, **dict(first)}
