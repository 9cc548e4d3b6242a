"""`calibrated-rewards calibrate`: make a table of reference scores from prompts, a policy and a reward model."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.generate import share_with_head
from calibrated_rewards.cli.options import Real, Whole, add_prompt_options, add_run_options, refuse_options
from calibrated_rewards.scorers.protocol import Loaded
from calibrated_rewards.theory.named import OPTIMUM_NAMES, TRANSFORM_NAMES, NamedTransform, parse_transform
from calibrated_rewards.theory.procedures import BestOf, WorstOf
from calibrated_rewards.theory.transforms import Identity

if TYPE_CHECKING:
    from calibrated_rewards.calibration.adaptive import Adaptive
    from calibrated_rewards.table.reference_table import ReferenceTable

EPILOG = """examples:
  calibrated-rewards calibrate --policy ./sft --reward-model ./rm --prompts prompts.jsonl --max-tokens 256 --out table/
  calibrated-rewards calibrate ... --dry-run      check everything and estimate the time, write nothing
  calibrated-rewards calibrate ... -k 200         the same run with a larger K: only what is missing is drawn
  calibrated-rewards calibrate --reward-model new=./rm2 --out table/      score the same rollouts by another model
  calibrated-rewards calibrate --reward-model safe=./toxicity --cost --out table/     a model whose higher is worse
  calibrated-rewards calibrate --rollouts dump.parquet --scores reward --out table/   import rollouts made elsewhere

A run that was stopped goes on when the same command is called again. Several processes that are given the same command
share the work, on one machine or on many with a shared folder (accelerate launch, srun, a shell's &); --ray N runs it
on a cluster without one. Use the trainer's own decoding settings. `calibrated-rewards inspect table/` shows the result.
Exit code: 0 done, 2 wrong usage, or something that cannot be loaded or done, 130 stopped by Ctrl-C."""

NEXT = """next: calibrated-rewards inspect {out}      check the table
      calibrated-rewards recommend {out}    choose the transform and beta to train with; is K enough?
      calibrated-rewards frontier {out}     compare what training for each reward would achieve
      calibrated-rewards reward --help      make the reward that trainers load
"""
ROUNDS = (16, 32, 64, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command `calibrate`."""
    group = parser.add_argument_group("calibration")
    add_run_options(group)
    add = group.add_argument
    add("-k", type=Whole(1), metavar="K", help="rollouts per prompt; default: as many as --out has, or 100")
    add("--seed", type=int, default=0, help="the seed of the rollouts (%(default)s)")
    text = "in place of -k: draw in rounds, until the error band of the reward is ± WIDTH"
    add("--adaptive", type=Real(0.0, above=True), metavar="WIDTH", help=text)
    text = f"the reward of --adaptive, on [0, 1]: {TRANSFORM_NAMES}, without a KL, or {OPTIMUM_NAMES} (identity)"
    add("--transform", type=parse_transform, metavar="NAME", help=text)
    add(
        "--rounds",
        type=parse_rounds,
        metavar="K,K,...",
        help="rollouts per prompt after each round of --adaptive (16,32,64,128)",
    )
    add("--budget", type=Whole(1), metavar="ROLLOUTS", help="most rollouts of --adaptive, over all prompts")
    add("--ray", type=Whole(1), metavar="WORKERS", help="run on this many workers of a Ray cluster")
    add("--ray-gpus", type=Real(0.0), default=0.0, metavar="N", help="GPUs per worker")
    add("--dry-run", action="store_true", help="check everything, time a trial, write nothing")
    group = parser.add_argument_group("prompts")
    text = "a JSONL, Parquet or text file, a saved dataset, or one on the Hub"
    group.add_argument("--prompts", metavar="FILE|FOLDER|ID", help=text)
    add_prompt_options(group)
    text = "a column of ids by which trainers may look prompts up; default: prompt_id, if there is one"
    group.add_argument("--id-column", help=text)
    text = "rollouts made elsewhere, in place of --prompts and --policy"
    group.add_argument("--rollouts", metavar="FILE|FOLDER|ID", help=text)
    group.add_argument("--completions", metavar="COLUMN", help="the completions' column of --rollouts")
    text = "the scores' column of --rollouts; repeat it as NAME=COLUMN for several"
    group.add_argument("--scores", action="append", default=[], metavar="[NAME=]COLUMN", help=text)
    model_options.add_policy_options(parser, required=False)
    model_options.add_reward_model_options(parser, several=True)


def run(options: argparse.Namespace) -> int:
    """Calibrate, import rollouts, or estimate the time; print a line for each table."""
    if not options.quiet:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    tables = import_tables(options) if options.rollouts else make_tables(options)
    if tables is None:
        return 0
    for table in tables.values() if isinstance(tables, dict) else [tables]:
        sys.stdout.write(f"{describe_table(table)}\n")
    sys.stderr.write(NEXT.format(out=options.out))  # not on the stream that scripts read
    return 0


def describe_table(table: "ReferenceTable") -> str:
    """Describe a table in a line: prompts, references, ties."""
    summary = table.describe()
    return (
        f"{table.path}: {len(table):,} prompts, {summary['references']:,} references, "
        f"{summary['tied_share']:.1%} tied, {summary['prompts_without_resolution']:,} prompts without resolution"
    )


def make_tables(options: argparse.Namespace) -> Any:
    """Draw and score rollouts; None after a dry run."""
    from calibrated_rewards.calibration.calibrate import REWARD, calibrate
    from calibrated_rewards.calibration.sources import prompts_from

    refuse_options(options, {"completions": None, "scores": []}, "they belong to --rollouts")
    rounds = parse_adaptive(options)
    source = {name: getattr(options, name) for name in ("column", "id_column", "split", "limit")}
    prompts, source = check_prompts(options.prompts, source) if options.prompts else (None, source)
    sampler = model_options.load_policy(options) if options.policy else None
    if options.dry_run:
        print_forecast(options, None if prompts is None else prompts_from(prompts, **source), sampler)
        return None
    scorers = model_options.load_reward_models(options)
    model_options.check_costs(options.out / "run.json", scorers if isinstance(scorers, dict) else {REWARD: scorers})
    if sampler is not None and not options.ray:  # a worker loads models of its own
        for scorer in scorers.values() if isinstance(scorers, dict) else [scorers]:
            sampler = share_with_head(sampler, scorer)
    settings = {"k": options.k, "seed": options.seed, "adaptive": rounds, **collect_run_settings(options)}
    tables = calibrate(prompts, sampler, scorers, options.out, **settings, **source)
    note_reward_models(options.out, scorers)
    return tables


def note_reward_models(out: Path, scorers: Any) -> None:
    """Write down where the reward models were loaded from, for the command that `recommend` prints."""
    from calibrated_rewards.calibration.calibrate import REWARD
    from calibrated_rewards.calibration.run_directory import RunDirectory

    named = scorers if isinstance(scorers, Mapping) else {REWARD: scorers}
    names = {name: scorer.recipe.name for name, scorer in named.items() if isinstance(scorer, Loaded)}
    places = {name: os.path.abspath(place) if os.path.exists(place) else place for name, place in names.items()}
    if places:
        RunDirectory(out).note_reward_models(places)


def check_prompts(place: str, source: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read and check all prompts before models are loaded; return what to read them from again, and how.

    A file is read twice. Prompts from the Hub are kept in memory, since they would be downloaded twice.
    """
    from calibrated_rewards.calibration.run import Ids, plan_prompts
    from calibrated_rewards.calibration.sources import prompts_from
    from calibrated_rewards.prompts import prompt_key

    downloads, ids, empty = [], Ids({}), True
    is_here = os.path.exists(place)
    for each in prompts_from(place, **source):
        empty = False
        ids.add(each, prompt_key(each.prompt))
        plan_prompts([each.prompt], None)
        if not is_here:
            downloads.append(each)
    if empty:
        raise ValueError(f"--prompts {place} has no prompts")
    return (place, source) if is_here else (downloads, {})


def parse_adaptive(options: argparse.Namespace) -> "Adaptive | None":
    """Build the rounds of --adaptive, and refuse its options where it is missing."""
    if options.adaptive is None:
        names = dict.fromkeys(("transform", "rounds", "budget"))
        refuse_options(options, names, "they belong to --adaptive")
        return None
    named: NamedTransform | None = options.transform
    if named is not None and named.kl is not None and not isinstance(named.procedure, BestOf | WorstOf):
        raise ValueError(
            f"--transform: the rounds of --adaptive are the same at every KL, leave it out of {named.name}"
        )
    if options.k is not None:
        raise ValueError("-k: with --adaptive, --rounds say how many rollouts there are, leave it out")
    from calibrated_rewards.calibration.adaptive import Adaptive
    from calibrated_rewards.theory.scale import scaled

    rounds = options.rounds or ROUNDS
    if options.budget is not None and options.budget < rounds[0]:
        raise ValueError(f"--budget needs the {rounds[0]} rollouts of the first round or more, got {options.budget}")
    transform = scaled(named.transform if named else Identity(), "unit")
    return Adaptive(transform, options.adaptive, rounds, budget=options.budget)


def parse_rounds(text: str) -> tuple[int, ...]:
    """Parse --rounds, whole numbers that rise.

    >>> parse_rounds("16,32")
    (16, 32)
    """
    try:
        rounds = tuple(map(int, text.split(",")))
    except ValueError:
        rounds = ()
    if not rounds or rounds[0] < 1 or any(after <= before for before, after in pairwise(rounds)):
        raise argparse.ArgumentTypeError(f"rounds are whole numbers that rise, such as 16,32,64, got {text!r}")
    return rounds


def print_forecast(options: argparse.Namespace, prompts: Any, sampler: Any) -> None:
    """Time a trial and print what the run would take."""
    from calibrated_rewards.calibration.calibrate import REWARD
    from calibrated_rewards.calibration.dry_run import forecast
    from calibrated_rewards.calibration.run_directory import RunDirectory
    from calibrated_rewards.calibration.work import Work

    scorers = model_options.load_reward_models(options)
    work = Work(sampler, scorers if isinstance(scorers, dict) else {REWARD: scorers}, options.seed)
    rounds = parse_adaptive(options)
    estimate = forecast(RunDirectory(options.out), prompts, work, rounds.rounds[-1] if rounds else options.k)
    most = f"at most; with --adaptive, {rounds.rounds[0]} rollouts a prompt or more\n" if rounds else ""
    sys.stdout.write(f"{estimate}\n{most}nothing was written to {options.out}\n")


def import_tables(options: argparse.Namespace) -> Any:
    """Make tables of rollouts that were made elsewhere, with their scores or scored here."""
    from calibrated_rewards.calibration.calibrate import import_rollouts
    from calibrated_rewards.calibration.importing import read_rollouts

    names = {"prompts": None, "policy": None, "limit": None, "k": None, "dry_run": False}
    refuse_options(options, names, "--rollouts has the prompts, and nothing is drawn")
    columns = {"prompt": options.column, "completions": options.completions}
    source = {**columns, "id_column": options.id_column, "split": options.split}
    scores = parse_score_columns(options.scores)
    if options.reward_model and not sum(1 for _ in read_rollouts(options.rollouts, scores=scores or {}, **source)):
        raise ValueError(f"--rollouts {options.rollouts} has no rollouts")
    scorers = model_options.load_reward_models(options) if options.reward_model else None
    settings = collect_run_settings(options)
    tables = import_rollouts(options.rollouts, options.out, scorers, scores=scores, **settings, **source)
    note_reward_models(options.out, scorers)
    return tables


def parse_score_columns(texts: list[str]) -> str | dict[str, str] | None:
    """Parse --scores: one column, or a column for each name."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    pairs = [text.partition("=") for text in texts]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"of several, each --scores needs a name, NAME=COLUMN; got {', '.join(texts)}")
    return {name: column for name, _, column in pairs}


def collect_run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of a run, whether it draws or imports."""
    cluster = None
    if options.ray is not None:
        from calibrated_rewards.calibration.cluster import RayCluster

        cluster = RayCluster(options.ray, num_gpus=options.ray_gpus)
    return {
        "prompts_per_shard": options.prompts_per_shard,
        "cluster": cluster,
        "show_progress": not options.quiet,
    }
