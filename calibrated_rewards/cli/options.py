"""Options that several commands share, from numbers to a saved reward, and errors in the words of the command line.

>>> Whole(1)("16"), Real(0.0, 1.0)("0.5")
(16, 0.5)
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from calibrated_rewards.files import Message
from calibrated_rewards.reward.saving import NeedsTrust
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import parse_procedure
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, SoftBestOf

if TYPE_CHECKING:
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.reward.combined import Reward

Group: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"

# The libraries of each extra of the package.
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
# The extras that a command needs whatever its options are; `find_extras` adds those of its models.
NEEDED: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate",),
    "evaluate": ("calibrate",),
    "export": ("calibrate",),
    "serve": ("serve",),
    "report": ("plots", "calibrate"),
    "demo": ("hf", "calibrate", "plots"),
}
# The option for each keyword argument that an error message names.
OPTIONS = {
    "column": "--column NAME",
    "cost": "--cost",
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
    "score": "--score FIELD",
    "scores": "--scores COLUMN",
    "select": "--select {value}",
    "split": "--split {value}",
    "template": "--chat-template FILE (of a policy: --policy-chat-template FILE)",
    "tokenizer": "--option tokenizer=PATH (of a policy: --policy-tokenizer PATH)",
    "trust_remote_code": "--trust-remote-code (of a policy: --policy-trust-remote-code)",
}


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


def parse_best_of(text: str) -> BestOf | BestOfUpTo:
    """Parse the N of --best-of, or 1-N where N is not known.

    >>> parse_best_of("4"), parse_best_of("1-16")
    (BestOf(n=4), BestOfUpTo(n=16, weights=None))
    """
    try:
        procedure = parse_procedure(f"best-of:{text}")
    except ValueError:
        procedure = None
    if not isinstance(procedure, BestOf | BestOfUpTo):
        raise argparse.ArgumentTypeError(f"needs a whole number >= 1, or 1-N where N is not known, got {text!r}")
    return procedure


def parse_soft_best_of(text: str) -> SoftBestOf:
    """Parse N:T, the draws and the temperature of --soft-best-of.

    >>> parse_soft_best_of("8:0.1")
    SoftBestOf(n=8, temperature=0.1)
    """
    n, _, temperature = text.partition(":")
    try:
        return SoftBestOf(int(n), float(temperature))
    except ValueError as error:
        why = str(error) if "SoftBestOf" in str(error) else f"needs N:T, such as 8:0.1, got {text!r}"
        raise argparse.ArgumentTypeError(why) from None


def parse_rewind(text: str) -> RewindAndRepeat:
    """Parse Q or Q:TRIES, the quantile to reach and the most draws of --rewind.

    >>> parse_rewind("0.85"), parse_rewind("0.9:8")
    (RewindAndRepeat(threshold=0.85, max_tries=32), RewindAndRepeat(threshold=0.9, max_tries=8))
    """
    threshold, colon, tries = text.partition(":")
    try:
        return RewindAndRepeat(float(threshold), int(tries)) if colon else RewindAndRepeat(float(threshold))
    except ValueError as error:
        why = str(error) if "RewindAndRepeat" in str(error) else f"needs Q or Q:TRIES, such as 0.85:32, got {text!r}"
        raise argparse.ArgumentTypeError(why) from None


def parse_file(text: str) -> Path:
    """Parse the name of a file to write; refuse "" and a folder.

    >>> parse_file("answers.jsonl").name
    'answers.jsonl'
    """
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"needs a file, got {'the folder ' if text else ''}{text!r}")
    return Path(text)


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
        start = f"{name}=..." if equals else name  # the value may be a key or a token
        raise argparse.ArgumentTypeError(f"an option is NAME=VALUE, NAME of letters, digits and _, got {start!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def split_name(text: str) -> tuple[str | None, str]:
    """Split [NAME=]MODEL; a model without a name may be a URL or a path with a "=" in it.

    >>> split_name("safe=org/model"), split_name("http://host/?a=b")
    (('safe', 'org/model'), (None, 'http://host/?a=b'))
    """
    name, equals, model = text.partition("=")
    return (name, model) if equals and not any(letter in name for letter in "/:?\\") else (None, text)


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

    with name_trust_option():
        return CalibratedReward.from_pretrained(place, trust_remote_code=trust, **settings)


def open_any_reward(place: str | os.PathLike[str], *, trust: bool, **settings: Any) -> "Reward":
    """Open a reward as `open_reward` does, or a combined one."""
    from calibrated_rewards.reward.saving import load_reward

    with name_trust_option():
        return load_reward(place, trust_remote_code=trust, **settings)


@contextmanager
def name_trust_option() -> Iterator[None]:
    """Turn the error of a saved reward that needs trust into one that names the option."""
    try:
        yield
    except NeedsTrust as error:
        raise ValueError(f"{error.reason}: read it, then allow it with --trust-remote-code") from None


def error_text(error: BaseException, other: str = "--option {name}={value}", extras: Iterable[str] = ()) -> str:
    """Write an error in the words of the command line.

    `other` is the form of settings without an entry in OPTIONS. If a library is missing, all that are missing of
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


def find_extras(command: str, options: argparse.Namespace) -> set[str]:
    """Find the extras that a command needs with these options: for models here, for servers, for plots, for Ray."""
    models: list[str] = []
    for name in ("policy", "reference", "reward_model", "judge"):
        value = getattr(options, name, None)
        models += [] if value is None else [value] if isinstance(value, str) else list(value)
    urls = [any(part.startswith(("http://", "https://")) for part in (m, m.partition("=")[2])) for m in models]
    return {
        *NEEDED.get(command, ()),
        *(["http"] if any(urls) else []),
        *(["hf"] if not all(urls) else []),
        *(["plots"] if getattr(options, "plot", None) is not None else []),
        *(["ray"] if getattr(options, "ray", None) is not None else []),
    }


def missing_text(extras: set[str], library: str | None = None) -> str | None:
    """Write what to install for all libraries of some extras that are missing; None if none is."""

    def is_missing(name: str) -> bool:
        try:
            return name == library or find_spec(name) is None
        except ValueError:  # in sys.modules without a spec, as in tests
            return True

    missing = {extra: [each for each in EXTRAS[extra] if is_missing(each)] for extra in extras}
    libraries = sorted({each for names in missing.values() for each in names})
    if not libraries:
        return None
    extra_names = ",".join(sorted(extra for extra, names in missing.items() if names))
    verb = "is" if len(libraries) == 1 else "are"
    return f"needs {', '.join(libraries)}, which {verb} not installed: pip install 'calibrated-rewards[{extra_names}]'"
