"""The frontier without training: win rate against KL of any reward, from the reference's own rollouts.

The optimum for a reward v is pi*(y) ~ pi_ref(y) e^{v(y)/beta}, so K rollouts of a prompt with weights ~ e^{v/beta}
stand for it, whatever v is (`objectives`). All are brought to one KL and compared.

K rollouts fall short of the law that they are drawn from, most where few carry the weight: half of them show by how
much (`weighted_rollouts.extrapolate`). The law of a transform of the quantile is known: by the score that selects its
win rate needs no rollouts, and by a judge weights of pairs leave no bias (`pair_weights`). With ties it is the table's.

>>> from calibrated_rewards.evaluation.objectives import OBJECTIVES
>>> scores = Samples(np.random.default_rng(0).normal(size=(50, 64)))
>>> frontier = estimate_frontier(scores, {name: OBJECTIVES[name] for name in ("raw", "exp:10")}, kls=[0.5])
>>> for point in frontier.points:
...     print(point.arm, point.win_rates["reward"]["BestOf(n=4)"])
raw 0.846 [0.841, 0.851]
exp:10 0.872
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples, estimate_columns
from calibrated_rewards.evaluation.expectations import TableRewards
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate, FrontierPoint
from calibrated_rewards.evaluation.objectives import (
    AnyObjective,
    Objective,
    Transformed,
    default_objectives,
)
from calibrated_rewards.evaluation.weighted_rollouts import Reweighted, RolloutsAtKL, extrapolate
from calibrated_rewards.evaluation.wording import format_procedure
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Identity

KLS = (0.25, 0.5, 1.0, 2.0)
PROCEDURES: tuple[CalibratedProcedure, ...] = (Standard(), BestOf(4), WorstOf(4))


def estimate_frontier(
    references: Samples,
    objectives: Mapping[str, AnyObjective] | None = None,
    kls: Sequence[float] = KLS,
    procedures: Sequence[Procedure] = PROCEDURES,
    *,
    selected_by: str = "reward",
    judged_by: str = "judge",
    table: ReferenceTable | None = None,
    estimator: Estimator = "empirical",
) -> FrontierEstimate:
    """Compare objectives at equal KL by their exact optima on the rollouts of a calibration.

    `references.select` are the raw scores of the reward model that is trained for and that procedures select by,
    `references.judge` those of another scorer for the same rollouts, or the same ones. Each objective, by default
    those of `default_objectives`, has one beta for all prompts, at which its mean KL is the given one; gains are over
    the first objective. The betas of transforms are those of `expect` on `table`, by default one of these scores,
    with this estimator.
    """
    ranked = _check(references, kls, procedures)
    if all(map(np.array_equal, references.select, references.judge)):
        references = Samples(references.select)  # one scorer by two names
    if selected_by == judged_by and references.judge is not references.select:
        raise ValueError(
            f"estimate_frontier needs names apart for the scorers that select and judge, got selected_by="
            f"{selected_by!r} and judged_by={judged_by!r} with two arrays of scores; one scorer that does both is "
            "Samples(select) alone."
        )
    rollouts = RolloutsAtKL(references, ranked)
    halves, trained = rollouts.halves(), TableRewards(rollouts.table if table is None else table, estimator=estimator)
    objectives = default_objectives(procedures) if objectives is None else dict(objectives)
    reached, left_out = [], []
    steps = [(name, kl) for name in objectives for kl in sorted(set(kls))]
    for name, kl in tqdm(steps, desc="frontier", unit=" points", delay=3, disable=None):
        try:
            reached.append(_estimate(name, objectives[name], float(kl), rollouts, halves, trained))
        except ValueError as error:
            left_out.append(f"{name} at KL {kl:g}: {error}")
    if not reached:
        reason = left_out[0] if left_out else "no objectives"
        raise ValueError(f"estimate_frontier needs a KL that an objective reaches, got none: {reason}")
    judges = [selected_by, judged_by][: len(rollouts.beaten)]
    names = tuple(repr(procedure) for procedure in procedures)
    points = tuple(sorted(_add_intervals(reached, next(iter(objectives)), judges, names), key=lambda point: point.kl))
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


def _estimate(
    name: str,
    objective: AnyObjective,
    kl: float,
    rollouts: RolloutsAtKL,
    halves: Sequence[RolloutsAtKL],
    trained: TableRewards,
) -> Reweighted:
    """Reweight all rollouts and both halves, and put what is known exactly in place of what was estimated."""
    rollouts.pools.check_reach(kl)  # before an optimum is solved for
    reward = objective.at(kl) if isinstance(objective, Objective) else objective
    whole = rollouts.reweight(name, reward, kl)
    if isinstance(reward, Transformed) and halves and rollouts.known_by_rank:
        return _make_exact(replace(whole, corrected=True), reward, rollouts, trained)
    try:
        parts = [half.reweight(name, reward, kl) for half in halves]
    except ValueError:  # half the rollouts reach less KL: what all of them give is left as it is
        parts = []
    ratio = rollouts.references.sizes.mean() / halves[0].references.sizes.mean() if halves else 2.0
    result = extrapolate(whole, parts, float(ratio), rollouts.judge_rate)
    if isinstance(reward, Transformed):
        return _make_exact(result, reward, rollouts, trained)
    gap = rollouts.only_gap
    if isinstance(reward, Uncalibrated) and gap is not None:
        # Of two values the quantiles are 1/2 apart in every prompt: the raw score is the identity rescaled.
        exact = _make_exact(result, Transformed(Identity()), rollouts, trained)
        return replace(exact, beta=2 * gap * exact.beta, corrected=True)
    return result


def _make_exact(result: Reweighted, reward: Transformed, rollouts: RolloutsAtKL, trained: TableRewards) -> Reweighted:
    """Take beta from the table, and win rates from theory's law, or with ties by the score that selects from the table.

    Theory knows the law in quantiles: by the score that selects that is the win rate, by a judge it is enough for an
    unbiased one.
    """
    transform = scaled(reward.transform, "unit")
    trained = replace(trained, transform=transform)
    trained.check(result.name, result.kl)
    beta, rates = trained.beta_for_kl(result.kl), result.win_rates.copy()
    in_theory = None if rollouts.has_ties else beta_for_kl(transform, result.kl)
    by_judge = result.corrected and len(rollouts.beaten) > 1 and rollouts.known_by_rank
    for column, procedure in enumerate(rollouts.procedures):
        if in_theory is None:
            rates[:, column] = trained.win_rate(beta, procedure)
            continue
        rates[:, column] = win_rate(transform, in_theory, procedure)
        if by_judge:
            rates[:, len(rollouts.procedures) + column] = rollouts.judge_law(transform, in_theory, procedure)
    return replace(result, beta=beta, win_rates=rates)


def _add_intervals(
    reached: Sequence[Reweighted], first: str, judges: Sequence[str], procedures: Sequence[str]
) -> Iterator[FrontierPoint]:
    """Make points of results, with intervals all of which are from the same resampled prompts."""
    baseline = {each.kl: each for each in reached if each.name == first}
    gains = [each.win_rates - baseline[each.kl].win_rates for each in reached if each.kl in baseline]
    intervals = iter(estimate_columns(np.hstack([*(each.win_rates for each in reached), *gains])))

    def take(least: float) -> dict[str, dict[str, IntervalEstimate]]:
        return {judge: {each: next(intervals).clip(least, 1.0) for each in procedures} for judge in judges}

    rates = [take(0.0) for _ in reached]
    for each, win_rates in zip(reached, rates, strict=True):
        ess = dict(zip(procedures, each.ess, strict=True))
        gains_by_judge, ess_of_gains = {}, {}
        if each.kl in baseline:
            gains_by_judge = take(-1.0)
            both = np.minimum(each.ess, baseline[each.kl].ess).tolist()
            ess_of_gains = dict(zip(procedures, both, strict=True))
        yield FrontierPoint(
            each.name,
            each.kl,
            each.kl_spread,
            each.beta,
            min(each.ess),
            ess,
            win_rates,
            gains_by_judge,
            ess_of_gains,
            each.corrected and (each.kl not in baseline or baseline[each.kl].corrected),
        )
