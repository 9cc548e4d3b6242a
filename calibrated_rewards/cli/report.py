"""`calibrated-rewards report`: write one HTML page about what was calibrated, trained and measured."""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  calibrated-rewards report demo/
  calibrated-rewards report table/ --out table.html --title "SFT 7B, first calibration"
  calibrated-rewards report evaluation/

The directory is that of a demo, a calibration, a table, a training run or an evaluation. One that holds several of them
(folders table/, reward/, evaluation/, a folder for each run, and frontier.json) makes one page of all; what is missing
is left out. The page is a single file that loads and runs nothing: mail it. Exit code: 0 written, 2 nothing to report,
or a file that cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command `report`."""
    text = "the folder of an experiment, a calibration, a table, a run or an evaluation"
    parser.add_argument("directory", type=Path, help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in the directory")
    parser.add_argument("--title", help="the page's title; default: its contents and the policy")


def run(options: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from calibrated_rewards.evaluation.report import report

    sys.stdout.write(f"{report(options.directory, options.out, options.title)}\n")
    return 0
