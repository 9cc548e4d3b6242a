"""The result of `recommend`: three sentences, a command, one table and notes; in print, as fields and as JSON."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calibrated_rewards.evaluation.estimates import IntervalEstimate, from_json
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate, FrontierPoint
from calibrated_rewards.evaluation.reward_commands import RecordedScorer
from calibrated_rewards.evaluation.wording import (
    format_points,
    format_procedure,
    format_share,
    format_table,
    format_transform,
)
from calibrated_rewards.files import write_file
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import ByRank, parse_procedure, parse_transform
from calibrated_rewards.theory.procedures import Standard
from calibrated_rewards.theory.transforms import Transform

ENOUGH = 0.01
"""A loss to finite K of less than this, a point, is enough."""
AS_GOOD = 0.003
"""Win rates that differ by less are as good: they are averages over drawn gaps between references."""
ONLY_COMPARED = ("raw", "z-score", "par")
"""Rows of the table that are no transform of the quantile, and are never recommended."""
# Below this the KL's weight is lost beside the reward's.
SMALL_BETA = 1e-3


@dataclass(frozen=True)
class Recommendation:
    """The transform and beta to train with for a procedure, and what to expect: print it, or read its fields."""

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
    raw_win_rate: IntervalEstimate | None
    """The same for the raw score at the same KL; None where half of the rollouts are too few to correct it."""
    gain: IntervalEstimate | None
    """The first less the second, paired by prompt."""
    gain_shown: bool
    """True if 0 is farther from the gain's interval than gains were off at that effective sample size."""
    single_draw_gain: IntervalEstimate
    """The same difference for single draws."""
    own_win_rate: float
    """The first, by the score that is trained for."""
    raw_own_win_rate: IntervalEstimate | None
    """The second, by the score that is trained for."""
    limit_win_rate: float | None
    """The first by that score with infinitely many references a prompt; None where it is not known."""
    references: int
    """K: the median number of rollouts of a prompt."""
    references_needed: int | None
    """K at which the loss to finite K is a point; None where it is not known, or is less already."""
    tied: float
    """The share of references that tie with another one of their prompt."""
    judged_by: str
    frontier: FrontierEstimate
    source: str = "table/"
    """The folder of the table, for the command."""
    scorer: RecordedScorer = RecordedScorer()  # noqa: RUF009 (frozen)
    """What the table says of its reward model, for the command."""

    @cached_property
    def transform(self) -> Transform:
        """The transform, on the unit scale."""
        return parse_transform(self.name).transform

    @property
    def loss(self) -> float | None:
        """What finite K costs, by the score that is trained for; None where it is not known."""
        return None if self.limit_win_rate is None else self.limit_win_rate - self.own_win_rate

    @property
    def enough(self) -> bool | None:
        """True if finite K costs less than a point; None where that is not known."""
        return None if self.loss is None else self.loss < ENOUGH

    @property
    def raw_is_better(self) -> bool:
        """True if the raw score wins more than what is recommended, at this K and by the score that is trained for."""
        raw = self.raw_own_win_rate
        return raw is not None and (raw.value if raw.low is None else raw.low) > self.own_win_rate

    @property
    def command(self) -> str:
        """The command that makes the reward, to paste into a shell; for a function the lines of Python."""
        return self.scorer.write_command(self.source, self.name, self.beta, self.estimator)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield self._what_to_train()
        yield self._what_it_wins()
        yield self._whether_k_is_enough()
        yield ""
        yield from (f"  {line}" for line in self.command.splitlines())
        if self.scorer.note:
            yield self.scorer.note
        yield ""
        yield from (f"  {line}" for line in self._table())
        yield ""
        if why := self._why_not_the_highest():
            yield why
        yield from self._notes()

    def _what_to_train(self) -> str:
        words = format_transform(self.transform)
        if self.raw_is_better:
            return (
                f"With K = {self.references:,} no transform beats the raw score at KL {self.kl:g}: calibrate with more "
                f"and then train with {self.name} ({words}; beta {self.beta:.4g} with this table)."
            )
        return f"Train with {self.name} ({words}) and beta {self.beta:.4g}."

    def _what_it_wins(self) -> str:
        procedure = format_procedure(self._procedure)
        start = f"It should win {format_share(self.win_rate)} of {procedure} duels by {self.judged_by}"
        if self.raw_win_rate is None or self.gain is None:
            return f"{start}. What the raw score wins is not known from so few rollouts of a prompt at this KL."
        unclear = self._point.format_doubt(self.gain, self.judged_by, repr(self._procedure))
        singly = ""
        if not isinstance(self._procedure, Standard):
            points = 100 * self.single_draw_gain.value
            singly = f" It {'costs' if points < 0 else 'gains'} {abs(points):.1f} points of single draws."
        return (
            f"{start}, {format_points(self.gain)} from the raw score's {100 * self.raw_win_rate.value:.1f} % at the "
            f"same KL {self.kl:g}{unclear}.{singly}"
        )

    def _whether_k_is_enough(self) -> str:
        if self.loss is None:
            return f"Whether K = {self.references:,} is enough is not known from so few, with ties."
        if self.enough:
            more = 100 * max(self.loss, 0.0)
            return f"K = {self.references:,} is enough: more references would add {more:.1f} points."
        needed = f"; K = {self.references_needed:,} would lose 1 point" if self.references_needed else ""
        return (
            f"K = {self.references:,} is not enough: a policy that fits these references loses {100 * self.loss:.1f} "
            f"points by {self.frontier.selected_by}{needed}."
        )

    def _table(self) -> Iterator[str]:
        """Compare the rewards at this KL: one table."""
        procedure, single = repr(self._procedure), repr(Standard())
        points, judge = self.frontier.points, self.judged_by
        words = format_procedure(self._procedure)

        def column(judge: str, procedure: str) -> list[str]:
            return [f"{point.win_rates[judge][procedure]}{point.mark(judge, procedure)}" for point in points]

        judges = dict.fromkeys((judge, self.frontier.selected_by))
        columns = {f"{words} by {each}": column(each, procedure) for each in judges}
        at_k = f"{self.own_win_rate:.3f}"
        columns[f"at K = {self.references}"] = [at_k if point.arm == self._arm else "" for point in points]
        if procedure != single:
            columns[f"one draw by {judge}"] = column(judge, single)
        columns["beta"] = [f"{point.beta:.4g}" for point in points]
        yield from format_table([point.arm for point in points], columns)

    def _notes(self) -> Iterator[str]:
        """Write where the numbers come from and how far they can be trusted."""
        of = self.frontier
        yield (
            f"The table: {of.prompts:,} prompts with {of.rollouts:,} rollouts or more, reweighted to each reward's "
            f"optimum at KL {self.kl:g},"
        )
        yield (
            f"as if K had no bound; the sentence above is at K = {self.references:,}. Both sides are decoded alike, "
            f"selected by {of.selected_by}."
        )
        yield "95 % intervals are over prompts; what is known exactly has none."
        if isinstance(self._procedure, BestOfUpTo):
            yield "Each side draws its own N anew; `frontier --best-of 1 4 16` has win rates at a fixed N."
        if self.tied:
            yield (
                f"{100 * self.tied:.3g} % of the references tie with another: what transforms win by {of.selected_by} "
                "is for this table,"
            )
            yield "with its ties and its K, and what K costs is judged by half of the references."
        if any(point.mark(self.judged_by, repr(self._procedure)) for point in of.points):
            yield (
                "~ rests on few effective rollouts of a prompt; by a judge such numbers were off by .02 and more "
                "(docs/evidence/results.md)."
            )
        if self.judged_by == of.selected_by:
            yield f"No judge: {of.selected_by} judges itself. Calibrate with a second reward model (--judge)."
        elif self.win_rate.low is not None and self.win_rate.low < 0.5 < (self.win_rate.high or 0.0):
            yield f"The interval holds 50 %: {self.judged_by} may see no gain over the reference at all."
        if self.beta < SMALL_BETA:
            yield "A beta this small gives the KL hardly any weight in a trainer: ask for less KL, or for a smaller N."

    @property
    def _procedure(self) -> ByRank:
        return parse_procedure(self.procedure)

    @property
    def _arm(self) -> str:
        return self.name.rpartition(":")[0]

    @property
    def _point(self) -> FrontierPoint:
        return next(point for point in self.frontier.points if point.arm == self._arm)

    def _why_not_the_highest(self) -> str | None:
        """Say why the highest row of the table is not the answer; None where it is, or is as good."""
        judge, procedure = self.judged_by, repr(self._procedure)

        def rate(point: FrontierPoint) -> float:
            return point.win_rates[judge][procedure].value

        highest = max(self.frontier.points, key=rate)
        as_good = 0.0005 if highest.arm in ONLY_COMPARED else AS_GOOD
        if self.raw_is_better or rate(highest) <= rate(self._point) + as_good:
            return None
        if highest.arm in ONLY_COMPARED:
            return (
                f"{highest.arm} is higher but only compares: the answer is a transform of the quantile, which `reward` "
                "can make."
            )
        return (
            f"{highest.arm} is higher here; the answer is the transform that wins most by {self.frontier.selected_by} "
            f"at K = {self.references:,}."
        )

    def as_json(self) -> dict[str, Any]:
        """Return the fields as nested dictionaries, and the command, for JSON."""
        return {**asdict(self), "command": self.command}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file in one step."""
        write_file(path, json.dumps(self.as_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recommendation":
        """Read the file that `save` wrote."""
        try:
            fields = json.loads(Path(path).read_text())
            fields.pop("command", None)
            recommendation: Recommendation = from_json(cls, fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} needs to be a recommendation that `save` wrote, got {error!r}.") from error
        return recommendation
