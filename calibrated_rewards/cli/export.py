"""`calibrated-rewards export`: write the rollouts of a calibration as a dataset that other trainers learn from."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calibrated_rewards.cli.options import Real, Whole, add_trust_option, open_reward, parse_folder
from calibrated_rewards.files import Message, setting
from calibrated_rewards.theory.named import TRANSFORM_HELP, NamedTransform, parse_transform
from calibrated_rewards.theory.transforms import Identity

if TYPE_CHECKING:
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.theory.finite_k import Estimator
    from calibrated_rewards.theory.scale import Scale

EPILOG = """examples:
  calibrated-rewards export table/ --as sft --out best/                               the best of each prompt
  calibrated-rewards export table/ --as sft --draws 4 --transform best-of:4:0.5 --out drawn/
  calibrated-rewards export table/ --as pairs --of 8 --out pairs/ --format jsonl --layout openrlhf
  calibrated-rewards export table/ --as scored --reward reward/ --out scored/
  calibrated-rewards export table/ --as weighted --transform exp:10 --beta 0.1 --layout ms-swift --format jsonl --out w/

sft: the best completion of each prompt, or --draws N of them, drawn by the weights that the optimum gives them. pairs:
the best and the worst of all rollouts, or of disjoint random sets of --of N. scored: all rollouts with raw score, u,
reward, weight, log Z and target log-ratio. weighted: the rollouts with their weights, which
only ms-swift reads of these layouts. scored has TRL's layout alone, as --format datasets has.

Weights need a beta: of --reward, of --transform with a KL (solved for on this table, as `reward` does), or --beta. The
directory has the rows, a card that says how to load them and what was left out, and export.json. An export that was
stopped goes on where it was. Exit code: 0 written or there already, 2 wrong usage, or no row is left."""

# Settings in errors are options of the same name.
OTHER_OPTION = "--{flag} {value}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    add = parser.add_argument
    add("table", type=Path, help="the folder of a calibration, or of a table in it")
    kinds = ("sft", "pairs", "scored", "weighted")
    add("--as", dest="kind", choices=kinds, required=True, help="what to make of the rollouts")
    add("--out", type=parse_folder, required=True, metavar="DIR", help="the directory to write")
    add("--force", action="store_true", help="write over an export with other settings")
    add = parser.add_argument_group("reward").add_argument
    add("--reward", metavar="DIR", help="a calibrated reward that was saved, in place of --transform")
    add("--transform", type=parse_transform, metavar="NAME", help=f"{TRANSFORM_HELP} (identity)")
    text = "the strength of the KL, for weights; default: that of --reward, or of the KL in --transform"
    add("--beta", type=Real(0.0, above=True), metavar="B", help=text)
    estimators, text = ("empirical", "posterior", "unbiased", "randomised"), "how K references estimate a quantile"
    add("--estimator", choices=estimators, help=f"{text} (empirical)")
    text = "the reward's scale: [0, 1], mean 0 and variance 1, or the transform as it is (unit)"
    add("--scale", choices=("unit", "standard", "raw"), help=text)
    text = "the reward model whose scores count, where there are several (that of --reward, else the one named reward)"
    add("--select", metavar="NAME", help=text)
    add_trust_option(parser)
    add = parser.add_argument_group("rows").add_argument
    text = "of sft, completions to draw a prompt, by weight, in place of the best; of pairs, the most of a prompt"
    add("--draws", type=Whole(1), metavar="N", help=text)
    add("--of", type=Whole(2), metavar="N", help="the n of pairs of best and worst of n (all rollouts of a prompt)")
    text = "the least weight of a row of weighted (%(default)g)"
    add("--floor", type=Real(0.0, 1.0), default=1e-6, metavar="W", help=text)
    add("--finished-only", action="store_true", help="leave out rollouts that the token limit cut")
    add("--seed", type=Whole(0), default=0, metavar="N", help="the seed of draws and of sets of --of (%(default)s)")
    add = parser.add_argument_group("files").add_argument
    text = "a Parquet file, lines of JSON, or a folder `train` for datasets.load_from_disk (%(default)s)"
    add("--format", choices=("parquet", "jsonl", "datasets"), default="parquet", help=text)
    layouts = ("trl", "axolotl", "llama-factory", "openrlhf", "ms-swift")
    add("--layout", choices=layouts, default="trl", help="the framework whose columns to write (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Value the rollouts, write the dataset, and print what is in it and what is not."""
    from calibrated_rewards.training.offline.dataset_folder import export
    from calibrated_rewards.training.offline.datasets import Selection

    names = ("kind", "draws", "of", "floor", "finished_only", "seed")
    selection = Selection(**{name: getattr(options, name) for name in names})
    folder, select = locate_run(options.table, options.select)
    reward, beta = make_reward(options, folder, select)
    if selection.needs_beta and beta is None:
        rest = f"a KL, {setting('transform', 'best-of:4:0.5')}, or {setting('beta', 'B')}"
        raise ValueError(Message(f"weights need a beta, got none: name it by {rest}"))
    before = read_stamp(options.out)
    done = export(
        folder,
        options.out,
        selection,
        reward,
        beta=beta,
        select=select,
        file_format=options.format,
        layout=options.layout,
        force=options.force,
    )
    lines = [*done.lines(), *([f"beta {beta:.4g}, {reward.transform!r}"] if selection.needs_beta else [])]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if read_stamp(options.out) == before:
        sys.stderr.write("it was there already: nothing is written\n")
    sys.stderr.write(f"how to load it: {options.out / 'README.md'}\n")
    return 0


def read_stamp(out: Path) -> int | None:
    """Read when the last file of an export was written; None if there is none."""
    file = out / "export.json"
    return file.stat().st_mtime_ns if file.is_file() else None


def locate_run(at: Path, select: str | None) -> tuple[Path, str | None]:
    """Find the folder of a calibration, and the scorer that is named by an option or by the folder of its table."""
    above = at.absolute().parent
    if not (at / "run.json").is_file() and (at / "table.json").is_file() and (above / "run.json").is_file():
        at, select = above, select or at.name
    if not (at / "run.json").is_file():
        raise ValueError(f"an export needs the folder of a calibration, with its rollouts, got {at}")
    return at, select


def make_reward(
    options: argparse.Namespace, folder: Path, select: str | None
) -> "tuple[CalibratedReward, float | None]":
    """Open the reward, or make it of the scorer's table and the transform; with its beta, or the one that is given."""
    from calibrated_rewards.evaluation.expectations import check_resolved, expect
    from calibrated_rewards.evaluation.references import choose_scorer
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.table.reference_table import ReferenceTable
    from calibrated_rewards.theory.scale import scaled

    if options.reward is not None:
        for name in ("transform", "estimator", "scale"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is that of --reward: give one of the two")
        saved = open_reward(options.reward, trust=options.trust_remote_code)
        return saved, options.beta or saved.beta
    named: NamedTransform = options.transform or NamedTransform("identity", Identity())
    if named.kl is not None and options.beta is not None:
        raise ValueError(f"{named.name} names a KL, which has its beta: leave out the KL or --beta")
    select = choose_scorer(folder, select)
    table = next((each for each in (folder / select, folder) if (each / "table.json").is_file()), None)
    if table is None:
        raise ValueError(f"{folder} needs a table.json, got none: calibrate to the end")
    references = ReferenceTable.load(table)
    estimator: Estimator = options.estimator or "empirical"
    scale: Scale = options.scale or "unit"
    transform = scaled(named.transform, scale)
    check_resolved(references, transform, estimator=estimator, name=named.name)
    beta = options.beta
    if named.kl is not None:
        solved = expect(
            references, transform, kl=named.kl, procedure=named.procedure, estimator=estimator, name=named.name
        )
        beta = solved.beta
    return CalibratedReward(None, references, named.transform, beta=beta, estimator=estimator, scale=scale), beta
