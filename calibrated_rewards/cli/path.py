"""`calibrated-rewards path`: where an adapter lies, for frameworks that are told a file."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

EPILOG = """examples:
  calibrated-rewards path                      the names of all adapters, and what each is for
  calibrated-rewards path openrlhf_reward      the file, for --reward.remote_url
  swift rlhf --external_plugins $(calibrated-rewards path swift_reward) ...

docs/guides/train.md says which framework takes which, and how to switch it on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("adapter", nargs="?", help="its name, such as trl_reward; left out: all of them")


def run(options: argparse.Namespace) -> int:
    """Say where."""
    sys.stdout.write(f"{listed() if options.adapter is None else adapter(options.adapter)}\n")
    return 0


def adapters() -> dict[str, Path]:
    """The files by name."""
    package = find_spec("calibrated_rewards.adapters")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("calibrated_rewards.adapters is not installed: pip install calibrated-rewards again")
    folder = Path(package.submodule_search_locations[0]).absolute()
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def adapter(name: str) -> Path:
    """The file of one."""
    found = adapters()
    asked = name.removesuffix(".py")
    if asked not in found:
        raise ValueError(f"an adapter is one of {', '.join(found)}; got {name!r}")
    return found[asked]


def listed() -> str:
    """A line for each adapter: its name, and the first line of what it says."""
    width = max(map(len, adapters()))
    return "\n".join(f"{name:<{width}}  {first_line(file)}" for name, file in adapters().items())


def first_line(file: Path) -> str:
    """Of its docstring, read without running it: its framework may not be installed.

    >>> first_line(Path(__file__))
    '`calibrated-rewards path`: where an adapter lies, for frameworks that are told a file.'
    """
    return file.read_text(encoding="utf-8").lstrip().removeprefix('"""').partition("\n")[0].removesuffix('"""')
