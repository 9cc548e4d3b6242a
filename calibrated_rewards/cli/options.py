"""Options that several commands share: numbers, folders, names with values, prompts, a run's folder, a saved reward.

>>> Whole(1)("16"), Real(0.0, 1.0)("0.5")
(16, 0.5)
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from calibrated_rewards.reward.saving import NeedsTrust

if TYPE_CHECKING:
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward

Group: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"


@dataclass(frozen=True)
class Whole:
    """The type of an option that is a whole number from `least` to `most`."""

    least: int
    most: int | None = None

    def __call__(self, text: str) -> int:
        """Parse the number, or raise argparse's error."""
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < self.least or (self.most is not None and number > self.most):
            limit = "" if self.most is None else f", {self.most} at most"
            raise argparse.ArgumentTypeError(f"needs a whole number >= {self.least}{limit}, got {text!r}")
        return number


@dataclass(frozen=True)
class Real:
    """The type of an option that is a finite number from `least` to `most`, or above `least`."""

    least: float
    most: float = inf
    above: bool = False

    def __call__(self, text: str) -> float:
        """Parse the number, or raise argparse's error."""
        try:
            number = float(text)
        except ValueError:
            number = inf
        if not isfinite(number) or not self.least <= number <= self.most or (self.above and number == self.least):
            limit = "" if self.most == inf else f" and <= {self.most:g}"
            sign = ">" if self.above else ">="
            raise argparse.ArgumentTypeError(f"needs a number {sign} {self.least:g}{limit}, got {text!r}")
        return number


def parse_folder(text: str) -> Path:
    """Parse the name of a folder to write; refuse "", the value of an unset shell variable.

    >>> parse_folder("table/").name
    'table'
    """
    if not text:
        raise argparse.ArgumentTypeError("needs a folder, got ''; the current one is .")
    return Path(text)


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, where the value is JSON, or else text.

    >>> parse_setting("step_tokens=[3, 5]"), parse_setting("mark=<extra_0>")
    (('step_tokens', [3, 5]), ('mark', '<extra_0>'))
    """
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        shown = f"{name}=..." if equals else name  # the value may be a key or a token
        raise argparse.ArgumentTypeError(f"an option is NAME=VALUE, NAME of letters, digits and _, got {shown!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def split_name(text: str) -> tuple[str | None, str]:
    """Split [NAME=]PLACE; a place without a name may be a URL or a path with a "=" in it.

    >>> split_name("safe=org/model"), split_name("http://host/?a=b")
    (('safe', 'org/model'), (None, 'http://host/?a=b'))
    """
    name, equals, place = text.partition("=")
    return (name, place) if equals and not any(letter in name for letter in "/:?\\") else (None, text)


def read_text(file: Path, option: str) -> str:
    """Read a file that an option names, in UTF-8, with or without a byte order mark."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise type(error)(f"{option} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def refuse_options(options: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Raise an error for options that were given although they have no effect: those that are not at their defaults."""
    names = [
        f"{'-' * min(len(name), 2)}{name.replace('_', '-')}"
        for name, default in defaults.items()
        if getattr(options, name) != default
    ]
    if names:
        raise ValueError(f"{', '.join(names)}: {why}, leave {'it' if len(names) == 1 else 'them'} out")


def add_run_options(group: Group) -> None:
    """Add the options of a run that draws completions into a folder: --out, --prompts-per-shard, --quiet."""
    group.add_argument(
        "--out",
        type=parse_folder,
        required=True,
        metavar="DIR",
        help="the folder of all results; a run that was stopped goes on there",
    )
    group.add_argument(
        "--prompts-per-shard",
        type=Whole(1),
        default=32,
        metavar="N",
        help="prompts that one process takes at a time, and that a crash loses (%(default)s)",
    )
    group.add_argument("--quiet", action="store_true", help="show no progress")


def add_prompt_options(group: Group) -> None:
    """Add the options that say how a file or dataset of prompts is read: --column, --split, --limit."""
    group.add_argument("--column", help="the column of the prompts; needed where TRL would not find it by itself")
    group.add_argument("--split", help="the split of a dataset, such as train")
    group.add_argument("--limit", type=Whole(1), metavar="N", help="read only the first N prompts")


def add_trust_option(group: Group) -> None:
    """Add --trust-remote-code of a command that opens a saved reward."""
    text = "run the code and ask the servers that the saved reward names: functions, checkpoints with own code, URLs"
    group.add_argument("--trust-remote-code", action="store_true", help=text)


def open_reward(place: str | os.PathLike[str], *, trust: bool, **settings: Any) -> "CalibratedReward":
    """Open a calibrated reward that was saved; if it needs trust, raise a ValueError that names the option."""
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward

    try:
        return CalibratedReward.from_pretrained(place, trust_remote_code=trust, **settings)
    except NeedsTrust as error:
        raise ValueError(f"{error.reason}: read it, then allow it with --trust-remote-code") from None
