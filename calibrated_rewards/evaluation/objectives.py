"""Objectives: what can be maximised in place of the raw score, and compared at equal KL.

An `Objective` is a reward v for each KL: a transform of the quantile, the raw score, a peer's calibration. An
`ObjectiveOfPolicy` has a reward that changes with the policy, as the objectives of rivals that know N but have no
reference do: the optimum is then a fixed point. `OBJECTIVES` names those that are compared by default.

>>> table = ReferenceTable.build([("p", [1.0, 2.0, 4.0, 8.0])])
>>> Transformed(Exponential(2.0))(table, table.rows(["p", "p"]), [1.0, 8.0]).round(3)
array([1.284, 5.755])
>>> list(default_objectives([BestOf(2)]))[-1]
'best-of:2'
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

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
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import format_name, make_named
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform

Array: TypeAlias = npt.NDArray[np.float64]


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


@runtime_checkable
class ObjectiveOfPolicy(Protocol):
    """An objective J(pi) whose reward is its derivative by the policy's weights, so that it changes with the policy."""

    def rewards(self, scores: Float[np.ndarray, "P K"], weights: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        """Return the reward of each rollout under a policy with these weights; scores ascend along each row."""


AnyObjective: TypeAlias = Objective | ObjectiveOfPolicy


@dataclass(frozen=True)
class ExpectedScore:
    """The mean raw score of what the procedure selects: J = E[r(T_pi)].

    For best of N that is the objective of IAMA (arXiv 2602.01603), of PKPO (2505.15201) and of max@k; for
    `BestOfUpTo(N)` it is TailRL's (2609.02987) up to N. The derivative is the integral of g(C_pi) up to the score.
    """

    procedure: CalibratedProcedure

    def rewards(self, scores: Float[np.ndarray, "P K"], weights: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        """Return sum over the gaps below a score of g(F) times the gap, with F the policy's CDF in the gap."""
        below = np.minimum(np.cumsum(weights, axis=1)[:, :-1], 1.0)
        steps = self.procedure.density(below, 1.0 - below) * np.diff(scores, axis=1)
        return np.hstack([np.zeros((len(scores), 1)), np.cumsum(steps, axis=1)])


@dataclass(frozen=True)
class ExponentialUtility:
    """The soft maximum of RS-GRPO (arXiv 2509.24261): J = (1/b) log E[e^{b r}], with derivative e^{b r} / (b E)."""

    b: float = 2.0

    def rewards(self, scores: Float[np.ndarray, "P K"], weights: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        """Return e^{b r} over b times its mean under the policy, less that of the highest score."""
        exponents = self.b * (scores - scores[:, -1:])
        mean = np.sum(weights * np.exp(exponents), axis=1, keepdims=True)
        return np.asarray(np.expm1(exponents) / (self.b * mean))


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


# Published methods that know N, or weigh high scores more, and have no reference; by command-line name, with a number.
RIVALS: dict[str, Callable[[float], ObjectiveOfPolicy]] = {
    "iama": lambda n: ExpectedScore(BestOf(int(n))),
    "tailrl": lambda n: ExpectedScore(BestOfUpTo(int(n))),
    "rs-grpo": ExponentialUtility,
}


def rival_objectives(procedures: Iterable[Procedure]) -> dict[str, AnyObjective]:
    """Return the rivals for the N of each best-of-N, by command-line name.

    >>> list(rival_objectives([BestOf(4)]))
    ['iama:4', 'tailrl:4', 'rs-grpo:2']
    """
    sizes = [each.n for each in procedures if isinstance(each, BestOf | BestOfUpTo)]
    names = [f"{kind}:{n}" for n in sizes for kind in ("iama", "tailrl")]
    return {name: parse_objective(name) for name in [*names, "rs-grpo:2"]}


def default_objectives(procedures: Iterable[Procedure]) -> dict[str, AnyObjective]:
    """Return the usual objectives by command-line name: raw first, last the optimum for each best and worst of N.

    Exponentials that fall, which avoid the worst completions, are included for worst-of-N alone.
    """
    procedures = list(procedures)
    worst = any(isinstance(each, WorstOf) for each in procedures)
    objectives = {name: each for name, each in OBJECTIVES.items() if worst or not name.startswith("exp:-")}
    several = [each for each in procedures if isinstance(each, BestOf | BestOfUpTo | WorstOf)]
    return {**objectives, **{format_name(each): OptimumAtKL(each) for each in several}}


def parse_objective(name: str) -> AnyObjective:
    """Parse the name of an objective: one of `OBJECTIVES`, exp:T, best-of:N, best-of:1-N, worst-of:N or a rival's.

    ValueError for any other name, also one with a KL (`best-of:4:0.5`): objectives are compared at given KLs.

    >>> parse_objective("best-of:8"), parse_objective("log").at(1.0)
    (OptimumAtKL(procedure=BestOf(n=8)), Transformed(transform=Log()))
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    kind, _, number = name.partition(":")
    if kind in RIVALS and name.isascii() and number.replace(".", "", kind == "rs-grpo").isdecimal() and float(number):
        return RIVALS[kind](float(number))
    thing, kl = make_named(name)
    if thing is None or kl is not None:
        rivals = "iama:N, tailrl:N or rs-grpo:B"
        names = f"{', '.join(OBJECTIVES)}, exp:T, best-of:N, best-of:1-N, worst-of:N, {rivals}"
        raise ValueError(f"an objective is {names}, without a KL, got {name!r}")
    if isinstance(thing, BestOf | BestOfUpTo | WorstOf):
        return OptimumAtKL(thing)
    return Fixed(Transformed(scaled(thing, "unit")))
