"""The rollouts of a run with the scores that two reward models gave them: one to select by, one to judge.

The frontier without training: the optimum for any reward is a reweighting of the reference's own rollouts.

pi*(y) ~ pi_ref(y) e^{v(y)/beta}, so that K rollouts of a prompt with weights ~ e^{v/beta} stand for it, whatever v is:
a transform of the quantile, the raw score, what a peer makes of it. All are brought to one KL and compared.

>>> from calibrated_rewards.evaluation.objectives import ARMS
>>> rng = np.random.default_rng(0)
>>> found = reweighted(Samples(rng.normal(size=(50, 64))), {name: ARMS[name] for name in ("raw", "exp:10")}, kls=[0.5])
>>> for point in found.points:
...     print(point.arm, point.win_rates["reward"]["BestOf(n=4)"])
raw 0.833 [0.825, 0.840]
exp:10 0.869 [0.869, 0.869]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Float64
from tqdm import tqdm

from calibrated_rewards.calibration.shards import SCORE, read_table
from calibrated_rewards.evaluation.estimates import Samples, Stated, stated
from calibrated_rewards.evaluation.objectives import Arm, usual_arms
from calibrated_rewards.evaluation.prospects import Point, Reweighted
from calibrated_rewards.evaluation.weighted_rollouts import WeightedPools, won
from calibrated_rewards.evaluation.wording import spoken
from calibrated_rewards.reward.calibrators import Calibration
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, Standard, WorstOf


def scorers_of(run: Path) -> list[str]:
    """The names of the reward models whose scores a run's rollouts have."""
    names = (name for path in _files(run)[:1] for name in read_table(path).column_names)
    return [name.removeprefix(SCORE) for name in names if name.startswith(SCORE)]


def references_of(run: Path, select: str, judge: str | None = None) -> Samples:
    """All rollouts, prompt by prompt, by both scores; by one where no judge is named."""
    known, asked = scorers_of(run), [select, *([judge] if judge is not None and judge != select else [])]
    for name in asked:
        if name not in known:
            raise ValueError(
                f"the rollouts of {run} have scores of {', '.join(known) or 'nobody'}, got {name!r}. Another scorer is "
                f"added by `calibrated-rewards calibrate --reward-model NAME=PATH --out {run}`, drawing nothing."
            )
    parts: dict[bytes, list[Float64[np.ndarray, "scorers _"]]] = {}
    for path in _files(run):
        table = read_table(path, ["key", *(SCORE + name for name in asked)])
        keys = table.column("key").to_pylist()
        scores = np.array([table.column(SCORE + name).to_numpy() for name in asked], np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"{path} needs a score for each rollout, got some without: calibrate again.")
        starts = [place for place in range(len(keys)) if place == 0 or keys[place] != keys[place - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            parts.setdefault(keys[start], []).append(scores[:, start:end])
    rows = [np.hstack(own) for own in parts.values()]
    return Samples([row[0] for row in rows], [row[1] for row in rows] if len(asked) > 1 else None)


def _files(run: Path) -> list[Path]:
    found = sorted((run / "rollouts").glob("*.parquet"))
    if not found:
        raise ValueError(f"{run} needs rollouts/*.parquet, got none: not calibrated yet?")
    return found


Array: TypeAlias = npt.NDArray[np.float64]
KLS = (0.25, 0.5, 1.0, 2.0)
PROCEDURES: tuple[CalibratedProcedure, ...] = (Standard(), BestOf(4), WorstOf(4))


def reweighted(
    references: Samples,
    arms: Mapping[str, Arm] | None = None,
    kls: Sequence[float] = KLS,
    procedures: Sequence[Procedure] = PROCEDURES,
    *,
    selected_by: str = "reward",
    judged_by: str = "judge",
) -> Reweighted:
    """Compare rewards at equal KL by their exact optima on the rollouts of a calibration.

    `references.select` are the raw scores of the reward model that is trained for and that procedures select by,
    `references.judge` those of another scorer for the same rollouts, or the same ones. Each arm, by default those of
    `usual_arms`, has one beta for all prompts, at which its mean KL is as asked; gains are over the first arm.
    """
    asked = _checked(references, kls, procedures)
    if selected_by == judged_by and references.judge is not references.select:
        raise ValueError(
            f"reweighted needs names apart for the scorers that select and judge, got selected_by={selected_by!r} and "
            f"judged_by={judged_by!r} with two arrays of scores; one scorer that does both is Samples(select) alone."
        )
    _check_draws(references, asked)
    setting = _Setting(references, asked, selected_by, judged_by)
    chosen = usual_arms(procedures) if arms is None else dict(arms)
    found, left_out = [], []
    steps = [(name, kl) for name in chosen for kl in sorted(set(kls))]
    for name, kl in tqdm(steps, desc="frontier", unit=" points", delay=3, disable=None):
        try:
            found.append(setting.tried(name, chosen[name], float(kl)))
        except ValueError as error:
            left_out.append(f"{name} at KL {kl:g}: {error}")
    if not found:
        raise ValueError(
            f"reweighted needs a KL that an arm reaches, got none: {left_out[0] if left_out else 'no arms'}"
        )
    points = tuple(sorted(setting.points(found, next(iter(chosen))), key=lambda point: point.kl))
    names = tuple(repr(procedure) for procedure in procedures)
    return Reweighted(points, names, selected_by, len(references), int(references.sizes.min()), tuple(left_out))


def _checked(references: Samples, kls: Any, procedures: Any) -> tuple[CalibratedProcedure, ...]:
    if references.sizes.min() < 2:
        raise ValueError(f"reweighted needs 2 rollouts of each prompt or more, got {references}.")
    for row in references.select:
        if abs(row).max() > np.finfo(np.float32).max:
            raise ValueError(f"reweighted compares scores in float32 as tables do, got {row[abs(row).argmax()]:g}.")
    if not isinstance(kls, Sequence | np.ndarray) or not all(map(_budget, kls)) or not len(kls):
        raise ValueError(f"reweighted needs finite kls > 0, a list of numbers, got kls={kls!r:.60}.")
    ranked = tuple(procedure for procedure in procedures if isinstance(procedure, CalibratedProcedure))
    if not ranked or len(ranked) < len(procedures):
        raise ValueError(f"reweighted needs procedures that are functions of the rank, got {list(procedures)}.")
    return ranked


def _check_draws(references: Samples, procedures: Sequence[Procedure]) -> None:
    fewest = references.sizes.min()
    for each in procedures:
        if isinstance(each, BestOf | WorstOf) and each.n > fewest:
            raise ValueError(
                f"{spoken(each)} needs {each.n} rollouts of each prompt or more, got K={fewest}: with fewer it "
                "comes down to the same rollout for every reward. "
                f"Calibrate with K={3 * each.n} or more, or take a smaller N."
            )


def _budget(kl: Any) -> bool:
    known = isinstance(kl, int | float | np.integer | np.floating) and not isinstance(kl, bool)
    return known and bool(np.isfinite(kl) and kl > 0)


@dataclass(frozen=True, eq=False)
class _Tried:
    """An arm at a KL: a win rate for each prompt, judge and procedure."""

    arm: str
    kl: float
    kl_spread: float
    beta: float
    ess: tuple[float, ...]
    win_rates: Float[np.ndarray, "P columns"]


@dataclass(frozen=True, eq=False)
class _Setting:
    """What all arms share: the rollouts, and what the reference's own output under each procedure is worth."""

    references: Samples
    procedures: tuple[CalibratedProcedure, ...]
    selected_by: str
    judged_by: str
    pools: WeightedPools = field(init=False)
    table: ReferenceTable = field(init=False)
    base: tuple[Array, ...] = field(init=False)
    beaten: tuple[tuple[Array, ...], ...] = field(init=False)
    values: dict[str, tuple[Calibration, Array]] = field(init=False, default_factory=dict)
    """Of the calibration that each arm had last."""

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

    def tried(self, name: str, arm: Arm, kl: float) -> _Tried:
        """Weigh, let the procedures choose, and compare."""
        self.pools.check_reach(kl)  # before an optimum is solved for
        values = self._values(name, arm.at(kl))
        beta = self.pools.beta_for_kl(values, kl)
        weights, spent = self.pools.tilted(values, beta)
        outputs = [self.pools.output(weights, procedure) for procedure in self.procedures]
        columns = [
            won(output, base, beaten, itself=judge is self.beaten[0])
            for judge in self.beaten
            for output, base, beaten in zip(outputs, self.base, judge, strict=True)
        ]
        rates = np.stack(columns, axis=1)
        if not np.isfinite(rates).all():
            raise ValueError("both sides come down to one rollout of a prompt.")
        ess = tuple(_ess(weights, output, base) for output, base in zip(outputs, self.base, strict=True))
        return _Tried(name, kl, float(spent.std()), beta, ess, rates)

    def _values(self, name: str, calibration: Calibration) -> Array:
        if name not in self.values or self.values[name][0] != calibration:
            select = self.pools.samples.select
            rows = np.repeat(np.arange(len(select)), [len(row) for row in select])
            values = np.asarray(calibration(self.table, rows, np.concatenate(select)), np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"needs finite values, got {values[~np.isfinite(values)][0]}.")
            self.values[name] = calibration, self.pools.filled(values, 0.0)
        return self.values[name][1]

    def points(self, found: Sequence[_Tried], first: str) -> Iterator[Point]:
        """With intervals, all of them from the same resampled prompts."""
        baseline = {each.kl: each for each in found if each.arm == first}
        gains = [each.win_rates - baseline[each.kl].win_rates for each in found if each.kl in baseline]
        intervals = iter(stated(np.hstack([*(each.win_rates for each in found), *gains])))
        rates = [self._named(intervals, 0.0) for _ in found]
        for each, own in zip(found, rates, strict=True):
            ess, gained, least = self._by_name(each.ess), {}, {}
            if each.kl in baseline:
                gained = self._named(intervals, -1.0)
                least = self._by_name(np.minimum(each.ess, baseline[each.kl].ess).tolist())
            yield Point(each.arm, each.kl, each.kl_spread, each.beta, min(each.ess), ess, own, gained, least)

    def _by_name(self, values: Sequence[float]) -> dict[str, float]:
        return {repr(procedure): value for procedure, value in zip(self.procedures, values, strict=True)}

    def _named(self, intervals: Iterator[Stated], least: float) -> dict[str, dict[str, Stated]]:
        judges = [self.selected_by, self.judged_by][: len(self.beaten)]
        names = [repr(procedure) for procedure in self.procedures]
        return {judge: {name: next(intervals).within(least, 1.0) for name in names} for judge in judges}


def _ess(*masses: Float[np.ndarray, "P K"]) -> float:
    return float(1 / np.max([np.sum(mass**2, axis=1) for mass in masses], axis=0).mean())
