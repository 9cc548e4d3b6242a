"""Training runs to read, to start and to edit: each file is one, and nothing imports them."""

import sys
from typing import Any

from calibrated_rewards.cli.errors import NEEDED, missing_text


def _stopped(kind: Any, error: Any, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
    else:
        sys.__excepthook__(kind, error, traceback)


def _check_libraries(words: list[str]) -> None:
    """Exit with a message where a recipe's libraries are missing: its own imports would end in a traceback."""
    recipe = next((word.rpartition(".")[2] for word in words if word.startswith(f"{__name__}.")), "")
    message = missing_text({*NEEDED.get(recipe, ())})
    if message is not None:
        sys.stderr.write(f"{recipe}: error: {message}\n")
        raise SystemExit(2)


# While `python -m` looks for a recipe the arguments begin with -m. Its imports take seconds, and Ctrl-C in them is no
# error either; later `command.main` sees to it.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _stopped
    _check_libraries(sys.orig_argv)
