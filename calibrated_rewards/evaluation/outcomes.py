"""What an evaluation found, as a person reads it and as a file keeps it: estimates, each with its interval.

>>> half = Stated(0.5, 0.4, 0.6, 0.05, 100)
>>> print(Difference("a", "b", "judge", "Standard()", half), Difference("a", "b", "judge", "Standard()", half).tells)
a less b, Standard() judged by judge: 0.500 [0.400, 0.600] True
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrated_rewards.evaluation.estimates import FEW, Stated
from calibrated_rewards.files import write_file

UNKNOWN = "-"
WIDTH = 1e-9
# The share of empty completions from which it is said.
MANY_EMPTY = 0.01


@dataclass(frozen=True)
class Precision:
    """How finely a measure of KL reads its two models."""

    read_in: str
    """The dtype that they compute in, such as float32."""
    rounding: str | None = None
    """The dtype in which the two have the same weights, one of them rounded to it; None where they are two models."""


@dataclass(frozen=True)
class Outcome:
    """What is measured of one policy, or of the reference."""

    name: str
    kl: Stated | None
    """KL(policy || reference) of a completion, in nats; None of the reference, and where no log-probabilities are."""
    tokens: Stated | None
    """Of a completion; None where the sampler does not say."""
    scores: Mapping[str, Stated]
    """The mean score by each scorer."""
    win_rates: Mapping[str, Mapping[str, Stated]]
    """By scorer that judges, then by procedure, as its repr: how often the policy beats the reference."""
    not_as_drawn: int = 0
    """Completions whose text makes other tokens than were drawn: their KL is along the tokens of the text."""
    kl_precision: Precision | None = None
    """How finely the models were read for the KL; None where no KL was measured, or the measure does not say."""
    empty: int = 0
    """Completions without a text."""


@dataclass(frozen=True)
class Difference:
    """A win rate of one policy less that of another, on the same prompts: paired, so what prompts share cancels."""

    a: str
    b: str
    judged_by: str
    procedure: str
    value: Stated

    @property
    def tells(self) -> bool:
        """Whether the interval says which of the two is larger; one without width says nothing of prompts not seen."""
        low, high = self.value.low, self.value.high
        # Of equal values a resampled mean is off by rounding.
        return low is not None and high is not None and high - low > WIDTH and (low > 0 or high < 0)

    def __str__(self) -> str:
        return f"{self.a} less {self.b}, {self.procedure} judged by {self.judged_by}: {self.value}"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    reference: Outcome
    policies: tuple[Outcome, ...]
    differences: tuple[Difference, ...]
    selected_by: str
    """The scorer that best-of-N and worst-of-N select by; each scorer judges what was selected."""
    prompts: int
    completions: int
    """Of each prompt, m."""
    plain_prompts: int = 0
    """Prompts that are text, of models with a chat template: they are continued as text, without the template."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as JSON."""
        write_file(path, json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """What `save` wrote."""
        try:
            says = json.loads(Path(path).read_text())
            said = {**says, "reference": _outcome(says["reference"])}
            said["policies"] = tuple(map(_outcome, says["policies"]))
            said["differences"] = tuple(
                Difference(**{**d, "value": Stated.read(d["value"])}) for d in says["differences"]
            )
            return cls(**said)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be an evaluation that was saved, got something else ({error!r})") from error


def _lines(found: Evaluation) -> Iterator[str]:
    """Tables with a row for each policy, then the differences, those that the data tell apart first."""
    drawn = f"{_counted(found.prompts, 'prompt')}, {_counted(found.completions, 'completion')} of each"
    brackets = "; in brackets 95% intervals, by prompt" * (found.prompts > 1)
    yield f"{drawn}; best and worst of N selected by {found.selected_by}{brackets}"
    if found.prompts == 1:
        yield "1 prompt says nothing of others: there are no intervals, and nothing is told apart"
    elif found.prompts < FEW:
        yield f"fewer than {FEW} prompts: intervals are rough, and {found.prompts} prompts show little"
    yield from completion_notes(found)
    everyone = (found.reference, *found.policies)
    columns = {"KL, nats": [each.kl for each in everyone], "tokens": [each.tokens for each in everyone]}
    columns |= {f"mean {scorer}": [each.scores[scorer] for each in everyone] for scorer in found.reference.scores}
    yield from ("", *_table("", [each.name for each in everyone], columns))
    for judge, rates in found.policies[0].win_rates.items():
        columns = {how: [each.win_rates[judge][how] for each in found.policies] for how in rates}
        yield from ("", f"wins over the reference, judged by {judge}")
        yield from _table("", [each.name for each in found.policies], columns)
    if found.differences:
        yield from ("", *_compared(found.differences))
    for each in found.policies:
        if each.not_as_drawn:
            share = f"{each.not_as_drawn} of {_counted(found.prompts * found.completions, 'completion')}"
            makes = "makes" if each.not_as_drawn == 1 else "make"
            yield f"{each.name}: {share} {makes} other tokens than were drawn, and the KL is along those"
        yield from (f"{each.name}: {note}" for note in precision_notes(each.kl_precision))


def precision_notes(precision: Precision | None) -> Iterator[str]:
    """What to know of a KL that was not read in float32, or is of one model saved in two dtypes."""
    if precision is None:
        return
    if precision.read_in != "float32":
        yield f"the KL is read in {precision.read_in}, not float32: rounding alone can make it some hundredths of a nat"

    if precision.rounding is not None:
        yield (
            f"its weights are those of the reference, one of the two rounded to {precision.rounding}: the KL is that "
            "of rounding, and its interval begins at 0"
        )


def completion_notes(found: Evaluation) -> Iterator[str]:
    """What is wrong with many completions, and with prompts that a chat model reads as plain text."""
    drawn = found.prompts * found.completions
    many = [each for each in (found.reference, *found.policies) if each.empty > MANY_EMPTY * drawn]
    if many:
        yield f"completions are empty: {', '.join(f'{each.empty / drawn:.1%} of {each.name}' for each in many)}"
    if found.plain_prompts:
        yield plain_prompts_note(found.plain_prompts, found.prompts)
    elif many:
        yield "a policy that ends at once was not trained on such prompts, or reads them otherwise than in training"


def plain_prompts_note(plain: int, prompts: int) -> str:
    """What to do about prompts that a chat model does not read as chats.

    >>> plain_prompts_note(3, 30)
    '3 of 30 prompts are plain text, ... give each prompt as messages: [{"role": "user", "content": "..."}]'
    """
    return (
        f"{plain} of {_counted(prompts, 'prompt')} are plain text, and the model has a chat template, which is not "
        "used for text. If the policy was trained on chats, give each prompt as messages: "
        '[{"role": "user", "content": "..."}]'
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _compared(differences: Sequence[Difference]) -> Iterator[str]:
    """In words, and no more than the intervals say."""
    telling = [each for each in differences if each.tells]
    has = "has" if len(telling) == 1 else "have"
    of = _counted(len(differences), "difference")
    yield f"of {of} of win rates, {len(telling)} {has} an interval without 0"
    for each in telling:
        first = each.value.value > 0
        more, less = (each.a, each.b) if first else (each.b, each.a)
        yield f"  {more} wins more than {less}: {each}"
    if len(telling) < len(differences):
        who = "the others: " if telling else ""
        yield f"  {who}these prompts do not tell which of the two wins more"
        yield from (f"    {each}" for each in differences if not each.tells)
    if telling and len(differences) > 1:
        yield "  each interval is for itself: between equals, one of twenty leaves 0 out"


def _table(corner: str, names: Sequence[str], columns: Mapping[str, Sequence[Stated | None]]) -> Iterator[str]:
    cells = [[UNKNOWN if each is None else str(each) for each in column] for column in columns.values()]
    heads = [corner, *columns]
    widths = [max(map(len, [head, *column])) for head, column in zip(heads, [[*names], *cells], strict=True)]
    for row in zip(*([head, *column] for head, column in zip(heads, [[*names], *cells], strict=True)), strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _stated(says: Mapping[str, Any] | None) -> Stated | None:
    return None if says is None else Stated.read(says)


def _outcome(says: Mapping[str, Any]) -> Outcome:
    def each(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name: Stated.read(value) for name, value in of.items()}

    read: dict[str, Any] = {name: _stated(says[name]) for name in ("kl", "tokens")}
    rates = {judge: each(of) for judge, of in says["win_rates"].items()}
    precision = says.get("kl_precision")
    read["kl_precision"] = None if precision is None else Precision(**precision)
    return Outcome(**{**says, **read, "scores": each(says["scores"]), "win_rates": rates})
