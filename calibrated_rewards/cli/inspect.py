"""`calibrated-rewards inspect`: show what a table was made with, what it can tell apart, and its suspicious rows."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibrated_rewards.cli.options import Whole

if TYPE_CHECKING:
    from calibrated_rewards.calibration.inspect_rollouts import RolloutHealth

EPILOG = """examples:
  calibrated-rewards inspect table/
  calibrated-rewards inspect table/ --json | jq .tables[0].spread
  calibrated-rewards inspect my-name/my-table --strict

A run with several reward models has several tables, and each is shown. Where the rollouts are at hand, they are shown
too, and how the suspicious prompts start. Exit code: 0 done; 1 with --strict if a row is suspicious; 2 the table cannot
be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    text = "the folder of a table or of a run, or a name on the Hugging Face Hub"
    parser.add_argument("table", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")
    text = "suspicious rows and prompts to show for each reason (%(default)s)"
    parser.add_argument("--rows", type=Whole(1), default=5, metavar="N", help=text)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a row is suspicious")
    parser.add_argument("--revision", help="a branch, tag or commit on the Hub")


def run(options: argparse.Namespace) -> int:
    """Print a verdict, then each table, then the rollouts."""
    from calibrated_rewards.calibration.inspect_table import health, section
    from calibrated_rewards.table.reference_table import ReferenceTable

    at = Path(options.table)
    if at.is_dir():
        tables = [ReferenceTable.load(path) for path in find_tables(at)]
    elif at.is_absolute() or options.table.count("/") != 1 or options.table.startswith("."):
        raise ValueError(
            f"a table is a directory, or a name on the Hub such as my-name/my-table, got {options.table!r}, "
            f"{'which is a file' if at.is_file() else 'and there is no such directory'}"
        )
    else:
        tables = [ReferenceTable.from_pretrained(options.table, revision=options.revision)]
    reports = [health(table, options.rows) for table in tables]
    rollouts = inspect_rollouts(at, options.rows, {row.key for each in reports for row in each.odd})
    if rollouts is not None:
        reports = [
            replace(each, odd=tuple(replace(row, prompt=rollouts.starts.get(row.key)) for row in each.odd))
            for each in reports
        ]
    if options.json:
        result = {"tables": [each.as_json() for each in reports], "rollouts": rollouts and rollouts.as_json()}
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        counts = sum((Counter(each.odd_rows) for each in reports), Counter[str]())
        rows = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        texts = [f"Suspicious rows: {rows}." if rows else "No row is suspicious.", *map(str, reports)]
        if rollouts is not None:
            texts.append("\n".join(section(rollouts.where, rollouts.lines())))
        sys.stdout.write("\n\n".join(texts) + "\n")
    return int(options.strict and any(each.odd_rows for each in reports))


def find_tables(at: Path) -> list[Path]:
    """Find the tables of a folder: itself, and those in its folders."""
    tables = [path.parent for path in (at / "table.json", *sorted(at.glob("*/table.json"))) if path.is_file()]
    if not tables:
        raise ValueError(f"{at} needs a table.json, in it or in a folder of it, got none: not calibrated yet?")
    return tables


def inspect_rollouts(at: Path, most: int, keys: set[str]) -> "RolloutHealth | None":
    """Inspect the rollouts of a run, given its folder or that of one of its tables; None if there are none."""
    above = at.absolute().parent
    folder = (above if (above / "run.json").is_file() else at) / "rollouts"
    if not (at.is_dir() and any(folder.glob("*.parquet"))):
        return None
    from calibrated_rewards.calibration.inspect_rollouts import rollout_health

    return rollout_health(folder, most, keys)
