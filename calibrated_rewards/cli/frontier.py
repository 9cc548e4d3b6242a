"""`calibrated-rewards frontier`: estimate what training for each reward would achieve, from the rollouts alone."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from calibrated_rewards.cli.options import Real, Whole, parse_best_of
from calibrated_rewards.evaluation.objectives import AnyObjective, default_objectives, parse_objective, rival_objectives
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Standard, WorstOf

if TYPE_CHECKING:
    from calibrated_rewards.evaluation.frontier_results import FrontierEstimate

EPILOG = """examples:
  calibrated-rewards frontier table/                                   every reward, best and worst of 4 at KL 0.5
  calibrated-rewards frontier table/ --best-of 8 --kl 0.5 1 2          one procedure at several KLs
  calibrated-rewards frontier table/ --select reward --judge judge     selected by one scorer, judged by another
  calibrated-rewards frontier table/ --arms raw identity exp:10 best-of:4 --best-of 4 --kl 0.5
  calibrated-rewards frontier table/ --arms best-of:1-16 best-of:4 best-of:16 --best-of 1 4 16      N is not known
  calibrated-rewards frontier table/ --best-of 4 --estimator posterior      with the beta of recommend's estimator
  calibrated-rewards frontier table/ --out frontier.json --plot frontier.png

DIR is the folder of a calibration. Its rollouts, scored by one reward model or by several, are reweighted to the exact
optimum for each reward, all at the same KL. To have a judge, calibrate with two reward models (--reward-model NAME=...,
twice). In a bare table the scores themselves judge.

--arms takes raw, z-score, par (arXiv 2502.18770), median, log-sigmoid (arXiv 2402.00742), or a transform: identity,
log, exp:T, best-of:N, best-of:1-N (where N is not known) or worst-of:N. The last three are the optimum at each --kl, so
unlike --transform best-of:N:KL they name no KL themselves. Gains are over the first.

K rollouts reach a KL well below log K. Numbers that rest on too few rollouts are marked; docs/evidence/results.md has
measured errors. Exit code: 0 done, 2 wrong usage, or something that cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `frontier`."""
    add = parser.add_argument
    add("table", type=Path, metavar="DIR", help="the folder of a calibration, or of a bare table")
    add("--select", metavar="NAME", help="the reward model to train for and to select by (reward)")
    add("--judge", metavar="NAME", help="a scorer that judges too; default: the other one, if there are two")
    text = "distances from the reference policy, in nats (0.5 1 2)"
    add("--kl", type=Real(0.0, above=True), nargs="+", default=[0.5, 1.0, 2.0], metavar="NATS", help=text)
    text = "best of N, or 1-N for an N that is not known, beside single responses (4)"
    add("--best-of", type=parse_best_of, nargs="+", metavar="N", help=text)
    add("--worst-of", type=Whole(1), nargs="+", metavar="N", help="worst of N, an attacker's best (4)")
    text = "how K references estimate a quantile (%(default)s): beta is for rewards with it"
    add("--estimator", choices=get_args(Estimator), default="empirical", help=text)
    add("--rivals", action="store_true", help="compare with IAMA, TailRL and RS-GRPO too, at their own optimum")
    add("--all", action="store_true", help="print a table for each KL and judge, with all procedures")
    add(
        "--arms",
        type=parse_arm,
        nargs="+",
        metavar="NAME",
        help="objectives: the rewards to compare, the baseline first",
    )
    add("--out", type=Path, metavar="FILE", help="save the result as JSON")
    add("--plot", type=Path, metavar="FILE", help="plot win rate against KL, a panel for each procedure")
    add("--json", action="store_true", help="print JSON in place of tables")


def parse_arm(name: str) -> tuple[str, AnyObjective]:
    """Parse the name of an objective, for argparse.

    >>> parse_arm("best-of:8")
    ('best-of:8', OptimumAtKL(procedure=BestOf(n=8)))
    """
    try:
        return name, parse_objective(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    """Compare the rewards, and print, save or plot the result."""
    for name, path in (("--out", options.out), ("--plot", options.plot)):
        if path is not None and path.is_dir():
            raise ValueError(f"{name} needs a file, got the folder {path}")
    from calibrated_rewards.evaluation.frontier import estimate_frontier
    from calibrated_rewards.evaluation.references import read_references

    references = read_references(options.table, options.select, options.judge)
    neither = options.best_of is None and options.worst_of is None
    best, worst = ([BestOf(4)], [4]) if neither else (options.best_of or [], options.worst_of or [])
    procedures: list[CalibratedProcedure] = [Standard(), *best, *map(WorstOf, worst)]
    arms = dict(options.arms) if options.arms else default_objectives(procedures)
    arms |= rival_objectives(procedures) if options.rivals else {}
    frontier = estimate_frontier(
        references.samples,
        arms,
        options.kl,
        procedures,
        selected_by=references.selected_by,
        judged_by=references.judged_by,
        table=references.table,
        estimator=options.estimator,
    )
    if options.out is not None:
        frontier.save(options.out)
    if options.plot is not None:
        save_plot(frontier, options.plot)
    sys.stdout.write(f"{json.dumps(frontier.as_json(), indent=2) if options.json else frontier.format(options.all)}\n")
    return 0


def save_plot(frontier: "FrontierEstimate", path: Path) -> None:
    """Save a plot with a row for each judge and a panel for each procedure."""
    from matplotlib.figure import Figure

    from calibrated_rewards.evaluation import plots

    judges, count = list(frontier.points[0].win_rates), len(frontier.procedures)
    figure = Figure(figsize=(4.2 * count, 3.6 * len(judges)), layout="constrained")
    axes = figure.subplots(len(judges), count, squeeze=False)
    for judge, row in zip(judges, axes, strict=True):
        for procedure, ax in zip(frontier.procedures, row, strict=True):
            legend = plots.reweighted(frontier, procedure, judge, ax=ax).get_legend()
            if legend is not None:
                legend.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
