"""Results of a frontier: each objective at each KL, the verdicts that intervals allow, print and JSON.

In print the headline comes first, then a table for each judge, then notes. The columns are KLs, or where there are
several procedures beside one draw, those at the headline's KL. With `all_tables` each KL and judge has a table.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from calibrated_rewards.evaluation.estimates import NO_WIDTH, IntervalEstimate, RatesByJudge, from_json
from calibrated_rewards.evaluation.wording import (
    choose_judge,
    choose_procedure,
    few_prompts_notes,
    format_count,
    format_objective,
    format_points,
    format_procedure,
    format_share,
    format_table,
)
from calibrated_rewards.files import write_file

RELIABLE_ESS = 5
"""Below this effective sample size docs/evidence/results.md found win rates off by more than .01."""
ERRORS = (
    (1.5, 0.098, 0.088),
    (3.0, 0.07, 0.07),
    (5.0, 0.011, 0.012),
    (8.0, 0.01, 0.013),
    (12.0, 0.005, 0.005),
    (20.0, 0.003, 0.003),
    (50.0, 0.005, 0.006),
    (inf, 0.002, 0.002),
)
"""Below which ESS, the largest error of a win rate and of a gain that benchmarks/results/reweighted.json has there."""
OWN_ERROR = 0.02
"""The largest error of a gain by the score that selects, at any ESS there."""


@dataclass(frozen=True)
class FrontierPoint:
    """Results of one objective at one KL."""

    arm: str
    """The objective by its name on the command line: "identity", "exp:10", "raw", ..."""
    kl: float
    """Mean KL over the prompts, the same for all objectives."""
    kl_spread: float
    """Standard deviation of the KL between prompts: a raw score spends more on some prompts than on others."""
    beta: float
    ess: float
    """Effective sample size, in rollouts of a prompt: the smallest of `ess_of`."""
    ess_of: Mapping[str, float]
    """By procedure, 1 / sum w_i^2: the smallest over policy, its output and the base's; harmonic mean over prompts."""
    win_rates: RatesByJudge
    """By the scorer that judges, then by the procedure's repr."""
    gains: RatesByJudge
    """Win rates less those of the first objective, paired by prompt; empty where that does not reach this KL."""
    ess_of_gains: Mapping[str, float] = field(default_factory=dict)
    """By procedure, the smaller of this objective's and the first one's; empty where there are no gains."""

    corrected: bool = True
    """False where half of the rollouts were too few to correct this win rate, or the first objective's."""

    def ess_of_gain(self, procedure: str) -> float:
        """Return the effective sample size that a gain rests on."""
        return self.ess_of_gains.get(procedure, self.ess_of[procedure])

    def verdict(self, judge: str, procedure: str) -> Literal["better", "worse"] | None:
        """Compare with the first objective; None where the interval, widened by the resolution limit, holds 0."""
        return self.judge_gain(self.gains[judge][procedure], judge, procedure) if self.gains else None

    def judge_gain(self, gain: IntervalEstimate, judge: str, procedure: str) -> Literal["better", "worse"] | None:
        """Give the verdict of a gain over the first objective, as found or less what finite K costs."""
        if gain.low is None or gain.high is None or not self.corrected:
            return None
        limit = self.limit_of_gain(judge, procedure)
        return "better" if gain.low > limit else "worse" if gain.high < -limit else None

    def limit_of_gain(self, judge: str, procedure: str) -> float:
        """Return how far off a gain may be at its effective sample size; 0 for win rates that are known exactly."""
        if self.win_rates[judge][procedure].exact and self.gains[judge][procedure].exact:
            return 0.0
        limit = resolution_limit(self.ess_of_gain(procedure))
        # The score that selects comes first.
        return min(limit, OWN_ERROR) if judge == next(iter(self.win_rates)) else limit

    def format_doubt(self, gain: IntervalEstimate, judge: str, procedure: str) -> str:
        """Say why a gain is no verdict, in a clause that fits its interval; nothing where it is one."""
        if self.judge_gain(gain, judge, procedure):
            return ""
        if gain.exact and abs(gain.value) <= NO_WIDTH:
            return "; both win alike"
        if gain.low is None or not (gain.exact or gain.excludes(0.0)):
            return "; these data do not tell the two apart"
        if not self.corrected:
            return "; not certain: too few rollouts of a prompt to correct it for their number"
        return (
            f"; not certain: it rests on {self.ess_of_gain(procedure):.1f} effective completions of a prompt, where "
            f"gains were off by up to {100 * self.limit_of_gain(judge, procedure):.1f} points"
        )

    def format_rate(self, judge: str, procedure: str) -> str:
        """Write a win rate, with a mark where it rests on a small effective sample size."""
        return f"{format_share(self.win_rates[judge][procedure])} {self.mark(judge, procedure)}".rstrip()

    def mark(self, judge: str, procedure: str) -> str:
        """Return the mark of a win rate that rests on a small effective sample size; none for one that is exact."""
        return (
            ""
            if self.win_rates[judge][procedure].exact
            else "~"
            if not self.corrected
            else mark_ess(self.ess_of[procedure])
        )

    def format_gain(self, judge: str, procedure: str) -> str:
        """Write a gain over the first objective, with a mark where it rests on a small effective sample size."""
        return f"{format_points(self.gains[judge][procedure])} {mark_ess(self.ess_of_gain(procedure))}".rstrip()


def resolution_limit(ess: float) -> float:
    """Return the largest error found in gains at an effective sample size.

    Measured on one model of scores (docs/evidence/results.md): it shows what a small K does, and is no bound.

    >>> resolution_limit(2.0), resolution_limit(100.0)
    (0.07, 0.002)
    """
    return next(gain for below, _, gain in ERRORS if ess < below or below == inf)


@dataclass(frozen=True)
class FrontierEstimate:
    """Results of `estimate_frontier`: all objectives at each KL, without training."""

    points: tuple[FrontierPoint, ...]
    procedures: tuple[str, ...]
    selected_by: str
    prompts: int
    rollouts: int
    """Rollouts of each prompt, K; the fewest of any."""
    left_out: tuple[str, ...] = ()
    """Objectives that are missing at a KL, with the reason."""

    def __str__(self) -> str:
        return self.format()

    def format(self, all_tables: bool = False) -> str:
        """Write the headline, a table for each judge, or for each judge and KL, and notes."""
        return "\n".join(self._lines(all_tables))

    @property
    def unreliable(self) -> bool:
        """True if any number rests on a small effective sample size."""
        return any(value < RELIABLE_ESS for point in self.points for value in point.ess_of.values())

    def main_points(self) -> tuple[list[FrontierPoint], str, str]:
        """Return what a summary is about: the points at the KL nearest 0.5, the judge, and the procedure."""
        kl = min((point.kl for point in self.points), key=lambda kl: abs(kl - 0.5))
        judge = choose_judge([*self.points[0].win_rates], self.selected_by)
        return [point for point in self.points if point.kl == kl], judge, choose_procedure(self.procedures)

    def headline(self) -> str:
        """Report the objective that is made for the procedure, or the highest, and then that it was picked."""
        points, judge, procedure = self.main_points()
        first = points[0]
        made_for_it = "identity" if procedure == "Standard()" else f"optimum for {format_procedure(procedure)}"
        best = next((point for point in points if format_objective(point.arm) == made_for_it), None)
        picked = ""
        if best is None:
            best = max(points, key=lambda point: point.win_rates[judge][procedure].value)
            picked = f", picked as the highest of {len(points)} and flattered by it," * (len(points) > 1)
        sentence = (
            f"Without training, at KL {best.kl:g} and {format_procedure(procedure)}, judged by {judge}: "
            f"{format_objective(best.arm)}{picked} wins {best.format_rate(judge, procedure)}"
        )
        if best is not first and best.gains:
            doubt = best.format_doubt(best.gains[judge][procedure], judge, procedure)
            sentence += f", {best.format_gain(judge, procedure)} from {format_objective(first.arm)}{doubt}"
        ess = min(best.ess_of[procedure], best.ess_of_gain(procedure))
        if ess < RELIABLE_ESS and "~" in sentence and "effective" not in sentence:
            sentence += f" (~: from {ess:.1f} effective completions of a prompt, too few to go by the interval)"
        return f"{sentence}."

    def _lines(self, all_tables: bool) -> Iterator[str]:
        """The headline, the tables with the verdicts, and notes."""
        yield from few_prompts_notes(self.prompts)
        if self.points:
            yield self.headline()
            yield from self._all_tables() if all_tables else self._tables()
        yield (
            f"\n{format_count(self.prompts, 'prompt')}, {self.rollouts:,} rollouts of each or more. Win rates over the "
            f"reference, both sides under\nthe procedure, which selects by {self.selected_by}"
            f"{'; 95 % intervals over prompts' * (self.prompts > 1)}."
        )
        if self.unreliable:
            (low, lowest, _), (mid, middle, _), (high, highest, _) = ERRORS[:3]
            yield (
                f"\n~ rests on an ESS below {RELIABLE_ESS}. Where the truth is known, win rates were off by up to "
                f"{highest:g} at an ESS of\n{mid:g} to {high:g}, {middle:g} at {low:g} to {mid:g}, {lowest:g} below "
                "(docs/evidence/results.md). A larger K helps."
            )
        if len({point.arm for point in self.points}) > 1 and any(point.gains for point in self.points):
            yield (
                "\nBetter and worse: the interval is farther from 0 than gains were found off at that ESS, a measure "
                "and no bound.\nIntervals are over prompts, each by itself: of many, one in twenty misses by chance."
            )
        yield from (f"\nLeft out: {reason}" for reason in self.left_out)

    def _tables(self) -> Iterator[str]:
        """A table for each judge, what the headline is about first: win rates at the main KL by procedure, or by KL."""
        points, main, procedure = self.main_points()
        (kl,) = {point.kl for point in points}
        named = [each for each in self.procedures if each != "Standard()"]
        several = len(named) > 1
        shown, title = (named, f"KL {kl:g}") if several else ([procedure], format_procedure(procedure))
        names = [*dict.fromkeys(point.arm for point in (points if several else self.points))]
        ess = {point.arm: f"{min(point.ess_of[each] for each in shown):.1f}" for point in points}
        betas = {point.arm: f"{point.beta:.4g}" for point in points}
        ends = ("smallest ESS", "beta") if several else (f"ESS at KL {kl:g}", f"beta at KL {kl:g}")
        for judge in sorted(points[0].win_rates, key=lambda judge: judge != main):
            yield f"\n{title}, judged by {judge}"
            if several:
                columns = {format_procedure(each): self._column(names, kl, judge, each) for each in shown}
            else:
                columns = {f"KL {each:g}": self._column(names, each, judge, procedure) for each in self._kls}
            for head, cells in zip(ends, (ess, betas), strict=True):
                columns[head] = [cells.get(name, "") for name in names]
            yield from (f"  {line}" for line in format_table(names, columns))
            yield from self._verdict_lines(points, judge, shown)
        if len(self._kls) > 1 or len(self.procedures) > len(shown):
            others = ", ".join(format_procedure(each) for each in self.procedures if each not in shown)
            yield f"\n--all prints every KL with its verdicts{f', and {others}' * bool(others)}."

    @property
    def _kls(self) -> list[float]:
        return sorted({point.kl for point in self.points})

    def _column(self, names: Sequence[str], kl: float, judge: str, procedure: str) -> list[str]:
        """Write the win rate of each objective at a KL; nothing for one that does not reach it."""
        at = {point.arm: point for point in self.points if point.kl == kl}
        return [
            f"{at[name].win_rates[judge][procedure]}{at[name].mark(judge, procedure)}" if name in at else ""
            for name in names
        ]

    def _all_tables(self) -> Iterator[str]:
        """A table for each KL and judge, with all procedures."""
        for kl in self._kls:
            points = [point for point in self.points if point.kl == kl]
            for judge in points[0].win_rates:
                yield f"\nKL {kl:g}, judged by {judge}"
                yield from self._table(points, judge)
                yield from self._verdict_lines(points, judge, self.procedures)

    def _table(self, points: Sequence[FrontierPoint], judge: str) -> Iterator[str]:
        columns = {
            format_procedure(each): [f"{point.win_rates[judge][each]}{point.mark(judge, each)}" for point in points]
            for each in self.procedures
        }
        numbers = {
            "ESS": [f"{point.ess:.1f}" for point in points],
            "KL sd": [f"{point.kl_spread:.2f}" for point in points],
            "beta": [f"{point.beta:.3g}" for point in points],
        }
        yield from (f"  {line}" for line in format_table([point.arm for point in points], {**columns, **numbers}))

    def _verdict_lines(self, points: Sequence[FrontierPoint], judge: str, procedures: Sequence[str]) -> Iterator[str]:
        """Each procedure's verdicts against the first objective, by intervals of paired differences."""
        first, *others = points
        if not others or not first.gains or others[0].gains[judge][self.procedures[0]].low is None:
            return
        for procedure in procedures:
            names: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
            for point in others:
                verdict = point.verdict(judge, procedure)
                mark = mark_ess(point.ess_of_gain(procedure))
                gain = f" {point.gains[judge][procedure].value:+.3f}{mark}" if verdict else ""
                names[verdict or "not told apart"].append(f"{point.arm}{gain}")
            verdicts = "; ".join(f"{verdict}: {', '.join(each)}" for verdict, each in names.items() if each)
            yield f"  {format_procedure(procedure)} at KL {first.kl:g}, against {first.arm}: {verdicts}"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as nested dictionaries, for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file in one step."""
        write_file(path, json.dumps(self.as_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FrontierEstimate":
        """Read the file that `save` wrote."""
        try:
            frontier: FrontierEstimate = from_json(cls, json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} needs to be a frontier that FrontierEstimate.save wrote, got {error!r}."
            ) from error
        return frontier


def mark_ess(ess: float) -> str:
    """Return the mark of a number that rests on a small effective sample size."""
    return "~" * (ess < RELIABLE_ESS)
