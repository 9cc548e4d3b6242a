"""Rollouts of the reference with weights: the optimum of any objective at a KL, and what it wins under procedures.

K rollouts fall short of the law that they are drawn from: self-normalised weights miss what lies beyond the best
rollout, and the more so the fewer carry the weight. The win rate's error falls like 1/K by the score that selects, and
like K^-0.7 by a judge that agrees with it loosely (benchmarks/reweighted.py), so that half the rollouts show what is
missing: `extrapolate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.objectives import ObjectiveOfPolicy
from calibrated_rewards.evaluation.pair_weights import MOST_ROLLOUTS, compare_pairs, draw_chances, weigh_pairs
from calibrated_rewards.evaluation.win_rate import WeightedPools, win_rates_of
from calibrated_rewards.reward.calibrators import Calibration
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import CalibratedProcedure
from calibrated_rewards.theory.transforms import Transform

Array: TypeAlias = npt.NDArray[np.float64]
# The error falls like K to the power of minus this: by the score that selects, and by a judge whose ranks agree with it
# no more than `LOOSE`; between the two the rate rises with the agreement.
OWN_RATE, JUDGE_RATE, LOOSE = 1.0, 0.7, 0.6
# A fixed point is found when no reward moves by more than this share of their range. With whole steps it would swing
# between two policies, as the paper's own iteration does (Corollary 2).
STILL, ROUNDS, PARTS = 1e-5, 300, (0.3, 0.1, 0.05)
# Where prompts spend KL this unevenly, a win rate is adjusted for it.
UNEVEN = 0.02


@dataclass(frozen=True, eq=False)
class Reweighted:
    """An objective at a KL: a win rate for each prompt, judge and procedure."""

    name: str
    kl: float
    kl_spread: float
    beta: float
    ess: tuple[float, ...]
    win_rates: Float[np.ndarray, "P columns"]
    """Procedures by the selecting score, then by the judge if there is one."""
    corrected: bool = False
    """True if what K rollouts are short of is taken off."""


@dataclass(frozen=True, eq=False)
class RolloutsAtKL:
    """The rollouts, and the reference's own output under each procedure, with which objectives are compared."""

    references: Samples
    procedures: tuple[CalibratedProcedure, ...]
    pools: WeightedPools = field(init=False)
    table: ReferenceTable = field(init=False)
    base: tuple[Array, ...] = field(init=False)
    beaten: tuple[tuple[Array, ...], ...] = field(init=False)
    """By judge, then by procedure: the share of the reference's output that each rollout beats."""
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

    @property
    def has_ties(self) -> bool:
        """True if any two rollouts of a prompt have one selecting score."""
        standings = self.pools.by_select
        return bool(((standings.upto - standings.below > 1) & self.pools.there).any())

    @property
    def known_by_rank(self) -> bool:
        """True if ranks among K say all of quantiles: no rollouts tie, and all prompts have one K, not too large."""
        sizes = self.references.sizes
        same_size = bool(sizes.min() == sizes.max() <= MOST_ROLLOUTS)
        return not self.has_ties and same_size and all(map(draw_chances, self.procedures))

    def judge_law(self, transform: Transform, beta: float, procedure: CalibratedProcedure) -> Float[np.ndarray, " P"]:
        """Compute each prompt's win rate by the judge of a policy whose law is known in quantiles: unbiased."""
        weights = weigh_pairs(transform, beta, procedure, int(self.references.sizes[0]))
        standings = self.pools.by_judge
        return compare_pairs(
            weights, np.take_along_axis(standings.below + standings.upto, self.pools.by_select.order, 1)
        )

    @property
    def judge_rate(self) -> float:
        """The rate at which errors by the judge fall, from how well the two scores agree on the ranks in a prompt."""
        there, ranks = self.pools.there, []
        for standings in self.pools.by_select, self.pools.by_judge:
            rank = np.where(there, (standings.below + standings.upto) / 2.0, 0.0)
            ranks.append(
                np.where(there, rank - rank.sum(axis=1, keepdims=True) / there.sum(axis=1, keepdims=True), 0.0)
            )
        spread = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
        agreement = float(np.mean((ranks[0] * ranks[1]).sum(axis=1) / np.maximum(spread, 1e-9)))
        return JUDGE_RATE + (OWN_RATE - JUDGE_RATE) * max(0.0, agreement - LOOSE) / (1.0 - LOOSE)

    @property
    def only_gap(self) -> float | None:
        """The gap between the selecting scores, where all rollouts have one of two, as with a verifier; else None."""
        values = np.unique(np.concatenate(self.pools.samples.select))
        return float(values[1] - values[0]) if len(values) == 2 else None

    def halves(self, seed: int = 0) -> "tuple[RolloutsAtKL, ...]":
        """Split each prompt's rollouts at random in two; none if a half is too small for a procedure."""
        sizes, rng = self.references.sizes, np.random.default_rng(seed)
        if sizes.min() // 2 < max(2, *(procedure.draws for procedure in self.procedures)):
            return ()
        orders = [rng.permutation(size) for size in sizes]
        same = self.references.judge is self.references.select

        def take(rows: Sequence[Array], half: int) -> Iterator[Array]:
            return (row[order[half::2][: len(row) // 2]] for row, order in zip(rows, orders, strict=True))

        select, judge = self.references.select, self.references.judge
        parts = (Samples(take(select, half), None if same else take(judge, half)) for half in (0, 1))
        return tuple(RolloutsAtKL(part, self.procedures) for part in parts)

    def reweight(self, name: str, reward: Calibration | ObjectiveOfPolicy, kl: float) -> Reweighted:
        """Weigh the rollouts, let the procedures select, and compare with the reference."""
        self.pools.check_reach(kl)
        if isinstance(reward, ObjectiveOfPolicy):
            values = self._solve_fixed_point(reward, kl)
        else:
            values = self._values(name, reward)
        beta = self.pools.beta_for_kl(values, kl)
        weights, kls = self.pools.tilted(values, beta)
        rates, outputs = self._win_rates(weights)
        if not np.isfinite(rates).all():
            raise ValueError("both sides come down to one rollout of a prompt.")
        ess = tuple(_ess(weights, output, base) for output, base in zip(outputs, self.base, strict=True))
        if kls.std() > UNEVEN * kl:
            # beta was solved for on these prompts: of a prompt with more KL than others, what that buys is no noise.
            nearby, nearby_kls = self.pools.tilted(values, beta * 1.02)
            moved = self._win_rates(nearby)[0].mean(axis=0) - rates.mean(axis=0)
            rates = rates - np.outer(kls - kls.mean(), moved / (nearby_kls.mean() - kls.mean()))
        return Reweighted(name, kl, float(kls.std()), beta, ess, rates)

    def _win_rates(self, weights: Array) -> tuple[Array, list[Array]]:
        """Return each prompt's win rates by judge and procedure, and the procedures' outputs."""
        outputs = [self.pools.output(weights, procedure) for procedure in self.procedures]
        columns = [
            win_rates_of(output, base, beaten, itself=judge is self.beaten[0])
            for judge in self.beaten
            for output, base, beaten in zip(outputs, self.base, judge, strict=True)
        ]
        return np.stack(columns, axis=1), outputs

    def _values(self, name: str, calibration: Calibration) -> Array:
        if name not in self.values or self.values[name][0] != calibration:
            select = self.pools.samples.select
            rows = np.repeat(np.arange(len(select)), [len(row) for row in select])
            values = np.asarray(calibration(self.table, rows, np.concatenate(select)), np.float64)
            if not np.isfinite(values).all():
                raise ValueError(f"needs finite values, got {values[~np.isfinite(values)][0]}.")
            self.values[name] = calibration, self.pools.filled(values, 0.0)
        return self.values[name][1]

    def _solve_fixed_point(self, objective: ObjectiveOfPolicy, kl: float) -> Array:
        """Iterate reward -> policy of this KL -> reward, part of the way each time, until the reward stands still."""
        order, there = self.pools.by_select.order, self.pools.there
        scores = self.pools.filled(np.concatenate(self.pools.samples.select), 0.0)
        highest = np.max(scores, axis=1, where=there, initial=-np.inf)[:, None]
        ascending = np.take_along_axis(np.where(there, scores, highest), order, 1)
        for part in PARTS:
            weights, values = self.pools.uniform, np.zeros_like(ascending)
            for done in range(ROUNDS):
                image = np.empty_like(values)
                rewards = objective.rewards(ascending, np.take_along_axis(weights, order, 1))
                np.put_along_axis(image, order, rewards - rewards[:, :1], 1)
                image = np.where(there, image, 0.0)
                if np.abs(image - values).max() < STILL * np.ptp(image):
                    return image
                values = image if done == 0 else (1 - part) * values + part * image
                weights = self.pools.tilted(values, self.pools.beta_for_kl(values, kl))[0]
        raise ValueError(f"{objective!r} did not settle on a policy of this KL within {ROUNDS} rounds.")


def extrapolate(
    whole: Reweighted, halves: Sequence[Reweighted], ratio: float = 2.0, judge_rate: float = JUDGE_RATE
) -> Reweighted:
    """Remove what K rollouts are short of, from results of `ratio` times fewer: W + (W - W_half) / (ratio^rate - 1).

    >>> at = lambda K: Reweighted("raw", 0.5, 0.0, 1.0, (9.0,), np.array([[0.8 - 1 / K, 0.7 - K**-0.7]]))
    >>> extrapolate(at(64), [at(32), at(32)]).win_rates.round(9)
    array([[0.8, 0.7]])
    """
    if not halves:
        return whole
    columns = whole.win_rates.shape[1]
    rates = np.where(np.arange(columns) < len(whole.ess), OWN_RATE, judge_rate)
    fewer = np.mean([half.win_rates for half in halves], axis=0)
    log_beta = float(np.mean([log(half.beta) for half in halves]))
    return replace(
        whole,
        win_rates=whole.win_rates + (whole.win_rates - fewer) / (ratio**rates - 1.0),
        corrected=True,
        beta=exp(log(whole.beta) + (log(whole.beta) - log_beta) / (ratio**OWN_RATE - 1.0)),
    )


def _ess(*masses: Float[np.ndarray, "P K"]) -> float:
    return float(1 / np.max([np.sum(mass**2, axis=1) for mass in masses], axis=0).mean())
