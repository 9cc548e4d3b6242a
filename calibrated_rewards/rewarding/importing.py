"""Import a function that a file names, from installed modules and PYTHONPATH, never from the current folder.

A module that lies where a command is run, beside a reward.json that names it, may be anybody's. Python puts that folder
in front of its path for `python -m`, for `python -c` and in a notebook, not for a console script.

>>> import_function("json:dumps")([1])
'[1]'
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

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
