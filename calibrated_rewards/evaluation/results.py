"""Results of an evaluation and of a frontier: their numbers, the claims that these allow, print and JSON.

In print the claims come first, then the tables, then notes.

>>> half = IntervalEstimate(0.5, 0.4, 0.6, 0.05, 100)
>>> comparison = Comparison("a", "b", "judge", "Standard()", half)
>>> print(comparison, comparison.significant)
a less b, Standard() judged by judge: 0.500 [0.400, 0.600] True
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from calibrated_rewards.evaluation.estimates import IntervalEstimate
from calibrated_rewards.evaluation.wording import (
    few_prompts_notes,
    format_count,
    format_number,
    format_objective,
    format_points,
    format_procedure,
    format_share,
    format_table,
    plain_prompts_note,
)
from calibrated_rewards.files import write_file

RatesByJudge = Mapping[str, Mapping[str, IntervalEstimate]]

# Empty completions are reported from this share on.
MANY_EMPTY = 0.01
RELIABLE_ESS = 5
"""Below this effective sample size docs/evidence/results.md found win rates off by more than .02."""
ERRORS = (
    (1.5, 0.137, 0.113),
    (3.0, 0.072, 0.062),
    (5.0, 0.042, 0.039),
    (8.0, 0.023, 0.025),
    (12.0, 0.014, 0.015),
    (20.0, 0.007, 0.008),
    (50.0, 0.005, 0.006),
    (inf, 0.002, 0.002),
)
"""Below which ESS, the largest error of a win rate and of a gain that benchmarks/results/reweighted.json has there."""


@dataclass(frozen=True)
class Precision:
    """The dtype in which a measure of KL reads its two models, and the rounding between them."""

    read_in: str
    """The dtype that they compute in, such as float32."""
    rounding: str | None = None
    """The dtype in which the two have the same weights, one of them rounded to it; None where they are two models."""

    def notes(self) -> Iterator[str]:
        """Warn of a KL that was not read in float32, or is of one model saved in two dtypes."""
        if self.read_in != "float32":
            yield (
                f"the KL is read in {self.read_in}, not float32: rounding alone can make it some hundredths of a nat"
            )
        if self.rounding is not None:
            yield (
                f"its weights are those of the reference, one of the two rounded to {self.rounding}: the KL is that "
                "of rounding, and its interval begins at 0"
            )


@dataclass(frozen=True)
class PolicyResult:
    """Measurements of one policy, or of the reference."""

    name: str
    kl: IntervalEstimate | None
    """KL(policy || reference) of a completion, in nats; None for the reference, and without log-probabilities."""
    tokens: IntervalEstimate | None
    """Tokens of a completion; None where the sampler does not count them."""
    scores: Mapping[str, IntervalEstimate]
    """The mean score by each scorer."""
    win_rates: RatesByJudge
    """Win rates over the reference, by the scorer that judges, then by the procedure's repr."""
    not_as_drawn: int = 0
    """Completions whose text makes other tokens than were drawn: their KL is along the tokens of the text."""
    kl_precision: Precision | None = None
    """The precision of the KL; None where no KL was measured, or the measure does not know it."""
    empty: int = 0
    """Completions without a text."""

    def claim(self, judge: str, procedure: str) -> str:
        """Write a win rate with what its interval allows to say of policy and reference."""
        rate = self.win_rates[judge][procedure]
        at_kl = "" if self.kl is None else f" at a KL of {format_number(self.kl.value)}"
        if rate.low is None:
            verdict = ", from one prompt, without an interval"
        elif not rate.excludes(0.5):
            verdict = ", whether it is better than the reference these data do not tell"
        else:
            verdict = ", above the reference" if rate.low > 0.5 else ", below the reference"
        return f"{self.name} wins {format_share(rate)}{at_kl}{verdict}"


@dataclass(frozen=True)
class Comparison:
    """A win rate of one policy less that of another, on the same prompts: paired, so what prompts share cancels."""

    a: str
    b: str
    judged_by: str
    procedure: str
    value: IntervalEstimate

    @property
    def significant(self) -> bool:
        """True if the interval leaves out 0; one without width allows no conclusion about other prompts."""
        return self.value.excludes(0.0)

    @property
    def winner(self) -> str:
        """The policy with the larger win rate."""
        return self.a if self.value.value > 0 else self.b

    @property
    def claim(self) -> str:
        """The claim that the interval allows."""
        return f"{self.winner} is ahead" if self.significant else "these data do not tell"

    def __str__(self) -> str:
        return f"{self.a} less {self.b}, {self.procedure} judged by {self.judged_by}: {self.value}"


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`: each policy beside the reference, and each beside another."""

    reference: PolicyResult
    policies: tuple[PolicyResult, ...]
    differences: tuple[Comparison, ...]
    selected_by: str
    """The scorer that best-of-N and worst-of-N select by; each scorer judges what was selected."""
    prompts: int
    completions: int
    """Completions of each prompt, m."""
    plain_prompts: int = 0
    """Prompts that are plain text although the models have a chat template, which is not used for text."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def claims(self) -> Iterator[str]:
        """Claim what the intervals allow of each policy beside the reference, and of each beside another."""
        rates = self.policies[0].win_rates
        judge = choose_judge([*rates], self.selected_by)
        procedure = choose_procedure([*rates[judge]])
        by = f"judged by {judge}, {format_procedure(procedure)}"
        yield f"J{by[1:]}: {'; '.join(policy.claim(judge, procedure) for policy in self.policies)}."
        comparisons = [c for c in self.differences if (c.judged_by, c.procedure) == (judge, procedure)]
        if comparisons:
            claims = [f"{c.a} less {c.b}: {format_points(c.value)}, {c.claim}" for c in comparisons]
            yield f"Between policies, {by}: {'; '.join(claims)}."

    def completion_notes(self) -> Iterator[str]:
        """Warn of many empty completions, and of plain text for a chat model."""
        drawn = self.prompts * self.completions
        many = [each for each in (self.reference, *self.policies) if each.empty > MANY_EMPTY * drawn]
        if many:
            yield f"completions are empty: {', '.join(f'{each.empty / drawn:.1%} of {each.name}' for each in many)}"
        if self.plain_prompts:
            yield plain_prompts_note(self.plain_prompts, self.prompts)
        elif many:
            yield "a policy that ends at once was not trained on such prompts, or reads them otherwise than in training"

    def kl_notes(self) -> Iterator[str]:
        """Warn of policies whose KL is along other tokens than were drawn, or was read in low precision."""
        drawn = format_count(self.prompts * self.completions, "completion")
        for each in self.policies:
            if each.not_as_drawn:
                makes = "makes" if each.not_as_drawn == 1 else "make"
                yield (
                    f"{each.name}: {each.not_as_drawn:,} of {drawn} {makes} other tokens than were drawn, and the KL "
                    "is along those"
                )
            yield from (f"{each.name}: {note}" for note in (each.kl_precision.notes() if each.kl_precision else ()))

    def _lines(self) -> Iterator[str]:
        """Claims, tables with a row for each policy, comparisons, and notes."""
        yield from few_prompts_notes(self.prompts)
        yield from self.claims()
        everyone = (self.reference, *self.policies)
        columns: dict[str, list[IntervalEstimate | None]] = {
            "KL, nats": [each.kl for each in everyone],
            "tokens": [each.tokens for each in everyone],
            **{f"mean {scorer}": [each.scores[scorer] for each in everyone] for scorer in self.reference.scores},
        }
        yield from ("", *format_table([each.name for each in everyone], columns))
        for judge, rates in self.policies[0].win_rates.items():
            yield from ("", f"wins over the reference, judged by {judge}")
            rows = {how: [each.win_rates[judge][how] for each in self.policies] for how in rates}
            yield from format_table([each.name for each in self.policies], rows)
        if self.differences:
            yield from ("", *self._comparison_lines())
        drawn = f"{format_count(self.prompts, 'prompt')}, {format_count(self.completions, 'completion')} of each"
        brackets = "; in brackets 95% intervals, by prompt" * (self.prompts > 1)
        yield from ("", f"{drawn}; best and worst of N selected by {self.selected_by}{brackets}")
        yield from (*self.completion_notes(), *self.kl_notes())

    def _comparison_lines(self) -> Iterator[str]:
        """Each significant comparison as a claim, the others as open."""
        significant = [each for each in self.differences if each.significant]
        has = "has" if len(significant) == 1 else "have"
        of = format_count(len(self.differences), "difference")
        yield f"of {of} of win rates, {len(significant)} {has} an interval without 0"
        for each in significant:
            yield f"  {each.winner} wins more than {each.b if each.winner == each.a else each.a}: {each}"
        if len(significant) < len(self.differences):
            yield f"  {'the others: ' * bool(significant)}these prompts do not tell which of the two wins more"
            yield from (f"    {each}" for each in self.differences if not each.significant)
        if significant and len(self.differences) > 1:
            yield "  each interval is for itself: between equals, one of twenty leaves 0 out"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, nested dictionaries and lists."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file in one step."""
        write_file(path, json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read the file that `save` wrote."""
        try:
            evaluation: Evaluation = _from_json(cls, json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be an evaluation that was saved, got something else ({error!r})") from error
        return evaluation


@dataclass(frozen=True)
class FrontierPoint:
    """One objective at one KL."""

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

    def ess_of_gain(self, procedure: str) -> float:
        """Return the effective sample size that a gain rests on."""
        return self.ess_of_gains.get(procedure, self.ess_of[procedure])

    def verdict(self, judge: str, procedure: str) -> Literal["better", "worse"] | None:
        """Compare with the first objective; None where the interval, widened by the resolution limit, holds 0."""
        gain = self.gains[judge][procedure] if self.gains else None
        if gain is None or gain.low is None or gain.high is None:
            return None
        limit = resolution_limit(self.ess_of_gain(procedure))
        return "better" if gain.low > limit else "worse" if gain.high < -limit else None

    def format_rate(self, judge: str, procedure: str) -> str:
        """Write a win rate, with a mark where it rests on a small effective sample size."""
        return f"{format_share(self.win_rates[judge][procedure])} {mark_ess(self.ess_of[procedure])}".rstrip()

    def format_gain(self, judge: str, procedure: str) -> str:
        """Write a gain over the first objective, with a mark where it rests on a small effective sample size."""
        return f"{format_points(self.gains[judge][procedure])} {mark_ess(self.ess_of_gain(procedure))}".rstrip()


def resolution_limit(ess: float) -> float:
    """Return the largest error found in gains at an effective sample size.

    Measured on one model of scores (docs/evidence/results.md): it shows what a small K does, and is no bound.

    >>> resolution_limit(2.0), resolution_limit(100.0)
    (0.062, 0.002)
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
        return "\n".join(self._lines())

    @property
    def unreliable(self) -> bool:
        """True if any number rests on a small effective sample size."""
        return any(value < RELIABLE_ESS for point in self.points for value in point.ess_of.values())

    def main_points(self) -> tuple[list[FrontierPoint], str, str]:
        """Return what a summary is about: the points at the KL nearest 1, the judge, and the procedure."""
        kl = min((point.kl for point in self.points), key=lambda kl: abs(kl - 1.0))
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
            open_ = "" if best.verdict(judge, procedure) else "; these data do not tell the two apart"
            sentence += f", {best.format_gain(judge, procedure)} from {format_objective(first.arm)}{open_}"
        ess = min(best.ess_of[procedure], best.ess_of_gain(procedure))
        if ess < RELIABLE_ESS:
            sentence += f" (~: from {ess:.1f} effective completions of a prompt, too few to go by the interval)"
        return f"{sentence}."

    def _lines(self) -> Iterator[str]:
        """The headline, a table for each KL and judge with the verdicts, and notes."""
        yield from few_prompts_notes(self.prompts)
        if self.points:
            yield self.headline()
        for kl in sorted({point.kl for point in self.points}):
            points = [point for point in self.points if point.kl == kl]
            for judge in points[0].win_rates:
                yield f"\nKL {kl:g}, judged by {judge}"
                yield from self._table(points, judge)
                yield from self._verdict_lines(points, judge)
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

    def _table(self, points: Sequence[FrontierPoint], judge: str) -> Iterator[str]:
        columns = {
            each: [f"{point.win_rates[judge][each]}{mark_ess(point.ess_of[each])}" for point in points]
            for each in self.procedures
        }
        numbers = {
            "ESS": [f"{point.ess:.1f}" for point in points],
            "KL sd": [f"{point.kl_spread:.2f}" for point in points],
            "beta": [f"{point.beta:.3g}" for point in points],
        }
        yield from (f"  {line}" for line in format_table([point.arm for point in points], {**columns, **numbers}))

    def _verdict_lines(self, points: Sequence[FrontierPoint], judge: str) -> Iterator[str]:
        """Each procedure's verdicts against the first objective, by intervals of paired differences."""
        first, *others = points
        if not others or not first.gains or others[0].gains[judge][self.procedures[0]].low is None:
            return
        for procedure in self.procedures:
            names: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
            for point in others:
                verdict = point.verdict(judge, procedure)
                mark = mark_ess(point.ess_of_gain(procedure))
                gain = f" {point.gains[judge][procedure].value:+.3f}{mark}" if verdict else ""
                names[verdict or "not told apart"].append(f"{point.arm}{gain}")
            verdicts = "; ".join(f"{verdict}: {', '.join(each)}" for verdict, each in names.items() if each)
            yield f"  {procedure} against {first.arm}: {verdicts}"

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
            frontier: FrontierEstimate = _from_json(cls, json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} needs to be a frontier that FrontierEstimate.save wrote, got {error!r}."
            ) from error
        return frontier


def mark_ess(ess: float) -> str:
    """Return the mark of a number that rests on a small effective sample size."""
    return "~" * (ess < RELIABLE_ESS)


def choose_procedure(names: Sequence[str]) -> str:
    """Choose the procedure that a summary is about: best-of-N, if it is among them."""
    return next((name for name in names if name.startswith("BestOf")), names[0])


def choose_judge(names: Sequence[str], selected_by: str) -> str:
    """Choose the judge that a summary goes by: a scorer that did not select, if there is one."""
    return next((name for name in names if name != selected_by), selected_by)


def _from_json(kind: Any, content: Any) -> Any:
    """Build a dataclass, or any type that its fields are annotated with, from what `asdict` and JSON made of it."""
    if kind is IntervalEstimate:
        return IntervalEstimate.from_json(content)
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _from_json(kinds[name], each) for name, each in content.items()})
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if content is None else _from_json(parts[0], content)
    if origin is tuple:
        return tuple(_from_json(parts[0], each) for each in content)
    return {name: _from_json(parts[1], each) for name, each in content.items()} if origin is Mapping else content
