"""`calibrated-rewards push`: upload a table, with its rollouts, or a saved reward to the Hugging Face Hub."""

import argparse
import sys
from pathlib import Path

from calibrated_rewards.cli.inspect import find_tables

EPILOG = """examples:
  calibrated-rewards push table/ my-name/my-table --rollouts --licence apache-2.0
  calibrated-rewards push runs/both/helpful my-name/helpful-table --rollouts --private
  calibrated-rewards push reward/ my-name/my-reward --base-model org/my-rm

FOLDER is what `calibrate` or `reward` wrote, or save_pretrained. A table becomes a dataset, a reward a model; the
repository is made if there is none. Its README.md is a card: what the table or reward was made with, how to load it,
and a figure of the scores; --no-card leaves the README.md that is there. --rollouts adds the prompts, completions and
scores of the run as data/rollouts.parquet, which the Hub shows and datasets.load_dataset reads. A table and a reward
hold a few prompts and completions too, by which reward models are verified, and all metadata, table.json: what looks
like a secret in it is refused, unless you say --force.

Log in first, `hf auth login`, or set HF_TOKEN. They load with ReferenceTable.from_pretrained("my-name/my-table") and
calibrated_rewards.reward.load_reward("my-name/my-reward"). Exit code: 0 uploaded, 2 wrong usage or no access."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `push`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a table, of a run or of a reward")
    parser.add_argument("name", metavar="NAME", help="the repository on the Hub, my-name/my-table")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    text = "upload the run's prompts, completions and scores too, as a dataset"
    parser.add_argument("--rollouts", action="store_true", help=text)
    text = "the licence in the card, by the Hub's name for it, such as apache-2.0"
    parser.add_argument("--licence", "--license", metavar="NAME", help=text)
    text = "a policy or reward model on the Hub, for the card; may be repeated (those that the metadata name)"
    parser.add_argument("--base-model", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--no-card", action="store_true", help="leave the repository's README.md as it is")
    text = "upload although a setting in the metadata looks like a secret, a key or a password"
    parser.add_argument("--force", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Upload the folder and print the URL of the commit."""
    settings = {
        "private": options.private or None,
        "licence": options.licence,
        "base_model": options.base_model,
        "card": not options.no_card,
        "force": options.force,
    }
    if (options.folder / "reward.json").is_file():
        from calibrated_rewards.reward.hub import push_folder

        if options.rollouts:
            raise ValueError(f"--rollouts: {options.folder} is a reward, push the run's table with them")
        url = push_folder(options.folder, options.name, **settings)
    else:
        from calibrated_rewards.table.reference_table import ReferenceTable

        tables = find_tables(options.folder)
        if len(tables) > 1:
            raise ValueError(f"{options.folder} has several tables, push one of them: {', '.join(map(str, tables))}")
        url = ReferenceTable.load(tables[0]).push_to_hub(options.name, rollouts=options.rollouts, **settings)
    sys.stdout.write(f"{url}\n")
    return 0
