"""`calibrated-rewards report`: one page of what was calibrated, trained and measured."""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  calibrated-rewards report demo/
  calibrated-rewards report table/ --out table.html --title "SFT 7B, first calibration"
  calibrated-rewards report evaluation/

The directory is that of a demo, of a calibration or a single table, of training, or of an evaluation; one that holds
several, as folders table/, reward/, evaluation/ and a folder a run, with frontier.json, makes one page of them all.
What is not there is left out. The page is one file that loads and runs nothing: mail it. Exit code: 0 written,
2 nothing there to report, or a file that cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("directory", type=Path, help="of an experiment, a calibration, a table, a run or an evaluation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page: report.html in the directory")
    parser.add_argument("--title", help="its title: what there is, and of which policy")


def run(options: argparse.Namespace) -> int:
    """Write it, and say where."""
    from calibrated_rewards.evaluation.report.report import report

    sys.stdout.write(f"{report(options.directory, options.out, options.title)}\n")
    return 0
