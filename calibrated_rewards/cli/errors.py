"""Errors on the command line: their settings as options, and every library that is missing at once.

Numbers and folders on the command line, refused in its own words before anything is loaded.

>>> Whole(1)("16"), Real(0.0, 1.0)("0.5")
(16, 0.5)
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from typing import Any

from calibrated_rewards.files import Message

# What brings a library that is missing.
EXTRAS = {
    "hf": ("torch", "transformers", "accelerate", "peft", "jinja2", "safetensors"),
    "http": ("httpx",),
    "calibrate": ("pyarrow",),
    "trl": ("datasets", "trl"),
    "plots": ("matplotlib", "jinja2", "markupsafe"),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "vllm": ("vllm",),
}
# The extras that a command or recipe needs whatever its options are; of those that load models, see `extras_of`.
NEEDED: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate",),
    "evaluate": ("calibrate",),
    "serve": ("serve",),
    "report": ("plots", "calibrate"),
    "demo": ("hf", "calibrate", "trl", "plots"),
    "grpo_plain": ("hf",),
    "ppo": ("hf",),
    "train_grpo": ("hf", "trl", "calibrate"),
    "train_rloo": ("hf", "trl", "calibrate"),
}
OPTIONS = {
    "column": "--column NAME",
    "id_column": "--id-column NAME",
    "insecure": "--insecure",
    "kind": "--kind {value}",
    "labels": "--label HOW, such as 3, 1-0, expected:1,2,3 or weighted:1,-0.5",
    "limit": "--limit",
    "max_length": "--max-length {value}",
    "on_missing": "--on-missing {value}",
    "prompts": "--prompts FILE",
    "reference_free": "--option reference_free=true",
    "sampler": "--policy PATH|ID|URL",
    "scorer": "--reward-model PATH|ID|URL",
    "scores": "--scores COLUMN",
    "select": "--select {value}",
    "split": "--split {value}",
    "template": "--chat-template FILE",
    "tokenizer": "--option tokenizer=PATH (of a policy: --policy-tokenizer PATH)",
    "trust_remote_code": "--trust-remote-code (of a policy: --policy-trust-remote-code)",
}


def error_text(error: BaseException, other: str = "--option {name}={value}", extras: Iterable[str] = ()) -> str:
    """An error in the words of the command line.

    `other` is how settings without an entry in OPTIONS are said. Where a library is missing, all that are missing of
    `extras` are named with it.

    >>> from calibrated_rewards.files import setting
    >>> error_text(ValueError(Message(f"the prompts' column is not known: name it with {setting('column')}")))
    "the prompts' column is not known: name it with --column NAME"
    """
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        needed = {extra for extra, libraries in EXTRAS.items() if library in libraries}
        message = missing_text({*needed, *extras}, library) if needed else None
        if message is not None:
            return message
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    first = error.args[0] if error.args else ""
    text = first.with_options(OPTIONS, other) if isinstance(first, Message) else str(error)
    return text.strip("\n") or type(error).__name__


def extras_of(command: str, options: argparse.Namespace) -> set[str]:
    """The extras that a command needs with these options: for models here, for servers, for figures, for a cluster."""
    named = ("policy", "reference", "reward_model", "judge")
    given = [value for name in named for value in _listed(getattr(options, name, None))]
    urls = [any(part.startswith(("http://", "https://")) for part in (each, each.partition("=")[2])) for each in given]
    extras = {*NEEDED.get(command, ())}
    extras |= {"http"} if any(urls) else set()
    extras |= {"hf"} if not all(urls) else set()
    extras |= {"plots"} if getattr(options, "plot", None) is not None else set()
    extras |= {"ray"} if getattr(options, "ray", None) is not None else set()
    return extras


def missing_text(extras: set[str], library: str | None = None) -> str | None:
    """What to install for all libraries of some extras that are not there; None where all are."""
    lacking = {extra: [each for each in EXTRAS[extra] if _is_missing(each) or each == library] for extra in extras}
    libraries = sorted({each for own in lacking.values() for each in own})
    if not libraries:
        return None
    names = ",".join(sorted(extra for extra, own in lacking.items() if own))
    verb = "is" if len(libraries) == 1 else "are"
    return f"needs {', '.join(libraries)}, which {verb} not installed: pip install 'calibrated-rewards[{names}]'"


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _is_missing(library: str) -> bool:
    try:
        return find_spec(library) is None
    except ValueError:  # in sys.modules without a spec, as in tests
        return True


@dataclass(frozen=True)
class Whole:
    """A whole number that is not too small; argparse calls it."""

    least: int
    most: int | None = None

    def __call__(self, text: str) -> int:
        """Read one."""
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < self.least or (self.most is not None and number > self.most):
            upto = "" if self.most is None else f", {self.most} at most"
            raise argparse.ArgumentTypeError(f"needs a whole number >= {self.least}{upto}, got {text!r}")
        return number


@dataclass(frozen=True)
class Real:
    """A finite number from one to another, or above the first alone."""

    least: float
    most: float = inf
    above: bool = False
    """Whether the least itself is refused."""

    def __call__(self, text: str) -> float:
        """Read one."""
        try:
            number = float(text)
        except ValueError:
            number = inf
        if not isfinite(number) or not self.least <= number <= self.most or (self.above and number == self.least):
            upto = "" if self.most == inf else f" and <= {self.most:g}"
            sign = ">" if self.above else ">="
            raise argparse.ArgumentTypeError(f"needs a number {sign} {self.least:g}{upto}, got {text!r}")
        return number


def folder(text: str) -> Path:
    """A folder that is written; "", what an unset variable of a shell comes to, would be the current one.

    >>> folder("table/").name
    'table'
    """
    if not text:
        raise argparse.ArgumentTypeError("needs a folder, got ''; the current one is .")
    return Path(text)
