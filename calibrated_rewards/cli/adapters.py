"""`calibrated-rewards path` and `cp`: find an adapter for a trainer, or copy it to change it."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class AdapterCommand:
    """One of the two commands of this file, in the form that `main` takes."""

    EPILOG: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command `path`."""
    parser.add_argument("adapter", nargs="?", help="its name, such as trl_reward; default: list all")


def print_path(options: argparse.Namespace) -> int:
    """Print where an adapter lies, or list all."""
    sys.stdout.write(f"{list_adapters() if options.adapter is None else find_adapter(options.adapter)}\n")
    return 0


def add_cp_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command `cp`."""
    parser.add_argument("adapter", nargs="?", help="its name, such as trl_reward")
    parser.add_argument("to", nargs="?", default=".", help="a directory or a file; default: the current directory")
    parser.add_argument("--list", action="store_true", help="list all adapters")
    parser.add_argument("--force", action="store_true", help="write over a file that exists")


def copy_adapter(options: argparse.Namespace) -> int:
    """Copy an adapter and print the path of the copy, or list all."""
    if options.list:
        sys.stdout.write(f"{list_adapters()}\n")
        return 0
    if options.adapter is None:
        raise ValueError("cp needs the name of an adapter; --list says which there are")
    source, to = find_adapter(options.adapter), Path(options.to)
    target = to / source.name if to.is_dir() else to
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory: make it first, or say another place")
    try:
        with target.open("wb" if options.force else "xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise FileExistsError(f"{target} exists: give another name, or --force to write over it") from None
    sys.stdout.write(f"{target}\n")
    return 0


def find_adapters() -> dict[str, Path]:
    """Find the files of all adapters, by name, without importing them: their frameworks may not be installed."""
    package = find_spec("calibrated_rewards.adapters")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("calibrated_rewards.adapters is not installed: pip install calibrated-rewards again")
    folder = Path(package.submodule_search_locations[0]).absolute()
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def find_adapter(name: str) -> Path:
    """Find the file of an adapter by its name."""
    files = find_adapters()
    stem = name.removesuffix(".py")
    if stem not in files:
        raise ValueError(f"an adapter is one of {', '.join(files)}; got {name!r}")
    return files[stem]


def list_adapters() -> str:
    """List all adapters: name, and first line of the docstring."""
    files = find_adapters()
    width = max(map(len, files))
    return "\n".join(f"{name:<{width}}  {read_first_line(file)}" for name, file in files.items())


def read_first_line(file: Path) -> str:
    """Read the first line of a file's docstring.

    >>> read_first_line(Path(__file__))
    '`calibrated-rewards path` and `cp`: find an adapter for a trainer, or copy it to change it.'
    """
    return file.read_text(encoding="utf-8").lstrip().removeprefix('"""').partition("\n")[0].removesuffix('"""')


PATH = AdapterCommand(
    """examples:
  calibrated-rewards path                      list all adapters
  calibrated-rewards path openrlhf_reward      print the file's path, for --reward.remote_url
  swift rlhf --external_plugins $(calibrated-rewards path swift_reward) ...

docs/guides/train.md says which framework takes which adapter, and how to switch it on.""",
    add_path_arguments,
    print_path,
)
CP = AdapterCommand(
    """examples:
  calibrated-rewards cp --list                 list all adapters
  calibrated-rewards cp trl_reward .           copy one into the current directory
  calibrated-rewards cp verl_reward my_reward.py

An adapter has no relative imports, so a copy works in any place. Without --force no file is written over.""",
    add_cp_arguments,
    copy_adapter,
)
