"""`calibrated-rewards cp`: a copy of an adapter, to be changed."""

import argparse
import sys
from pathlib import Path

from calibrated_rewards.cli.path import adapter, listed

EPILOG = """examples:
  calibrated-rewards cp --list                 the names of all adapters, and what each is for
  calibrated-rewards cp trl_reward .           to where you stand
  calibrated-rewards cp verl_reward my_reward.py

An adapter imports nothing relative, so a copy works wherever it lies. Without --force no file is written over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("adapter", nargs="?", help="its name, such as trl_reward")
    parser.add_argument("to", nargs="?", default=".", help="a directory or a file: here")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--force", action="store_true", help="write over a file that exists")


def run(options: argparse.Namespace) -> int:
    """Copy it, and say where to."""
    if options.list:
        sys.stdout.write(f"{listed()}\n")
        return 0
    if options.adapter is None:
        raise ValueError("cp needs the name of an adapter; --list says which there are")
    sys.stdout.write(f"{copied(adapter(options.adapter), Path(options.to), options.force)}\n")
    return 0


def copied(source: Path, to: Path, force: bool = False) -> Path:
    """Copy a file into a directory or to a name, for where it lies then; FileExistsError unless `force`."""
    target = to / source.name if to.is_dir() else to
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory: make it first, or say another place")
    content = source.read_bytes()
    try:
        with target.open("wb" if force else "xb") as file:
            file.write(content)
    except FileExistsError:
        raise FileExistsError(f"{target} exists: give another name, or --force to write over it") from None
    return target
