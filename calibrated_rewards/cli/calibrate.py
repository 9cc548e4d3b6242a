"""`calibrated-rewards calibrate`: prompts, a policy and a reward model to a table of references."""

import argparse
import logging
import os
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options as reward_model, policy_options as policy
from calibrated_rewards.cli.errors import Real, Whole, folder
from calibrated_rewards.theory.named import parse_transform
from calibrated_rewards.theory.transforms import Identity

if TYPE_CHECKING:
    from calibrated_rewards.calibration.adaptive import Adaptive
    from calibrated_rewards.table.reference_table import ReferenceTable

EPILOG = """examples:
  calibrated-rewards calibrate --policy ./sft --reward-model ./rm --prompts prompts.jsonl --max-tokens 256 --out table/
  calibrated-rewards calibrate ... --dry-run                      what would be done, what it would cost
  calibrated-rewards calibrate ... -k 200                         the same again with a larger K: only what is missing
  calibrated-rewards calibrate --reward-model new=./rm2 --out table/      another reward model for the same rollouts
  calibrated-rewards calibrate --reward-model safe=./toxicity --cost --out table/     a model whose higher is worse
  calibrated-rewards calibrate --rollouts dump.parquet --scores reward --out table/       rollouts made elsewhere

Killed or stopped, the same command goes on where it was. Several processes that are given the same command, on one
machine or on many with a shared folder, share the work (accelerate launch, srun, a shell's &); --ray N does it on a
cluster without one. Decoding settings should be the trainer's own. `calibrated-rewards inspect table/` shows what came
of it. Exit code: 0 done, 2 wrong usage, or something that cannot be loaded or done, 130 stopped by Ctrl-C."""

NEXT = """next: calibrated-rewards inspect {out}     is it good
      calibrated-rewards frontier {out}    what training for each reward would come to
      calibrated-rewards reward --help     the reward that trainers load
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--out", type=folder, required=True, metavar="DIR", help="where everything is kept; go on there")
    group.add_argument("-k", type=Whole(1), metavar="K", help="rollouts a prompt; as many as --out has, or 100")
    group.add_argument("--seed", type=int, default=0, help="of the rollouts (%(default)s)")
    group.add_argument(
        "--prompts-per-shard", type=Whole(1), default=32, metavar="N", help="the unit of work (%(default)s)"
    )
    group.add_argument(
        "--adaptive",
        type=Real(0.0, above=True),
        metavar="WIDTH",
        help="in place of -k: rounds, until the reward's band is ± WIDTH",
    )
    group.add_argument(
        "--transform",
        type=lambda name: parse_transform(name).transform,
        metavar="NAME",
        help="of --adaptive, on [0, 1]: identity (default), log, exp:10",
    )
    group.add_argument("--rounds", type=rounds, metavar="K,K,...", help="of --adaptive (16,32,64,128)")
    group.add_argument(
        "--budget", type=Whole(1), metavar="ROLLOUTS", help="of --adaptive: the most of all prompts together"
    )
    group.add_argument(
        "--ray", type=Whole(1), metavar="WORKERS", help="do the work on this many workers of a Ray cluster"
    )
    group.add_argument("--ray-gpus", type=Real(0.0), default=0.0, metavar="N", help="GPUs of each of them")
    group.add_argument("--dry-run", action="store_true", help="check everything, time a trial, write nothing")
    group.add_argument("--quiet", action="store_true", help="no progress")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", metavar="FILE|FOLDER|ID", help="JSONL, Parquet, text, a saved dataset, one of the Hub"
    )
    group.add_argument("--column", help="the column of the prompts, where it is not what TRL would read")
    group.add_argument("--id-column", help="a column of ids, by which trainers may ask; prompt_id if there is one")
    group.add_argument("--split", help="of a dataset")
    group.add_argument("--limit", type=Whole(1), metavar="N", help="the first N prompts only")
    group.add_argument(
        "--rollouts", metavar="FILE|FOLDER|ID", help="in place of --prompts and --policy: made elsewhere"
    )
    group.add_argument("--completions", metavar="COLUMN", help="of --rollouts: their column")
    group.add_argument(
        "--scores", action="append", default=[], metavar="[NAME=]COLUMN", help="of --rollouts: the column of the scores"
    )
    policy.add_arguments(parser, required=False)
    reward_model.add_arguments_of_reward_model(parser, several=True)


def run(options: argparse.Namespace) -> int:
    """Calibrate, or say what that would be."""
    if not options.quiet:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    tables = _imported(options) if options.rollouts else _calibrated(options)
    if tables is None:
        return 0
    for table in tables.values() if isinstance(tables, dict) else [tables]:
        sys.stdout.write(f"{told(table)}\n")
    sys.stderr.write(NEXT.format(out=options.out))  # not on the stream that scripts read
    return 0


def told(table: "ReferenceTable") -> str:
    """What came of it, in a line."""
    says = table.describe()
    return (
        f"{table.path}: {len(table):,} prompts, {says['references']:,} references, {says['tied_share']:.1%} tied, "
        f"{says['prompts_without_resolution']:,} prompts without resolution"
    )


def _calibrated(options: argparse.Namespace) -> Any:
    from calibrated_rewards.calibration.calibrate import calibrate
    from calibrated_rewards.calibration.sources import prompts_from

    refuse(options, ("completions", "scores"), "they belong to --rollouts")
    rounds = adaptive(options)
    source = {name: getattr(options, name) for name in ("column", "id_column", "split", "limit")}
    prompts, source = check_prompts(options.prompts, source) if options.prompts else (None, source)
    sampler = policy.load(options) if options.policy else None
    if options.dry_run:
        _foretell(options, None if prompts is None else prompts_from(prompts, **source), sampler)
        return None
    scorers = reward_model.load_several(options)
    settings = {"k": options.k, "seed": options.seed, "adaptive": rounds, **_common(options)}
    return calibrate(prompts, sampler, scorers, options.out, **settings, **source)


def check_prompts(place: str, source: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read and check all prompts before models are loaded; what to read them from again, and how.

    A file is read twice. What comes from the Hub is kept in memory, since it would be downloaded twice.
    """
    from calibrated_rewards.calibration.plan import Ids, checked
    from calibrated_rewards.calibration.sources import prompts_from
    from calibrated_rewards.prompts import prompt_key

    kept, ids, empty = [], Ids({}), True
    is_here = os.path.exists(place)
    for each in prompts_from(place, **source):
        empty = False
        ids.add(each, prompt_key(each.prompt))
        checked([each.prompt], None)
        if not is_here:
            kept.append(each)
    if empty:
        raise ValueError(f"--prompts {place} has no prompts")
    return (place, source) if is_here else (kept, {})


def adaptive(options: argparse.Namespace) -> "Adaptive | None":
    """The rounds that the options ask for."""
    if options.adaptive is None:
        refuse(options, ("transform", "rounds", "budget"), "they belong to --adaptive")
        return None
    if options.k is not None:
        raise ValueError("-k: with --adaptive, --rounds say how many rollouts there are, leave it out")
    from calibrated_rewards.calibration.adaptive import Adaptive
    from calibrated_rewards.theory.transforms import scaled

    unit, rounds = scaled(options.transform or Identity(), "unit"), options.rounds or (16, 32, 64, 128)
    if options.budget is not None and options.budget < rounds[0]:
        raise ValueError(f"--budget needs the {rounds[0]} rollouts of the first round or more, got {options.budget}")
    return Adaptive(unit, options.adaptive, rounds, budget=options.budget)


def rounds(given: str) -> tuple[int, ...]:
    """What --rounds says.

    >>> rounds("16,32")
    (16, 32)
    """
    try:
        found = tuple(map(int, given.split(",")))
    except ValueError:
        found = ()
    if not found or found[0] < 1 or any(after <= before for before, after in pairwise(found)):
        raise argparse.ArgumentTypeError(f"rounds are whole numbers that rise, such as 16,32,64, got {given!r}")
    return found


def _foretell(options: argparse.Namespace, asked: Any, sampler: Any) -> None:
    from calibrated_rewards.calibration.calibrate import REWARD
    from calibrated_rewards.calibration.dry_run import forecast
    from calibrated_rewards.calibration.run_directory import RunDirectory
    from calibrated_rewards.calibration.work import Work

    scorers = reward_model.load_several(options)
    work = Work(sampler, scorers if isinstance(scorers, dict) else {REWARD: scorers}, options.seed)
    rounds = adaptive(options)
    told = forecast(RunDirectory(options.out), asked, work, rounds.rounds[-1] if rounds else options.k)
    most = f"at most; with --adaptive, {rounds.rounds[0]} rollouts a prompt or more\n" if rounds else ""
    sys.stdout.write(f"{told}\n{most}nothing was written to {options.out}\n")


def _imported(options: argparse.Namespace) -> Any:
    from calibrated_rewards.calibration.calibrate import import_rollouts
    from calibrated_rewards.calibration.importing import imported

    refuse(options, ("prompts", "policy", "limit", "k", "dry_run"), "--rollouts has the prompts, and nothing is drawn")
    columns = {"prompt": options.column, "completions": options.completions}
    source = {**columns, "id_column": options.id_column, "split": options.split}
    scores = _columns(options.scores)
    if options.reward_model and not sum(1 for _ in imported(options.rollouts, scores=scores or {}, **source)):
        raise ValueError(f"--rollouts {options.rollouts} has no rollouts")
    scorers = reward_model.load_several(options) if options.reward_model else None
    return import_rollouts(options.rollouts, options.out, scorers, scores=scores, **_common(options), **source)


def _columns(given: list[str]) -> str | dict[str, str] | None:
    """The column of the scores, or a column for each name."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [one.partition("=") for one in given]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"of several, each --scores needs a name, NAME=COLUMN; got {', '.join(given)}")
    return {name: column for name, _, column in pairs}


def _common(options: argparse.Namespace) -> dict[str, Any]:
    cluster = None
    if options.ray is not None:
        from calibrated_rewards.calibration.cluster import RayCluster

        cluster = RayCluster(options.ray, num_gpus=options.ray_gpus)
    return {
        "prompts_per_shard": options.prompts_per_shard,
        "cluster": cluster,
        "show_progress": not options.quiet,
    }


def refuse(options: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """An error for options that would have no effect."""
    said = [f"{'-' * min(len(name), 2)}{name.replace('_', '-')}" for name in names if getattr(options, name)]
    if said:
        raise ValueError(f"{', '.join(said)}: {why}, leave {'it' if len(said) == 1 else 'them'} out")
