"""`calibrated-rewards inspect`: what a table is made of, what it can tell, and what is odd about it."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibrated_rewards.cli.errors import Whole

if TYPE_CHECKING:
    from calibrated_rewards.calibration.inspect_rollouts import RolloutHealth
    from calibrated_rewards.calibration.inspect_table import Health

EPILOG = """examples:
  calibrated-rewards inspect table/
  calibrated-rewards inspect table/ --json | jq .tables[0].spread
  calibrated-rewards inspect my-name/my-table --strict

Of a run with several reward models each table is told. Where the rollouts are at hand, those are told too, and how the
suspicious prompts start. Exit code: 0; with --strict 1 if a row is suspicious; 2 the table cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("table", help="the directory of a table, or of a run, or a name on the Hugging Face Hub")
    parser.add_argument("--json", action="store_true", help="an object in place of lines")
    parser.add_argument(
        "--rows", type=Whole(1), default=5, metavar="N", help="suspicious rows and prompts shown for each reason: 5"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a row is suspicious")
    parser.add_argument("--revision", help="of a table on the Hub")


def run(options: argparse.Namespace) -> int:
    """Look at each table, and at the rollouts, and say it."""
    from calibrated_rewards.calibration.inspect_table import health
    from calibrated_rewards.table.reference_table import ReferenceTable

    at = Path(options.table)
    if at.is_dir():
        tables = [ReferenceTable.load(path) for path in tables_in(at)]
    elif at.is_absolute() or options.table.count("/") != 1 or options.table.startswith("."):
        raise ValueError(
            f"a table is a directory, or a name on the Hub such as my-name/my-table, got {options.table!r}, "
            f"{'which is a file' if at.is_file() else 'and there is no such directory'}"
        )
    else:
        tables = [ReferenceTable.from_pretrained(options.table, revision=options.revision)]
    found = [health(table, options.rows) for table in tables]
    rollouts = told_of_rollouts(at, options.rows, {each.key for one in found for each in one.odd})
    if rollouts is not None:
        found = [with_starts(one, rollouts.starts) for one in found]
    say(found, rollouts, options.json)
    return int(options.strict and any(one.odd_rows for one in found))


def tables_in(at: Path) -> list[Path]:
    """The tables of a directory: itself, and those in its folders."""
    found = [path.parent for path in (at / "table.json", *sorted(at.glob("*/table.json"))) if path.is_file()]
    if not found:
        raise ValueError(f"{at} needs a table.json, in it or in a folder of it, got none: not calibrated yet?")
    return found


def told_of_rollouts(at: Path, most: int, keys: set[str]) -> "RolloutHealth | None":
    """The rollouts of a run, whose directory this is, or that of one of its tables."""
    above = at.absolute().parent
    folder = (above if (above / "run.json").is_file() else at) / "rollouts"
    if at.is_dir() and any(folder.glob("*.parquet")):
        from calibrated_rewards.calibration.inspect_rollouts import rollout_health

        return rollout_health(folder, most, keys)
    return None


def with_starts(one: "Health", starts: dict[str, str]) -> "Health":
    """With how the prompts of suspicious rows start."""
    return replace(one, odd=tuple(replace(each, prompt=starts.get(each.key)) for each in one.odd))


def say(found: "list[Health]", rollouts: "RolloutHealth | None", as_json: bool) -> None:
    """All of it, on standard output."""
    from calibrated_rewards.calibration.inspect_table import section

    if as_json:
        told = {"tables": [one.as_json() for one in found], "rollouts": rollouts and rollouts.as_json()}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return
    texts = [str(one) for one in found]
    if rollouts is not None:
        texts.append("\n".join(section(rollouts.where, rollouts.lines())))
    sys.stdout.write("\n\n".join(texts) + "\n")
