"""Words and numbers of results, written once for printed tables, figures and the report's page."""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from contextlib import suppress

from calibrated_rewards.evaluation.estimates import FEW_PROMPTS, IntervalEstimate
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import ByRank, parse_procedure, parse_repr, parse_transform
from calibrated_rewards.theory.optimum import Optimal
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.transforms import Chain, Exponential, Identity, Log, Transform

OBJECTIVE_WORDS = {
    "raw": "raw score",
    "log": "log u",
    "par": "PAR",
    "median": "median-centred",
    "log-sigmoid": "centred log-sigmoid",
}


def format_transform(transform: Transform) -> str:
    """Write a transform as a formula, whatever its scale; one without a formula as its repr, shortened.

    >>> [format_transform(each) for each in (Exponential(-10.0), Log(), Chain(Exponential(2.5)))]
    ['-e^{-10u}', 'log u', 'e^{2.5u}']
    """
    match transform:
        case Identity():
            return "identity"
        case Log():
            return "log u"
        case Exponential(t=t):
            return f"{'-' * (t < 0)}e^{{{t:g}u}}"
        case Optimal(procedure=procedure):
            return f"optimum for {format_procedure(procedure)}"
        case Chain(parts=(first, *_)):
            return format_transform(first)
    name = repr(transform)
    return name if len(name) <= 40 else f"{type(transform).__name__}(...)"


def format_transform_repr(text: str) -> str:
    """Write a transform as a formula from its repr, as settings hold it; other text stays as it is.

    >>> format_transform_repr("Chain(Optimal(procedure=BestOf(n=4), beta=0.1), Affine(scale=2.0, shift=1.0))")
    'optimum for best of 4'
    >>> format_transform_repr("Exponential(t=-10.0)"), format_transform_repr("my.own")
    ('-e^{-10u}', 'my.own')
    """
    try:
        transform = parse_repr(text)
    except ValueError:
        return text
    return format_transform(transform) if isinstance(transform, Transform) else text


def format_procedure(procedure: object) -> str:
    """Write a procedure in words, from itself or its repr.

    >>> format_procedure("BestOf(n=4)"), format_procedure("Standard()"), format_procedure("MyOwn(4)")
    ('best of 4', 'one draw', 'MyOwn(4)')
    >>> format_procedure(SoftBestOf(4, 0.1)), format_procedure(RewindAndRepeat(0.85, 32))
    ('one of 4, softly the best (temperature 0.1)', 'rewind and repeat up to quantile 0.85, at most 32 draws')
    >>> format_procedure("best-of:1-16"), format_procedure("BestOfUpTo(n=2, weights=(1.0, 3.0))")
    ('best of 1 to 16', 'best of 1 to 2 with weights (1, 3)')
    """
    if isinstance(procedure, str):
        try:
            procedure = parse_procedure(procedure)
        except ValueError:
            return str(procedure)
    match procedure:
        case Standard():
            return "one draw"
        case BestOf(n=n):
            return f"best of {n}"
        case BestOfUpTo(n=n, weights=None):
            return f"best of 1 to {n}"
        case BestOfUpTo(n=n, weights=weights) if weights is not None:
            return f"best of 1 to {n} with weights ({', '.join(f'{weight:g}' for weight in weights)})"
        case WorstOf(n=n):
            return f"worst of {n}"
        case SoftBestOf(n=n, temperature=temperature):
            return f"one of {n}, softly the best (temperature {temperature:g})"
        case RewindAndRepeat(threshold=threshold, max_tries=tries):
            return f"rewind and repeat up to quantile {threshold:g}, at most {tries} draws"
    return repr(procedure)


def format_objective(name: str) -> str:
    """Write an objective of the frontier as a formula or in words, from its name on the command line.

    >>> [format_objective(name) for name in ("exp:-10", "best-of:4", "raw", "mine")]
    ['-e^{-10u}', 'optimum for best of 4', 'raw score', 'mine']
    """
    try:
        if name.startswith("exp:"):
            return format_transform(parse_transform(name).transform)
        return OBJECTIVE_WORDS.get(name) or f"optimum for {format_procedure(parse_procedure(name))}"
    except (ValueError, ArgumentTypeError):
        return name


def format_share(rate: IntervalEstimate) -> str:
    """Write a share as a percentage with its interval.

    >>> format_share(IntervalEstimate(0.7123, 0.68, 0.741, 0.02, 50))
    '71.2 % [68.0, 74.1]'
    >>> format_share(IntervalEstimate(0.5, None, None, None, 1))
    '50.0 %'
    """
    ends = (
        "" if rate.low is None or rate.high is None or rate.exact else f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    )
    return f"{100 * rate.value:.1f} %{ends}"


def format_points(gain: IntervalEstimate) -> str:
    """Write a difference between two shares in percentage points.

    >>> format_points(IntervalEstimate(-0.0123, -0.03, 0.005, 0.01, 50))
    '-1.2 points [-3.0, +0.5]'
    """
    ends = (
        ""
        if gain.low is None or gain.high is None or gain.exact
        else f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    )
    return f"{100 * gain.value:+.1f} points{ends}"


def format_estimate(estimate: IntervalEstimate) -> str:
    """Write any quantity with its interval, short however large or small it is.

    >>> [format_estimate(IntervalEstimate(value, None, None, None, 1)) for value in (0.5, -1e38, 1.25e-7, 0.0)]
    ['0.500', '-1e+38', '1.25e-07', '0.000']
    >>> format_estimate(IntervalEstimate(0.5, 0.25, 0.75, 0.1, 9))
    '0.500 [0.250, 0.750]'
    """
    numbers = [each for each in (estimate.value, estimate.low, estimate.high) if each is not None]
    first, *ends = [format_number(each, max(map(abs, numbers))) for each in numbers]
    return f"{first} [{', '.join(ends)}]" if ends else first


def format_number(value: float, beside: float | None = None) -> str:
    """Write a number to three digits, in the notation that fits the largest of those it stands beside.

    >>> format_number(12.3456), format_number(1e30), format_number(0.0, beside=1e30)
    ('12.346', '1e+30', '0')
    """
    largest = abs(value) if beside is None else beside
    return f"{value:.3f}" if largest == 0 or 0.01 <= largest < 1e5 else f"{value:.3g}"


def format_count(number: int, noun: str) -> str:
    """Write a number and its noun, in the plural unless it is 1.

    >>> format_count(1, "prompt"), format_count(1234, "prompt")
    ('1 prompt', '1,234 prompts')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def few_prompts_notes(prompts: int) -> tuple[str, ...]:
    """Warn, before any claim, that few prompts show little; empty where there are enough.

    >>> few_prompts_notes(7), few_prompts_notes(100)
    (('7 prompts are few: below 20 even the intervals are rough, and what follows may be chance.',), ())
    """
    if prompts == 1:
        return ("1 prompt says nothing of others: there are no intervals, and nothing is claimed.",)
    rough = (
        f"{prompts} prompts are few: below {FEW_PROMPTS} even the intervals are rough, and what follows may be chance."
    )
    return (rough,) if prompts < FEW_PROMPTS else ()


def plain_prompts_note(plain: int, prompts: int) -> str:
    """Say what to do about prompts that are plain text though the model has a chat template.

    >>> plain_prompts_note(3, 30)
    '3 of 30 prompts are plain text, ... give each prompt as messages: [{"role": "user", "content": "..."}]'
    """
    return (
        f"{plain} of {format_count(prompts, 'prompt')} are plain text, and the model has a chat template, which is not "
        "used for text. If the policy was trained on chats, give each prompt as messages: "
        '[{"role": "user", "content": "..."}]'
    )


def format_table(names: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[str]:
    """Align named rows under the heads of their columns; None is a dash.

    >>> for line in format_table(["a", "long"], {"one": [1, None], "two": ["x", "y"]}):
    ...     print(line)
          one  two
    a     1    x
    long  -    y
    """
    table = [
        ["", *names],
        *([head, *("-" if each is None else str(each) for each in cells)] for head, cells in columns.items()),
    ]
    widths = [max(map(len, column)) for column in table]
    rows = zip(*table, strict=True)
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def choose_procedure(names: Sequence[str]) -> str:
    """Choose the procedure that a summary is about: the first best-of-N with N > 1, else the first such worst-of-N.

    >>> choose_procedure(["Standard()", "BestOf(n=1)", "WorstOf(n=2)", "BestOf(n=8)", "BestOf(n=4)"])
    'BestOf(n=8)'
    >>> choose_procedure(["Standard()", "WorstOf(n=2)"]), choose_procedure(["Standard()", "BestOf(n=1)"])
    ('WorstOf(n=2)', 'Standard()')
    """
    several: dict[str, ByRank] = {}
    for name in names:
        with suppress(ValueError):  # a procedure of the user's own
            procedure = parse_procedure(name)
            if procedure.draws > 1:
                several[name] = procedure
    best = (name for name, procedure in several.items() if not isinstance(procedure, WorstOf))
    return next(best, next(iter(several), names[0]))


def choose_judge(names: Sequence[str], selected_by: str) -> str:
    """Choose the judge that a summary goes by: a scorer that did not select, if there is one."""
    return next((name for name in names if name != selected_by), selected_by)
