"""One answer before training: which transform and beta, what it should win, and whether K is enough.

>>> rng = np.random.default_rng(0)
>>> table = ReferenceTable.build([(f"prompt {i}", rng.normal(size=64)) for i in range(200)])
>>> answer = recommend(table, BestOf(4), kl=0.5)
>>> print(answer.name, round(answer.beta, 2), round(answer.win_rate.value, 2))
best-of:4:0.5 0.26 0.86
"""

import os
from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil, floor, isfinite, log2, log10
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_expit

from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.objectives import OBJECTIVES, AnyObjective, Fixed, Transformed
from calibrated_rewards.evaluation.pair_weights import draw_chances
from calibrated_rewards.evaluation.recommendation import AS_GOOD, ENOUGH, ONLY_COMPARED, Recommendation
from calibrated_rewards.evaluation.references import References, read_references
from calibrated_rewards.evaluation.reward_commands import RecordedScorer
from calibrated_rewards.evaluation.wording import format_procedure
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.search import tie_spans
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.named import ByRank, NamedTransform, format_name, parse_transform
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Tabulated, Transform

# How the loss falls is measured at this K or more, and at twice that; with ties it is taken to fall like this power.
LEAST_K, DRAWS, RATE = 64, 300, 0.75
# What else is tried where ties or a small K cost the optimum: names without their KL.
OTHERS_FOR_BEST, OTHERS_FOR_WORST = ("exp:10", "exp:5", "identity"), ("exp:-10", "exp:-5", "identity")
# Quantiles at which a policy's density is averaged over draws of references.
GRID = 4000
# A larger K is not simulated, but extrapolated to.
MOST_CHECKED = 600


def recommend(
    table: ReferenceTable | References | str | os.PathLike[str],
    procedure: ByRank = BestOf(4),  # noqa: B008 (frozen)
    kl: float = 0.5,
    *,
    select: str | None = None,
    judge: str | None = None,
    estimator: Estimator | None = None,
) -> Recommendation:
    """Recommend the transform and the beta for a procedure at a KL, and say what to expect.

    `table` is the folder of a calibration or of a bare table, or a table. `select` and `judge` name scorers of a
    calibration, as in `read_references`. The transform is the procedure's optimum, or another one that wins more where
    ties or a small K cost the optimum. Without an estimator, the better of "empirical" and "posterior" for this K is
    chosen. ValueError if the table cannot reach the KL.
    """
    if not isinstance(procedure, ByRank) or getattr(procedure, "weights", None) is not None:
        raise ValueError(f"recommend needs Standard, BestOf, BestOfUpTo without weights or WorstOf, got {procedure!r}.")
    if not (isinstance(kl, int | float) and isfinite(kl) and kl > 0):
        raise ValueError(f"recommend needs a finite kl > 0, in nats, got kl={kl!r}.")
    procedure = Standard() if procedure.draws == 1 else procedure
    references = _open(table, select, judge)
    if procedure.draws > references.samples.sizes.min():
        raise ValueError(
            f"{format_procedure(procedure)} needs {procedure.draws} rollouts of each prompt or more, got "
            f"K={references.samples.sizes.min()}: calibrate with more, or take a smaller N."
        )
    question = _Question(references.table, procedure, float(kl), estimator)  # the repr of a numpy float is no number
    best = question.choose()
    arm = best.named.name.rpartition(":")[0]
    arms: dict[str, AnyObjective] = {each: OBJECTIVES[each] for each in (*ONLY_COMPARED, "identity")}
    arms[arm] = Fixed(Transformed(best.named.transform))
    procedures = [procedure] if isinstance(procedure, Standard) else [procedure, Standard()]
    frontier = estimate_frontier(
        references.samples,
        arms,
        [kl],
        procedures,
        selected_by=references.selected_by,
        judged_by=references.judged_by,
        table=references.table,
        estimator=best.estimator,
    )
    points = {point.arm: point for point in frontier.points}
    for needed in ("raw", arm):
        if needed not in points:
            raise ValueError(next(reason for reason in frontier.left_out if reason.startswith(needed)))
    return _summarise(references, question, best, frontier, arm)


def _summarise(
    references: References, question: "_Question", best: "_Candidate", frontier: FrontierEstimate, arm: str
) -> Recommendation:
    """Take off what finite K costs, and leave out what is not known."""
    procedure, kl = question.procedure, question.kl
    points = {point.arm: point for point in frontier.points}
    key, own, judged = repr(procedure), references.selected_by, [*points[arm].win_rates][-1]
    point, raw = points[arm], points["raw"]
    tied = _share_of_ties(references.table)
    limit = question.limit(best, tied)
    win_rate = rate = point.win_rates[judged][key]
    loss = 0.0
    if tied and judged != own and limit is not None:
        # By the score that selects a transform with ties has its number at this K already; by a judge it loses in
        # proportion to what it wins.
        loss = (limit - best.win_rate) * max(0.0, rate.value - 0.5) / max(limit - 0.5, 1e-9)
        win_rate = _shift(rate, -loss).clip(0.0, 1.0)
    elif not tied and judged != own:
        win_rate = estimate_at_k(best.named.transform, best.beta, best.estimator, procedure, references)
        loss = rate.value - win_rate.value
    elif not tied and limit is not None:
        loss = limit - best.win_rate
        win_rate = _shift(rate, -loss).clip(0.0, 1.0)
    none = IntervalEstimate(0.0, None, None, None, frontier.prompts)
    gain = _shift(point.gains[judged][key], -loss).clip(-1.0, 1.0) if raw.corrected else None
    return Recommendation(
        procedure=format_name(procedure),
        kl=kl,
        name=best.named.name,
        beta=best.beta,
        estimator=best.estimator,
        win_rate=win_rate,
        raw_win_rate=raw.win_rates[judged][key] if raw.corrected else None,
        gain=gain,
        gain_shown=gain is not None and point.judge_gain(gain, judged, key) is not None,
        single_draw_gain=point.gains[judged].get(repr(Standard()), none),
        own_win_rate=best.win_rate,
        raw_own_win_rate=raw.win_rates[own][key] if raw.corrected else None,
        limit_win_rate=limit,
        references=int(np.median(references.samples.sizes)),
        references_needed=question.find_references_needed(best, limit, tied),
        tied=tied,
        judged_by=judged,
        frontier=frontier,
        source=str(references.table.path or "table/"),
        scorer=RecordedScorer.of(references.table.meta, references.table.path),
    )


def estimate_at_k(
    transform: Transform, beta: float, estimator: Estimator, procedure: ByRank, references: References
) -> IntervalEstimate:
    """Estimate the judge's win rate of the policy that fits the rewards of K references, without ties.

    Its density is a step function between references. What a judge sees of it is its output under the procedure,
    averaged over draws of references: that of a smooth policy with less KL.
    """
    smooth, kl = average_at_k(transform, beta, estimator, procedure, int(np.median(references.samples.sizes)))
    frontier = estimate_frontier(
        references.samples,
        {"at K": Fixed(Transformed(smooth))},
        [kl],
        [procedure],
        selected_by=references.selected_by,
        judged_by=references.judged_by,
        table=references.table,
    )
    return frontier.points[0].win_rates[references.judged_by][repr(procedure)]


def average_at_k(
    transform: Transform, beta: float, estimator: Estimator, procedure: ByRank, K: int
) -> tuple[Tabulated, float]:
    """Find the policy whose output is what policies that fit K references have on average: log density and KL."""
    rng, worst = np.random.default_rng(0), isinstance(procedure, WorstOf)
    rewards = values(transform, K, estimator)[::2]
    heights = np.exp((rewards - rewards.max()) / beta)
    u = (np.arange(GRID) + 0.5) / GRID
    chances = draw_chances(procedure)
    # P(output <= u) = sum of chance F^k, with F counted from the other end where the worst is taken.
    powers = np.array([chances.get(k, 0.0) for k in range(max(chances), -1, -1)])
    outputs = []
    for _ in range(DRAWS):
        density = heights[np.searchsorted(np.sort(rng.random(K)), u)]
        cdf = np.cumsum(density[::-1] if worst else density)
        outputs.append(np.polyval(powers, cdf / cdf[-1]))
    # Solve sum of chance F^k = mean for F, in logarithms: small shares keep their digits.
    logits = np.linspace(-50.0, 50.0, 5 * GRID)
    shares = log_expit(logits)
    logs = np.interp(np.log(np.mean(outputs, axis=0)), np.log(np.polyval(powers, np.exp(shares))), shares)
    density = np.diff(np.exp(logs), prepend=0.0) * GRID
    density = np.maximum.accumulate(np.maximum(density[::-1] if worst else density, 1e-300))  # but for noise it rises
    density /= density.mean()
    log_density = np.log(density)
    kl = float(np.mean(density * log_density))
    return Tabulated([0.0, *u, 1.0], [log_density[0], *log_density, log_density[-1]]), kl


def _open(table: Any, select: str | None, judge: str | None) -> References:
    if isinstance(table, References):
        return table
    if isinstance(table, ReferenceTable):
        if select is not None or judge is not None:
            raise ValueError(
                "a table has the scores of one scorer: select and judge need the folder of a calibration, got "
                f"select={select!r}, judge={judge!r}."
            )
        return References(Samples([scores for _, scores in table.items()]), table, "reward", "reward")
    return read_references(Path(table), select, judge)


@dataclass(frozen=True)
class _Candidate:
    """A transform with an estimator, and what `expect` says of it on the table."""

    named: NamedTransform
    estimator: Estimator
    beta: float
    win_rate: float


@dataclass(frozen=True)
class _Question:
    """A table, a procedure and a KL, for which a transform is chosen and its loss to finite K estimated."""

    table: ReferenceTable
    procedure: ByRank
    kl: float
    estimator: Estimator | None

    def choose(self) -> _Candidate:
        """Choose the optimum with the better estimator; another transform only if it wins more on this table."""
        single, tied = isinstance(self.procedure, Standard), _share_of_ties(self.table) > 0
        first = self._expect("identity" if single else format_name(self.procedure))
        if single or (not tied and self._theory(first) - first.win_rate < ENOUGH):
            return first
        others = []
        for name in OTHERS_FOR_WORST if isinstance(self.procedure, WorstOf) else OTHERS_FOR_BEST:
            with suppress(ValueError):  # this table does not reach the KL with it
                others.append(self._expect(name))
        # Of those that are as good, the first: with ties the gentlest, which costs single draws the least.
        best, *rest = [*reversed(others), first] if tied else [first, *others]
        for each in rest:
            best = each if each.win_rate > best.win_rate + AS_GOOD else best
        return best

    def _expect(self, name: str, table: ReferenceTable | None = None) -> _Candidate:
        """Solve for beta with each estimator, and take the one that wins more."""
        try:
            named = parse_transform(f"{name}:{self.kl!r}")
        except ArgumentTypeError as error:
            raise ValueError(str(error)) from None
        estimators: tuple[Estimator, ...] = ("empirical", "posterior") if self.estimator is None else (self.estimator,)
        found = []
        for each in estimators:
            expected = expect(
                table or self.table,
                named.transform,
                kl=self.kl,
                procedure=self.procedure,
                estimator=each,
                name=named.name,
            )
            found.append(_Candidate(named, each, expected.beta, expected.win_rate))
        return max(found, key=lambda each: round(each.win_rate, 3))

    def _theory(self, candidate: _Candidate) -> float:
        transform = candidate.named.transform
        return win_rate(transform, beta_for_kl(transform, self.kl), self.procedure)

    def limit(self, candidate: _Candidate, tied: float) -> float | None:
        """Return the win rate with infinitely many references: theory's, or with ties by what half of them lose."""
        if not tied:
            return self._theory(candidate)
        rng = np.random.default_rng(0)
        rows = ((key, rng.permutation(scores)[: len(scores) // 2]) for key, scores in self.table.items())
        try:
            half = self._expect(candidate.named.name.rpartition(":")[0], ReferenceTable.build(rows)).win_rate
        except ValueError:  # half of the references do not reach the KL, or are none
            return None
        return candidate.win_rate + max(candidate.win_rate - half, 0.0) / (2**RATE - 1)

    def find_references_needed(self, candidate: _Candidate, limit: float | None, tied: float) -> int | None:
        """Find the K at which the loss is `ENOUGH`, rounded up to two digits; None where it is less already."""
        if limit is None or limit - candidate.win_rate < ENOUGH:
            return None
        K = int(np.median(self.table.counts(np.arange(len(self.table)))))
        rate, at, loss = RATE, K, limit - candidate.win_rate
        if not tied:
            try:
                start = max(K, LEAST_K)
                losses = [limit - self._win_rate_at(candidate, each, DRAWS) for each in (start, 2 * start)]
                rate = max(log2(losses[0] / losses[1]), 0.3)
                at = max(K, min(ceil(2 * start * (losses[1] / ENOUGH) ** (1 / rate)), MOST_CHECKED))
                loss = limit - self._win_rate_at(candidate, at, DRAWS)
            except ValueError:
                return None
        needed = at * (max(loss, ENOUGH / 2) / ENOUGH) ** (1 / rate)
        digits = 10 ** max(0, floor(log10(needed)) - 1)
        return int(ceil(needed / digits) * digits)

    def _win_rate_at(self, candidate: _Candidate, K: int, draws: int) -> float:
        transform, kl = candidate.named.transform, self.kl
        return win_rate_at_kl(transform, kl, self.procedure, K, candidate.estimator, draws=draws).win_rate


def _shift(estimate: IntervalEstimate, by: float) -> IntervalEstimate:
    """Move an estimate and its interval."""
    low, high = (None if end is None else end + by for end in (estimate.low, estimate.high))
    return replace(estimate, value=estimate.value + by, low=low, high=high)


def _share_of_ties(table: ReferenceTable) -> float:
    """Return the share of references that tie with another one of their prompt."""
    tied = total = 0
    for _, scores in table.blocks(np.arange(len(table))):
        below, upto = tie_spans(scores)
        tied, total = tied + int((upto - below > 1).sum()), total + scores.size
    return tied / total
