"""Objectives to compare without training: rewards that may be maximised in place of the raw score.

>>> table = ReferenceTable.build([("p", [1.0, 2.0, 4.0, 8.0])])
>>> Transformed(Exponential(2.0))(table, table.rows(["p", "p"]), [1.0, 8.0]).round(3)
array([1.284, 5.755])
>>> list(default_objectives([BestOf(2)]))[-1]
'best-of:2'
"""

from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.reward.calibrators import (
    Calibration,
    EmpiricalCDF,
    LogSigmoidAtQuantile,
    MedianCentered,
    SmoothedCDF,
    Uncalibrated,
    ZScore,
)
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.named import format_name, parse_procedure, parse_transform
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform


@runtime_checkable
class Objective(Protocol):
    """A reward to compare, which may be another one at each KL."""

    def at(self, kl: float) -> Calibration:
        """Return the reward that is maximised at a KL from the reference."""


@dataclass(frozen=True)
class Fixed:
    """One reward, the same at every KL."""

    reward: Calibration

    def at(self, kl: float) -> Calibration:
        """Return the reward, whatever the KL."""
        return self.reward


@dataclass(frozen=True)
class OptimumAtKL:
    """The exact optimum for a procedure at each KL (Corollary 2)."""

    procedure: CalibratedProcedure

    def at(self, kl: float) -> Calibration:
        """Solve for the optimal transform at this KL."""
        return Transformed(optimum(self.procedure, kl=kl).transform)


@dataclass(frozen=True)
class Transformed:
    """A transform of the calibrated score, as `CalibratedReward` computes it but for the finite-K estimator."""

    transform: Transform

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return the transform of the scores' quantiles among their references."""
        return np.asarray(self.transform(EmpiricalCDF()(table, rows, scores)), np.float64)


def _exponential(t: float) -> Fixed:
    # On the unit scale, as a CalibratedReward has it, so that the betas are its betas.
    return Fixed(Transformed(scaled(Exponential(t), "unit")))


OBJECTIVES: dict[str, Objective] = {
    "raw": Fixed(Uncalibrated()),
    "z-score": Fixed(ZScore()),
    "par": Fixed(SmoothedCDF()),
    "median": Fixed(MedianCentered()),
    "log-sigmoid": Fixed(LogSigmoidAtQuantile()),
    "identity": Fixed(Transformed(Identity())),
    "log": Fixed(Transformed(Log())),
    **{f"exp:{t:g}": _exponential(t) for t in (5.0, 10.0, -5.0, -10.0)},
}


def default_objectives(procedures: Iterable[Procedure]) -> dict[str, Objective]:
    """Return the usual objectives by command-line name: raw first, last the optimum for each best and worst of N.

    Exponentials that fall, which avoid the worst completions, are included for worst-of-N alone.
    """
    procedures = list(procedures)
    worst = any(isinstance(each, WorstOf) for each in procedures)
    objectives = {name: each for name, each in OBJECTIVES.items() if worst or not name.startswith("exp:-")}
    optima = {format_name(each): OptimumAtKL(each) for each in procedures if isinstance(each, BestOf | WorstOf)}
    return objectives | optima


def parse_objective(name: str) -> Objective:
    """Parse the name of an objective: one of `OBJECTIVES`, exp:T, best-of:N or worst-of:N; ValueError for another.

    >>> parse_objective("best-of:8"), parse_objective("log").at(1.0)
    (OptimumAtKL(procedure=BestOf(n=8)), Transformed(transform=Log()))
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    try:
        if name.count(":") == 1 and name.startswith(("best-of:", "worst-of:")):
            return OptimumAtKL(parse_procedure(name))
        return Fixed(Transformed(scaled(parse_transform(name).transform, "unit")))
    except (ValueError, ArgumentTypeError):
        message = f"an objective is {', '.join(OBJECTIVES)}, exp:T, best-of:N or worst-of:N, got {name!r}"
        raise ValueError(message) from None
