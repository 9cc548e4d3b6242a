"""The frontier without training: win rate against KL of any reward, from the reference's own rollouts.

The optimum for a reward v is pi*(y) ~ pi_ref(y) e^{v(y)/beta}, so K rollouts of a prompt with weights ~ e^{v/beta}
stand for it, whatever v is: a transform of the quantile, the raw score, a peer's calibration. Such a v is an
`Objective`; `OBJECTIVES` names those that are compared by default. All are brought to one KL and compared.

>>> table = ReferenceTable.build([("p", [1.0, 2.0, 4.0, 8.0])])
>>> Transformed(Exponential(2.0))(table, table.rows(["p", "p"]), [1.0, 8.0]).round(3)
array([1.284, 5.755])
>>> list(default_objectives([BestOf(2)]))[-1]
'best-of:2'
>>> scores = Samples(np.random.default_rng(0).normal(size=(50, 64)))
>>> frontier = estimate_frontier(scores, {name: OBJECTIVES[name] for name in ("raw", "exp:10")}, kls=[0.5])
>>> for point in frontier.points:
...     print(point.arm, point.win_rates["reward"]["BestOf(n=4)"])
raw 0.833 [0.825, 0.840]
exp:10 0.869 [0.869, 0.869]
"""

from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Float64
from tqdm import tqdm

from calibrated_rewards.calibration.shards import SCORE, read_table
from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples, estimate_columns
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate, FrontierPoint
from calibrated_rewards.evaluation.win_rate import WeightedPools, win_rates_of
from calibrated_rewards.evaluation.wording import format_procedure
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
from calibrated_rewards.theory.named import format_name, parse_procedure, parse_transform
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, Standard, WorstOf
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
    several = [each for each in procedures if isinstance(each, BestOf | BestOfUpTo | WorstOf)]
    optima = {format_name(each): OptimumAtKL(each) for each in several}
    return objectives | optima


def parse_objective(name: str) -> Objective:
    """Parse the name of an objective: of `OBJECTIVES`, exp:T, best-of:N, best-of:1-N or worst-of:N; or ValueError.

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
        names = f"{', '.join(OBJECTIVES)}, exp:T, best-of:N, best-of:1-N or worst-of:N"
        raise ValueError(f"an objective is {names}, got {name!r}") from None


Array: TypeAlias = npt.NDArray[np.float64]
KLS = (0.25, 0.5, 1.0, 2.0)
PROCEDURES: tuple[CalibratedProcedure, ...] = (Standard(), BestOf(4), WorstOf(4))


def estimate_frontier(
    references: Samples,
    objectives: Mapping[str, Objective] | None = None,
    kls: Sequence[float] = KLS,
    procedures: Sequence[Procedure] = PROCEDURES,
    *,
    selected_by: str = "reward",
    judged_by: str = "judge",
) -> FrontierEstimate:
    """Compare objectives at equal KL by their exact optima on the rollouts of a calibration.

    `references.select` are the raw scores of the reward model that is trained for and that procedures select by,
    `references.judge` those of another scorer for the same rollouts, or the same ones. Each objective, by default
    those of `default_objectives`, has one beta for all prompts, at which its mean KL is the given one; gains are over
    the first objective.
    """
    ranked = _check(references, kls, procedures)
    if selected_by == judged_by and references.judge is not references.select:
        raise ValueError(
            f"estimate_frontier needs names apart for the scorers that select and judge, got selected_by="
            f"{selected_by!r} and judged_by={judged_by!r} with two arrays of scores; one scorer that does both is "
            "Samples(select) alone."
        )
    comparison = _EqualKL(references, ranked, selected_by, judged_by)
    objectives = default_objectives(procedures) if objectives is None else dict(objectives)
    reached, left_out = [], []
    steps = [(name, kl) for name in objectives for kl in sorted(set(kls))]
    for name, kl in tqdm(steps, desc="frontier", unit=" points", delay=3, disable=None):
        try:
            reached.append(comparison.reweight(name, objectives[name], float(kl)))
        except ValueError as error:
            left_out.append(f"{name} at KL {kl:g}: {error}")
    if not reached:
        reason = left_out[0] if left_out else "no objectives"
        raise ValueError(f"estimate_frontier needs a KL that an objective reaches, got none: {reason}")
    points = tuple(sorted(comparison.points(reached, next(iter(objectives))), key=lambda point: point.kl))
    names = tuple(repr(procedure) for procedure in procedures)
    return FrontierEstimate(points, names, selected_by, len(references), int(references.sizes.min()), tuple(left_out))


def _check(references: Samples, kls: Any, procedures: Any) -> tuple[CalibratedProcedure, ...]:
    fewest = references.sizes.min()
    if fewest < 2:
        raise ValueError(f"estimate_frontier needs 2 rollouts of each prompt or more, got {references}.")
    for row in references.select:
        if abs(row).max() > np.finfo(np.float32).max:
            raise ValueError(
                f"estimate_frontier compares scores in float32 as tables do, got {row[abs(row).argmax()]:g}."
            )
    if not isinstance(kls, Sequence | np.ndarray) or not all(map(_is_budget, kls)) or not len(kls):
        raise ValueError(f"estimate_frontier needs finite kls > 0, a list of numbers, got kls={kls!r:.60}.")
    ranked = tuple(procedure for procedure in procedures if isinstance(procedure, CalibratedProcedure))
    if not ranked or len(ranked) < len(procedures):
        raise ValueError(f"estimate_frontier needs procedures that are functions of the rank, got {list(procedures)}.")
    for each in ranked:
        if isinstance(each, BestOf | BestOfUpTo | WorstOf) and each.n > fewest:
            raise ValueError(
                f"{format_procedure(each)} needs {each.n} rollouts of each prompt or more, got K={fewest}: with fewer "
                "it comes down to the same rollout for every reward. "
                f"Calibrate with K={3 * each.n} or more, or take a smaller N."
            )
    return ranked


def _is_budget(kl: Any) -> bool:
    number = isinstance(kl, int | float | np.integer | np.floating) and not isinstance(kl, bool)
    return number and bool(np.isfinite(kl) and kl > 0)


@dataclass(frozen=True, eq=False)
class _Reweighted:
    """An objective at a KL: a win rate for each prompt, judge and procedure."""

    name: str
    kl: float
    kl_spread: float
    beta: float
    ess: tuple[float, ...]
    win_rates: Float[np.ndarray, "P columns"]


@dataclass(frozen=True, eq=False)
class _EqualKL:
    """Comparison of objectives at equal KL: the rollouts, and the reference's own output under each procedure."""

    references: Samples
    procedures: tuple[CalibratedProcedure, ...]
    selected_by: str
    judged_by: str
    pools: WeightedPools = field(init=False)
    table: ReferenceTable = field(init=False)
    base: tuple[Array, ...] = field(init=False)
    beaten: tuple[tuple[Array, ...], ...] = field(init=False)
    values: dict[str, tuple[Calibration, Array]] = field(init=False, default_factory=dict)
    """The rewards of all rollouts by each objective's latest calibration."""

    def __post_init__(self) -> None:
        # Scores are compared as tables compare them, in float32: what ties there ties here.
        select = [row.astype(np.float32).astype(np.float64) for row in self.references.select]
        same = self.references.judge is self.references.select
        pools = WeightedPools(Samples(select, None if same else self.references.judge))
        table = ReferenceTable.build((at.to_bytes(16, "big"), row) for at, row in enumerate(select))
        base = tuple(pools.output(pools.uniform, procedure) for procedure in self.procedures)
        judges = [pools.by_select] if same else [pools.by_select, pools.by_judge]
        object.__setattr__(self, "pools", pools)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "beaten", tuple(tuple(judge.beaten(mass) for mass in base) for judge in judges))

    def reweight(self, name: str, objective: Objective, kl: float) -> _Reweighted:
        """Weigh the rollouts, let the procedures select, and compare with the reference."""
        self.pools.check_reach(kl)  # before an optimum is solved for
        values = self._values(name, objective.at(kl))
        beta = self.pools.beta_for_kl(values, kl)
        weights, kls = self.pools.tilted(values, beta)
        outputs = [self.pools.output(weights, procedure) for procedure in self.procedures]
        columns = [
            win_rates_of(output, base, beaten, itself=judge is self.beaten[0])
            for judge in self.beaten
            for output, base, beaten in zip(outputs, self.base, judge, strict=True)
        ]
        rates = np.stack(columns, axis=1)
        if not np.isfinite(rates).all():
            raise ValueError("both sides come down to one rollout of a prompt.")
        ess = tuple(_ess(weights, output, base) for output, base in zip(outputs, self.base, strict=True))
        return _Reweighted(name, kl, float(kls.std()), beta, ess, rates)

    def _values(self, name: str, calibration: Calibration) -> Array:
        if name not in self.values or self.values[name][0] != calibration:
            select = self.pools.samples.select
            rows = np.repeat(np.arange(len(select)), [len(row) for row in select])
            values = np.asarray(calibration(self.table, rows, np.concatenate(select)), np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"needs finite values, got {values[~np.isfinite(values)][0]}.")
            self.values[name] = calibration, self.pools.filled(values, 0.0)
        return self.values[name][1]

    def points(self, reached: Sequence[_Reweighted], first: str) -> Iterator[FrontierPoint]:
        """Add intervals, all of them from the same resampled prompts."""
        baseline = {each.kl: each for each in reached if each.name == first}
        gains = [each.win_rates - baseline[each.kl].win_rates for each in reached if each.kl in baseline]
        intervals = iter(estimate_columns(np.hstack([*(each.win_rates for each in reached), *gains])))
        rates = [self._by_judge(intervals, 0.0) for _ in reached]
        for each, win_rates in zip(reached, rates, strict=True):
            gains_by_judge, ess_of_gains = {}, {}
            if each.kl in baseline:
                gains_by_judge = self._by_judge(intervals, -1.0)
                ess_of_gains = self._by_procedure(np.minimum(each.ess, baseline[each.kl].ess).tolist())
            yield FrontierPoint(
                each.name,
                each.kl,
                each.kl_spread,
                each.beta,
                min(each.ess),
                self._by_procedure(each.ess),
                win_rates,
                gains_by_judge,
                ess_of_gains,
            )

    def _by_procedure(self, values: Sequence[float]) -> dict[str, float]:
        return {repr(procedure): value for procedure, value in zip(self.procedures, values, strict=True)}

    def _by_judge(self, intervals: Iterator[IntervalEstimate], least: float) -> dict[str, dict[str, IntervalEstimate]]:
        """Take the next interval for each judge and procedure."""
        judges = [self.selected_by, self.judged_by][: len(self.beaten)]
        names = [repr(procedure) for procedure in self.procedures]
        return {judge: {name: next(intervals).clip(least, 1.0) for name in names} for judge in judges}


def _ess(*masses: Float[np.ndarray, "P K"]) -> float:
    return float(1 / np.max([np.sum(mass**2, axis=1) for mass in masses], axis=0).mean())


def find_scorers(run: Path) -> list[str]:
    """Name the reward models that scored a run's rollouts."""
    return [name.removeprefix(SCORE) for name in read_table(_files(run)[0]).column_names if name.startswith(SCORE)]


def read_scores(run: Path, select: str, judge: str | None = None) -> Samples:
    """Read the scores of all rollouts of a run, by the scorer that selects and by the judge, if one is named."""
    available, scorers = find_scorers(run), [select, *([judge] if judge is not None and judge != select else [])]
    for name in scorers:
        if name not in available:
            raise ValueError(
                f"the rollouts of {run} have scores of {', '.join(available) or 'nobody'}, got {name!r}. Another "
                f"scorer is added by `calibrated-rewards calibrate --reward-model NAME=PATH --out {run}`, drawing "
                "nothing."
            )
    parts: dict[bytes, list[Float64[np.ndarray, "scorers _"]]] = {}
    for path in _files(run):
        table = read_table(path, ["key", *(SCORE + name for name in scorers)])
        keys = table.column("key").to_pylist()
        scores = np.array([table.column(SCORE + name).to_numpy() for name in scorers], np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"{path} needs a score for each rollout, got some without: calibrate again.")
        starts = [row for row in range(len(keys)) if row == 0 or keys[row] != keys[row - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            parts.setdefault(keys[start], []).append(scores[:, start:end])
    rows = [np.hstack(part) for part in parts.values()]
    return Samples([row[0] for row in rows], [row[1] for row in rows] if len(scorers) > 1 else None)


def _files(run: Path) -> list[Path]:
    files = sorted((run / "rollouts").glob("*.parquet"))
    if not files:
        raise ValueError(f"{run} needs rollouts/*.parquet, got none: not calibrated yet?")
    return files
