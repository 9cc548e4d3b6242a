"""One answer before training: which transform and beta, what it should win, and whether K is enough.

>>> rng = np.random.default_rng(0)
>>> table = ReferenceTable.build([(f"prompt {i}", rng.normal(size=64)) for i in range(200)])
>>> answer = recommend(table, BestOf(4), kl=0.5)
>>> print(answer.name, round(answer.beta, 2), round(answer.win_rate.value, 2))
best-of:4:0.5 0.26 0.86
"""

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil, floor, log2, log10
from pathlib import Path
from typing import Any

import numpy as np

from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples, from_json
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.frontier_results import RELIABLE_ESS, FrontierEstimate
from calibrated_rewards.evaluation.objectives import OBJECTIVES, AnyObjective, Fixed, Transformed
from calibrated_rewards.evaluation.references import References, read_references
from calibrated_rewards.evaluation.wording import (
    format_objective,
    format_procedure,
    format_share,
    format_table,
)
from calibrated_rewards.files import write_file
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.named import ByRank, NamedTransform, format_name, parse_procedure, parse_transform
from calibrated_rewards.theory.procedures import BestOf, Standard
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Transform

# A loss to finite K of less than this, a point, is enough.
ENOUGH = 0.01
# The loss at K and at 2K says how fast it falls; so many draws of references are noisy by a tenth of a point.
DRAWS = 300


@dataclass(frozen=True)
class Recommendation:
    """What to train for a procedure, and what to expect of it: print it, or read its fields."""

    procedure: str
    """By its name on the command line: best-of:8."""
    kl: float
    name: str
    """The transform by its name on the command line, with the KL: best-of:8:0.5."""
    beta: float
    """The weight of the KL in training, for rewards on the unit scale: that of `expect`."""
    estimator: Estimator
    win_rate: IntervalEstimate
    """Both sides under the procedure, by the judge: of the policy that fits the rewards of this table."""
    raw_win_rate: IntervalEstimate
    """The same for the raw score at the same KL."""
    gain: IntervalEstimate
    """The first less the second, paired by prompt."""
    single_draw_gain: IntervalEstimate
    """The same difference for single draws."""
    own_win_rate: float
    """The first, by the score that is trained for."""
    limit_win_rate: float
    """That with infinitely many references a prompt, from theory."""
    references: int
    """K: the fewest rollouts of any prompt."""
    references_needed: int | None
    """K at which the loss to finite K is a point; None where this is not known (ties)."""
    tied: float
    """The share of references that tie with another one of their prompt."""
    judged_by: str
    frontier: FrontierEstimate
    source: str = "table/"
    """The folder of the table, for the command."""

    @cached_property
    def transform(self) -> Transform:
        """The transform, on the unit scale."""
        return parse_transform(self.name).transform

    @property
    def enough(self) -> bool:
        """True if finite K costs less than a point."""
        return self.limit_win_rate - self.own_win_rate < ENOUGH

    @property
    def command(self) -> str:
        """The command that makes the reward, to paste into a shell."""
        estimator = "" if self.estimator == "empirical" else f" --estimator {self.estimator}"
        table = shlex.quote(self.source)
        return f"calibrated-rewards reward {table} --reward-model ./rm --transform {self.name}{estimator} --out reward/"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from self._answer()
        yield f"\n  {self.command}\n"
        yield from (f"  {line}" for line in self._table())
        yield ""
        yield from self._notes()

    def _answer(self) -> Iterator[str]:
        """Write the three sentences: what to train, what it buys, whether K is enough."""
        procedure = format_procedure(self._procedure)
        yield f"Train with {self.name} ({format_objective(self.procedure)}) and beta {self.beta:.4g}."
        single = 100 * self.single_draw_gain.value
        cost = f"costs {-single:.1f} points" if single < 0 else f"gains {single:.1f} points"
        resolved = "" if self.gain.excludes(0.0) else "; these data do not tell the two apart"
        singly = "" if isinstance(self._procedure, Standard) else f", and {cost} of single draws"
        yield (
            f"It should win {format_share(self.win_rate)} of {procedure} duels by {self.judged_by}, against "
            f"{format_share(self.raw_win_rate)} for the raw score at the same KL {self.kl:g}{resolved}{singly}."
        )
        loss = 100 * (self.limit_win_rate - self.own_win_rate)
        if self.enough:
            yield f"K = {self.references:,} is enough: more references would add {max(loss, 0.0):.1f} points."
            return
        needed = f"; K = {self.references_needed:,} would lose 1" if self.references_needed else ""
        also = ", and the raw score wins more" if self.gain.value < 0 else ""
        yield (
            f"K = {self.references:,} is not enough: a policy that fits these references loses {loss:.1f} points "
            f"by {self.frontier.selected_by}{also}{needed}."
        )

    def _table(self) -> Iterator[str]:
        """Compare the rewards at this KL: one table."""
        procedure, single = repr(self._procedure), repr(Standard())
        points, judges = self.frontier.points, [*self.frontier.points[0].win_rates]
        columns = {
            f"{format_procedure(self._procedure)} by {judge}": [
                f"{point.win_rates[judge][procedure]}{point.mark(judge, procedure)}" for point in points
            ]
            for judge in reversed(judges)
        }
        if procedure != single:
            columns[f"one draw by {judges[-1]}"] = [str(point.win_rates[judges[-1]][single]) for point in points]
        columns["beta"] = [f"{point.beta:.4g}" for point in points]
        yield from format_table([point.arm for point in points], columns)

    def _notes(self) -> Iterator[str]:
        """Write where the numbers come from and how far they can be trusted."""
        of = self.frontier
        yield (
            f"The table: {of.prompts:,} prompts with {of.rollouts:,} rollouts or more, reweighted to each reward's "
            f"optimum at KL {self.kl:g}, as if K had no bound;"
        )
        yield (
            "the sentence above takes off what finite K costs. Both sides are decoded alike, selected by "
            f"{of.selected_by}; 95 % intervals over prompts."
        )
        if self.tied:
            yield (
                f"{100 * self.tied:.0f} % of the references tie with another: what transforms win by {of.selected_by} "
                "is for this table, with its ties and its K."
            )
        ess = min(point.ess_of[repr(self._procedure)] for point in self.frontier.points)
        if self.judged_by != of.selected_by and ess < RELIABLE_ESS:
            yield (
                f"~ rests on {ess:.1f} effective rollouts of a prompt, where win rates by a judge were found off by up "
                "to .04 and more: calibrate with a larger K, or ask for less KL."
            )
        if self.judged_by == of.selected_by:
            yield (
                f"No judge: {of.selected_by} judges itself. Calibrate with a second reward model, and name it with "
                "--judge."
            )

    @property
    def _procedure(self) -> ByRank:
        return parse_procedure(self.procedure)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as nested dictionaries, for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file in one step."""
        write_file(path, json.dumps({**self.as_json(), "command": self.command}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recommendation":
        """Read the file that `save` wrote."""
        try:
            fields = json.loads(Path(path).read_text())
            fields.pop("command")
            recommendation: Recommendation = from_json(cls, fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} needs to be a recommendation that `save` wrote, got {error!r}.") from error
        return recommendation


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
    calibration, as in `read_references`. Without an estimator, the better of "empirical" and "posterior" for this K is
    chosen. ValueError if the table cannot reach the KL.
    """
    references = _open(table, select, judge)
    name = f"identity:{kl:g}" if isinstance(procedure, Standard) else f"{format_name(procedure)}:{kl:g}"
    named = parse_transform(name)
    estimators: tuple[Estimator, ...] = ("empirical", "posterior") if estimator is None else (estimator,)
    expectations = [
        expect(references.table, named.transform, kl=named.kl, procedure=procedure, estimator=each, name=name)
        for each in estimators
    ]
    expected = max(expectations, key=lambda each: round(each.win_rate, 3))  # the first, if they are as good
    chosen = estimators[expectations.index(expected)]
    arm = "identity" if isinstance(procedure, Standard) else format_name(procedure)
    arms: dict[str, AnyObjective] = {each: OBJECTIVES[each] for each in ("raw", "z-score", "par", "identity")}
    arms[arm] = Fixed(Transformed(named.transform))
    procedures = [procedure] if isinstance(procedure, Standard) else [procedure, Standard()]
    frontier = estimate_frontier(
        references.samples,
        arms,
        [kl],
        procedures,
        selected_by=references.selected_by,
        judged_by=references.judged_by,
        table=references.table,
        estimator=chosen,
    )
    points = {point.arm: point for point in frontier.points}
    for needed in ("raw", arm):
        if needed not in points:
            raise ValueError(next(reason for reason in frontier.left_out if reason.startswith(needed)))
    return _summarise(references, named, procedure, expected.win_rate, expected.beta, chosen, frontier, arm)


def _open(table: Any, select: str | None, judge: str | None) -> References:
    if isinstance(table, References):
        return table
    if isinstance(table, ReferenceTable):
        scores = Samples([scores for _, scores in table.items()])
        return References(scores, table, select or "reward", select or "reward")
    return read_references(Path(table), select, judge)


def _summarise(
    references: References,
    named: NamedTransform,
    procedure: ByRank,
    own: float,
    beta: float,
    estimator: Estimator,
    frontier: FrontierEstimate,
    arm: str,
) -> Recommendation:
    """Take off what finite K costs, and find how many references would do."""
    points = {point.arm: point for point in frontier.points}
    key, judge, kl = repr(procedure), [*points[arm].win_rates][-1], float(named.kl or 0)
    tied = _share_of_ties(references.table)
    limit = own if tied else points[arm].win_rates[frontier.selected_by][key].value
    needed = None if tied else _references_needed(named.transform, kl, procedure, frontier.rollouts, estimator)
    loss = limit - own
    judged, raw = points[arm].win_rates[judge][key], points["raw"].win_rates[judge][key]
    if judge != frontier.selected_by and not tied:
        # By a judge a policy that fits noise loses in proportion to what it wins.
        loss *= (judged.value - 0.5) / max(limit - 0.5, 1e-9)
    single = points[arm].gains[judge].get(repr(Standard()), IntervalEstimate(0.0, None, None, None, frontier.prompts))
    return Recommendation(
        format_name(procedure),
        kl,
        named.name,
        beta,
        estimator,
        _shift(judged, -loss),
        raw,
        _shift(points[arm].gains[judge][key], -loss),
        single,
        own,
        limit,
        frontier.rollouts,
        needed,
        tied,
        judge,
        frontier,
        str(references.table.path or "table/"),
    )


def _shift(estimate: IntervalEstimate, by: float) -> IntervalEstimate:
    """Move an estimate and its interval."""
    low, high = (None if end is None else end + by for end in (estimate.low, estimate.high))
    return replace(estimate, value=estimate.value + by, low=low, high=high)


def _share_of_ties(table: ReferenceTable) -> float:
    """Return the share of references that tie with another one of their prompt."""
    tied = total = 0
    for _, scores in table.blocks(np.arange(len(table))):
        equal = np.diff(scores, axis=1) == 0
        edge = np.zeros((len(scores), 1), bool)
        tied += int((np.hstack([equal, edge]) | np.hstack([edge, equal])).sum())
        total += scores.size
    return tied / total


def _references_needed(transform: Transform, kl: float, procedure: ByRank, K: int, estimator: Estimator) -> int | None:
    """Find the K at which the loss is `ENOUGH`, from how it falls between K and 2K; rounded up to two digits."""
    limit = win_rate(transform, beta_for_kl(transform, kl), procedure)
    try:
        losses = [
            limit - win_rate_at_kl(transform, kl, procedure, each, estimator, draws=DRAWS).win_rate
            for each in (K, 2 * K)
        ]
    except ValueError:
        return None
    if not losses[0] > losses[1] > 0:
        return K
    needed = K * (losses[0] / ENOUGH) ** (1 / log2(losses[0] / losses[1]))
    digits = 10 ** max(0, floor(log10(needed)) - 1)
    return int(ceil(needed / digits) * digits)
