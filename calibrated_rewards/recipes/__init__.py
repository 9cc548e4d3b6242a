"""Training runs to read, to start and to edit: each file is one, and nothing imports them."""

import sys
from typing import Any


def _stopped(kind: Any, error: Any, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
    else:
        sys.__excepthook__(kind, error, traceback)


# While `python -m` looks for a recipe the arguments begin with -m. Its imports take seconds, and Ctrl-C in them is no
# error either; later `command.main` sees to it.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _stopped
