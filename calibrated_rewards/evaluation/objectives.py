"""What may be maximised in place of the raw score, to be compared without training: transforms, and what peers use.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> table = ReferenceTable.build([("p", [1.0, 2.0, 4.0, 8.0])])
>>> Transformed(Exponential(2.0))(table, table.rows(["p", "p"]), [1.0, 8.0]).round(3)
array([1.284, 5.755])
>>> list(usual_arms([BestOf(2)]))[-1]
'best-of:2'
"""

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
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, WorstOf
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform, scaled


@runtime_checkable
class Arm(Protocol):
    """A reward to compare, which may be another one at each KL."""

    def at(self, kl: float) -> Calibration:
        """What is maximised where the policy may go that far."""


@dataclass(frozen=True)
class AnyKL:
    """The same reward at every KL."""

    reward: Calibration

    def at(self, kl: float) -> Calibration:
        """Return the reward."""
        return self.reward


@dataclass(frozen=True)
class BestAtKL:
    """The exact optimum for a procedure at each KL (Corollary 2)."""

    procedure: CalibratedProcedure

    def at(self, kl: float) -> Calibration:
        """Solve for it."""
        return Transformed(optimum(self.procedure, kl=kl).transform)


@dataclass(frozen=True)
class Transformed:
    """A transform of the calibrated score: what `CalibratedReward` gives, but for the finite-K estimator."""

    transform: Transform

    def __call__(self, table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> Float[np.ndarray, " G"]:
        """Return Phi of the quantiles."""
        return np.asarray(self.transform(EmpiricalCDF()(table, rows, scores)), np.float64)


# On the unit scale, as a CalibratedReward has it, so that their betas are its betas.
ARMS: dict[str, Arm] = {
    "raw": AnyKL(Uncalibrated()),
    "z-score": AnyKL(ZScore()),
    "par": AnyKL(SmoothedCDF()),
    "median": AnyKL(MedianCentered()),
    "log-sigmoid": AnyKL(LogSigmoidAtQuantile()),
    "identity": AnyKL(Transformed(Identity())),
    "log": AnyKL(Transformed(Log())),
    "exp:5": AnyKL(Transformed(scaled(Exponential(5.0), "unit"))),
    "exp:10": AnyKL(Transformed(scaled(Exponential(10.0), "unit"))),
    "exp:-5": AnyKL(Transformed(scaled(Exponential(-5.0), "unit"))),
    "exp:-10": AnyKL(Transformed(scaled(Exponential(-10.0), "unit"))),
}


def usual_arms(procedures: Iterable[Procedure]) -> dict[str, Arm]:
    """The usual ones, raw first, then the optimum for each best-of-N and worst-of-N: by their command-line names.

    Exponentials that flee the bottom are for worst-of-N alone.
    """
    procedures = list(procedures)
    fleeing = any(isinstance(each, WorstOf) for each in procedures)
    found = {name: arm for name, arm in ARMS.items() if fleeing or not name.startswith("exp:-")}
    for procedure in procedures:
        match procedure:
            case BestOf(n=n):
                found[f"best-of:{n}"] = BestAtKL(procedure)
            case WorstOf(n=n):
                found[f"worst-of:{n}"] = BestAtKL(procedure)
    return found
