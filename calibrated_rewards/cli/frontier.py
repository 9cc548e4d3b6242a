"""`calibrated-rewards frontier`: what training for each reward will give, from the calibrated rollouts alone."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calibrated_rewards.cli.errors import Real, Whole
from calibrated_rewards.evaluation.objectives import Objective, default_objectives, parse_objective
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Standard, WorstOf

if TYPE_CHECKING:
    from calibrated_rewards.evaluation.estimates import Samples
    from calibrated_rewards.evaluation.results import FrontierEstimate

EPILOG = """examples:
  calibrated-rewards frontier table/                                   every reward, at KL .5, 1 and 2
  calibrated-rewards frontier table/ --select reward --judge judge     selected by one scorer, judged by another
  calibrated-rewards frontier table/ --arms raw identity exp:10 best-of:4 --best-of 4 --kl 0.5
  calibrated-rewards frontier table/ --out frontier.json --plot frontier.png

DIR is the directory of a calibration: its rollouts, scored by one reward model or by several, are reweighted to the
exact optimum for each reward, all at the same KL. Calibrate with several (--reward-model name=..., twice) to have a
judge. Of a bare table the scores themselves judge.

An arm is raw, z-score, par (arXiv 2502.18770), median, log-sigmoid (arXiv 2402.00742), or a transform as --transform
has it elsewhere: identity, log, exp:T, best-of:N and worst-of:N (the optimum at each KL). Gains are over the first.

K rollouts reach a KL well below log K. What rests on too few is marked; docs/evidence/results.md has measured errors.
Exit code: 0 done, 2 wrong usage, or something that cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("table", type=Path, metavar="DIR", help="of a calibration, or of a bare table")
    parser.add_argument("--select", metavar="NAME", help="the reward model to train for and select by (reward)")
    parser.add_argument("--judge", metavar="NAME", help="the scorer that judges besides; the other one, of two")
    parser.add_argument(
        "--kl", type=Real(0.0, above=True), nargs="+", default=[0.5, 1.0, 2.0], metavar="NATS", help="0.5 1 2"
    )
    parser.add_argument(
        "--best-of", type=Whole(1), nargs="+", metavar="N", help="procedures besides single responses: 4"
    )
    parser.add_argument("--worst-of", type=Whole(1), nargs="+", metavar="N", help="the attacker's best of N: 4")
    parser.add_argument("--arms", type=arm, nargs="+", metavar="NAME", help="which rewards, the first as the baseline")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep it as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="win rate against KL, a panel a procedure")
    parser.add_argument("--json", action="store_true", help="an object in place of tables")


def arm(name: str) -> tuple[str, Objective]:
    """Parse the name of an objective, for argparse.

    >>> arm("best-of:8")
    ('best-of:8', OptimumAtKL(procedure=BestOf(n=8)))
    """
    try:
        return name, parse_objective(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def procedures(options: argparse.Namespace) -> list[CalibratedProcedure]:
    """Single responses, and the best and the worst of N as asked; both of 4 if neither is."""
    neither = options.best_of is None and options.worst_of is None
    best, worst = ([4], [4]) if neither else (options.best_of or [], options.worst_of or [])
    return [Standard(), *map(BestOf, best), *map(WorstOf, worst)]


def run(options: argparse.Namespace) -> int:
    """Read, compare, and say, keep or draw it."""
    for name, path in (("--out", options.out), ("--plot", options.plot)):
        if path is not None and path.is_dir():
            raise ValueError(f"{name} needs a file, got the folder {path}")
    from calibrated_rewards.evaluation.frontier import estimate_frontier

    references, select, judge = read(options.table, options.select, options.judge)
    asked = procedures(options)
    arms = dict(options.arms) if options.arms else default_objectives(asked)
    found = estimate_frontier(references, arms, options.kl, asked, selected_by=select, judged_by=judge)
    if options.out is not None:
        found.save(options.out)
    if options.plot is not None:
        draw(found, options.plot)
    sys.stdout.write(f"{json.dumps(found.as_json(), indent=2) if options.json else found}\n")
    return 0


def read(at: Path, select: str | None, judge: str | None) -> "tuple[Samples, str, str]":
    """The rollouts of a run by one scorer or two, or the scores of a bare table; and the scorers' names."""
    from calibrated_rewards.evaluation.estimates import Samples
    from calibrated_rewards.table.reference_table import ReferenceTable

    if not any((at / "rollouts").glob("*.parquet")):
        if (at / "reward.json").is_file():
            raise ValueError(
                f"{at} is a calibrated reward: name the directory of its calibration, or {at / 'table'}, its bare table"
            )
        if not (at / "table.json").is_file():
            raise ValueError(f"{at} needs rollouts/*.parquet or a table.json, got neither: not calibrated yet?")
        if select is not None or judge is not None:
            raise ValueError(f"{at} is a bare table: --select and --judge need a run with rollouts, got none.")
        return Samples([scores for _, scores in ReferenceTable.load(at).items()]), "reward", "judge"
    from calibrated_rewards.evaluation.responses import find_scorers, read_scores

    names = find_scorers(at)
    select = select or _default(names, at)
    others = [name for name in names if name != select]
    judge = judge or (others[0] if len(others) == 1 else "judge" if "judge" in others else None)
    return read_scores(at, select, judge), select, judge or select


def _default(names: list[str], at: Path) -> str:
    if len(names) == 1 or "reward" in names:
        return names[0] if len(names) == 1 else "reward"
    raise ValueError(f"--select needs one of {', '.join(names) or 'no scorers'} of {at}, got none.")


def draw(found: "FrontierEstimate", path: Path) -> None:
    """A figure: a row a judge, a panel a procedure."""
    from matplotlib.figure import Figure

    from calibrated_rewards.evaluation import plots

    judges, count = list(found.points[0].win_rates), len(found.procedures)
    figure = Figure(figsize=(4.2 * count, 3.6 * len(judges)), layout="constrained")
    axes = figure.subplots(len(judges), count, squeeze=False)
    for judge, row in zip(judges, axes, strict=True):
        for procedure, ax in zip(found.procedures, row, strict=True):
            own = plots.reweighted(found, procedure, judge, ax=ax).get_legend()
            if own is not None:
                own.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
