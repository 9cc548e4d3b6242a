"""Arms of the proof ladder: the log-ratios that each is trained to, and what a trained policy wins at equal KL.

An arm is an objective by name (`evaluation.objectives`). `compute_targets` turns the scores of a prompt's K rollouts
into the log-ratios of its optimum at a KL on those rollouts. A trained policy is a line of policies, reference +
factor (trained - reference) in the weights; `measure` takes fresh draws of one of them, `interpolate` reads a line at
a KL, and `compare` gives the realised share at that KL: what the arm gains over another one, over the difference
between their optima.

>>> rng = np.random.default_rng(0)
>>> scores = rng.normal(size=(4, 64))
>>> targets = compute_targets("worst-of:4", scores, 0.25)
>>> omega = np.exp(targets.log_ratios)
>>> round(float((omega * targets.log_ratios).mean()), 6), omega.mean(axis=1).round(9)
(0.25, array([1., 1., 1., 1.]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.evaluation.estimates import Estimate, Samples, difference
from calibrated_rewards.evaluation.held_out import realised_share
from calibrated_rewards.evaluation.objectives import Objective, parse_objective
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL
from calibrated_rewards.evaluation.win_rate import WeightedPools, win_rate, win_rates_of
from calibrated_rewards.reward.calibrators import Calibration
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Standard, WorstOf

Array: TypeAlias = npt.NDArray[np.float64]

ARMS = (
    "raw",
    "z-score",
    "par",
    "identity",
    "log",
    "exp:10",
    "best-of:4",
    "best-of:16",
    "worst-of:4",
    "worst-of:16",
)
# Those that know nothing of the procedure.
OTHERS = ("raw", "z-score", "par", "identity")
PROCEDURES: dict[str, CalibratedProcedure] = {
    "one draw": Standard(),
    "best of 4": BestOf(4),
    "best of 16": BestOf(16),
    "best of 32": BestOf(32),
    "worst of 4": WorstOf(4),
    "worst of 16": WorstOf(16),
}
JUDGES = ("reward", "judge")
Rates: TypeAlias = Mapping[str, Mapping[str, Float[np.ndarray, " P"]]]
"""Win rates of each prompt, by judge, then by procedure."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What an arm is trained to on the K rollouts of each prompt: log omega = v / beta - log Z, of mean KL `kl`."""

    arm: str
    kl: float
    beta: float
    values: Float[np.ndarray, "P K"]
    """The arm's rewards v of the rollouts."""
    log_z: Float[np.ndarray, " P"]

    @property
    def log_ratios(self) -> Float[np.ndarray, "P K"]:
        """The optimum's log pi - log pi_ref of each rollout, whose exponentials have the mean 1 in each prompt."""
        return self.values / self.beta - self.log_z[:, None]


@cache
def get_reward(arm: str, kl: float) -> Calibration:
    """Return what an arm maximises at a KL; an optimum is solved for once, which takes a second or two."""
    objective = parse_objective(arm)
    if not isinstance(objective, Objective):
        raise ValueError(f"an arm needs one reward at each KL, got {arm!r}, whose reward changes with the policy.")
    return objective.at(kl)


def compute_targets(arm: str, scores: npt.ArrayLike, kl: float) -> Targets:
    """Compute an arm's targets at a KL: rewards of the rollouts among each other, and the beta of that KL on them."""
    rows = np.asarray(scores, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"compute_targets needs scores of P prompts x K rollouts, got shape {rows.shape}.")
    table = ReferenceTable.build((at.to_bytes(16, "big"), row) for at, row in enumerate(rows))
    each = np.repeat(np.arange(len(rows)), rows.shape[1])
    values = np.asarray(get_reward(arm, kl)(table, each, rows.ravel()), np.float64).reshape(rows.shape)
    pools = WeightedPools(Samples(rows))
    beta = pools.beta_for_kl(values, kl)
    top = values.max(axis=1, keepdims=True)
    log_z = (top / beta)[:, 0] + np.log(np.exp((values - top) / beta).mean(axis=1))
    return Targets(arm, kl, beta, values, log_z)


@dataclass(frozen=True, eq=False)
class Point:
    """A policy on the line from the reference to the trained weights: its KL and win rates for each prompt."""

    factor: float
    kl: Float[np.ndarray, " P"]
    rates: Rates

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON holds it."""
        rates = {judge: {name: row.tolist() for name, row in rows.items()} for judge, rows in self.rates.items()}
        return {"factor": self.factor, "kl": self.kl.tolist(), "rates": rates}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Point:
        """Read what `to_json` returned."""
        rates = {judge: {name: np.array(row) for name, row in rows.items()} for judge, rows in content["rates"].items()}
        return cls(content["factor"], np.array(content["kl"]), rates)


def measure(factor: float, policy: Samples, references: Samples, kl: npt.ArrayLike) -> Point:
    """Measure a policy by fresh draws against the reference's, by the score that selects and by the judge.

    `kl` is that of each prompt; procedures with more draws than there are responses are left out.
    """
    fewest = min(policy.sizes.min(), references.sizes.min())
    procedures = {name: each for name, each in PROCEDURES.items() if each.draws <= fewest}
    rates = {}
    for judge in JUDGES:
        ours, theirs = (Samples(each.select) if judge == "reward" else each for each in (policy, references))
        rates[judge] = {
            name: win_rate(ours, theirs, each, jackknife=False).per_prompt for name, each in procedures.items()
        }
    return Point(factor, np.asarray(kl, np.float64), rates)


def weigh(factor: float, log_ratios: npt.ArrayLike, references: Samples) -> Point:
    """Measure a policy by its log-ratios on many reference rollouts (thousands a prompt): paired between policies."""
    pool = RolloutsAtKL(references, tuple(PROCEDURES.values()))
    d = np.asarray(log_ratios, np.float64)
    weights, kl = pool.pools.tilted(d, 1.0)
    outputs = [pool.pools.output(weights, procedure) for procedure in pool.procedures]
    rates = {}
    for judge, beaten in zip(JUDGES, pool.beaten, strict=False):  # without a judge there is one row
        sides = zip(PROCEDURES, outputs, pool.base, beaten, strict=True)
        own = judge == "reward"
        rates[judge] = {name: win_rates_of(output, base, each, itself=own) for name, output, base, each in sides}
    return Point(factor, kl, rates)


def interpolate(points: Iterable[Point], kl: float) -> Point:
    """Read a line of policies at a mean KL, between the two next to it; ValueError if it does not reach so far."""
    line = sorted(points, key=lambda point: point.kl.mean())
    for low, high in pairwise(line):
        first, last = float(low.kl.mean()), float(high.kl.mean())
        if first <= kl <= last:
            t = (kl - first) / (last - first) if last > first else 0.0
            rates = {
                judge: {name: (1 - t) * row + t * high.rates[judge][name] for name, row in rows.items()}
                for judge, rows in low.rates.items()
            }
            return Point((1 - t) * low.factor + t * high.factor, (1 - t) * low.kl + t * high.kl, rates)
    reached = [round(float(point.kl.mean()), 4) for point in line]
    raise ValueError(f"interpolate needs points of a KL below and above {kl}, got {reached}.")


def predict_optima(references: Samples, kl: float, arms: Sequence[str] = ARMS) -> dict[str, Point]:
    """Compute each arm's optimum on reference rollouts that no training has seen, at a KL."""
    pool = RolloutsAtKL(references, tuple(PROCEDURES.values()))
    optima = {}
    for arm in arms:
        found = pool.reweight(arm, get_reward(arm, kl), kl)
        columns = iter(found.win_rates.T)
        rates = {judge: {name: next(columns) for name in PROCEDURES} for judge in JUDGES}
        optima[arm] = Point(1.0, np.full(len(references), kl), rates)
    return optima


def compare(
    trained: Mapping[str, Point], optima: Mapping[str, Point], arm: str, other: str, procedure: str, judge: str
) -> dict[str, Any]:
    """Compare a trained arm with another one of the same KL: gain, tabular gap and realised share with its interval.

    Gain and gap in win rate; the interval resamples prompts, and is None where the gap cannot be told from 0.
    """

    def rate(points: Mapping[str, Point], name: str) -> Estimate:
        return Estimate(points[name].rates[judge][procedure])

    ours, theirs, best, best_other = (rate(points, name) for points in (trained, optima) for name in (arm, other))
    gain, gap = difference(ours, theirs), difference(best, best_other)
    row: dict[str, Any] = {"arm": arm, "other": other, "procedure": procedure, "judge": judge}
    row |= {"trained": ours.value, "trained_other": theirs.value, "gain": gain.value, "gap": gap.value}
    try:
        share = realised_share(ours, theirs, best, best_other)
    except ValueError:
        return {**row, "share": None}
    return {**row, "gain_interval": gain.interval(), "share": share.value, "share_interval": [share.low, share.high]}


def choose_best_other(trained: Mapping[str, Point], procedure: str, judge: str) -> str:
    """Choose which of the arms that do not know the procedure wins most."""
    there = [name for name in OTHERS if name in trained]
    if not there:
        raise ValueError(f"needs one of {', '.join(OTHERS)} to compare with, got {', '.join(trained)}.")
    return max(there, key=lambda name: float(trained[name].rates[judge][procedure].mean()))
