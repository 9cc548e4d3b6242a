"""Results of an evaluation: their numbers, the claims that these allow, print and JSON.

In print the claims come first, then the tables, then notes.

>>> half = IntervalEstimate(0.5, 0.4, 0.6, 0.05, 100)
>>> comparison = Comparison("a", "b", "judge", "Standard()", half)
>>> print(comparison, comparison.significant)
a less b, Standard() judged by judge: 0.500 [0.400, 0.600] True
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrated_rewards.evaluation.estimates import IntervalEstimate, RatesByJudge, from_json
from calibrated_rewards.evaluation.wording import (
    choose_judge,
    choose_procedure,
    few_prompts_notes,
    format_count,
    format_number,
    format_points,
    format_procedure,
    format_share,
    format_table,
    plain_prompts_note,
)
from calibrated_rewards.files import write_file

# Empty completions are reported from this share on.
MANY_EMPTY = 0.01


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
        yield from (*self.claims(), *self.completion_notes())  # what puts the claims in doubt stands next to them
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
        yield from self.kl_notes()

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
            evaluation: Evaluation = from_json(cls, json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be an evaluation that was saved, got something else ({error!r})") from error
        return evaluation
