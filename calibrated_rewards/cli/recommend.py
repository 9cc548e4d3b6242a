"""`calibrated-rewards recommend`: say which transform and beta to train with, what it buys, and whether K is enough."""

import argparse
import json
import sys
from pathlib import Path

from calibrated_rewards.cli.options import Real, Whole, parse_best_of
from calibrated_rewards.theory.named import ByRank
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

EPILOG = """examples:
  calibrated-rewards recommend table/ --best-of 8
  calibrated-rewards recommend table/ --best-of 8 --kl 1 --judge judge     a second scorer of the same rollouts judges
  calibrated-rewards recommend table/ --worst-of 16 --out recommendation.json

The answer comes first: the transform and the beta to train with, how often the policy should win at serving, against
the raw reward at the same KL, and whether the table has references enough. Then the command that makes the reward, one
table of the alternatives, and what the numbers rest on. Nothing is trained and nothing is drawn.

DIR is the folder of a calibration, or of a bare table. To have a judge, calibrate with two reward models
(--reward-model NAME=..., twice). `calibrated-rewards frontier` compares more rewards, at several KLs. Exit code: 0
done, 2 wrong usage, or a table that cannot reach the KL."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `recommend`."""
    add = parser.add_argument
    add("table", type=Path, metavar="DIR", help="the folder of a calibration, or of a bare table")
    served = parser.add_mutually_exclusive_group()
    text = "serve the best of N draws; 1-N for an N that is not known (4)"
    served.add_argument("--best-of", type=parse_best_of, metavar="N", help=text)
    served.add_argument("--worst-of", type=Whole(1), metavar="N", help="an attacker takes the worst of N draws")
    add("--kl", type=Real(0.0, above=True), default=0.5, metavar="NATS", help="KL from the reference policy (0.5)")
    add("--select", metavar="NAME", help="the reward model to train for and to select by (reward)")
    add("--judge", metavar="NAME", help="a scorer that judges; default: the other one, if there are two")
    estimators, text = ("empirical", "posterior", "unbiased", "randomised"), "how K references estimate a quantile"
    add("--estimator", choices=estimators, help=f"{text}; default: the better of the first two at this K")
    add("--out", type=Path, metavar="FILE", help="save the answer as JSON")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Recommend, and print or save the answer."""
    from calibrated_rewards.evaluation.recommend import recommend

    if options.out is not None and options.out.is_dir():
        raise ValueError(f"--out needs a file, got the folder {options.out}")
    answer = recommend(
        options.table,
        choose_procedure(options.best_of, options.worst_of),
        options.kl,
        select=options.select,
        judge=options.judge,
        estimator=options.estimator,
    )
    if options.out is not None:
        answer.save(options.out)
    sys.stdout.write(f"{json.dumps(answer.as_json(), indent=2) if options.json else answer}\n")
    return 0


def choose_procedure(best_of: ByRank | None, worst_of: int | None) -> ByRank:
    """Choose the procedure that the options name: best of 4 by default, and one draw for best or worst of 1.

    >>> choose_procedure(None, None), choose_procedure(BestOf(1), None), choose_procedure(None, 16)
    (BestOf(n=4), Standard(), WorstOf(n=16))
    """
    procedure = BestOf(4) if best_of is None else best_of
    procedure = procedure if worst_of is None else WorstOf(worst_of)
    return Standard() if procedure.draws == 1 else procedure
