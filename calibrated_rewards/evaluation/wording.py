"""How figures and reports say things: transforms as formulas, procedures in words, estimates with their intervals."""

import re

from calibrated_rewards.evaluation.estimates import FEW, Stated
from calibrated_rewards.theory.optimum import Optimal
from calibrated_rewards.theory.transforms import Chain, Exponential, Identity, Log, Transform


def formula(transform: Transform) -> str:
    """A transform as one writes it, whatever its scale; else its repr.

    >>> [formula(Exponential(-10.0)), formula(Log()), formula(Chain(Exponential(2.5)))]
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
            return f"optimum for {spoken(procedure)}"
        case Chain(parts=(first, *_)):
            return formula(first)
    name = repr(transform)
    return name if len(name) <= 40 else f"{type(transform).__name__}(...)"


def formula_in(said: str) -> str:
    """A transform from its repr, as settings keep it; what is not known stays as it is.

    >>> formula_in("Chain(Optimal(procedure=BestOf(n=4), beta=0.1), Affine(scale=2.0, shift=1.0))")
    'optimum for best of 4'
    >>> formula_in("Exponential(t=-10.0)"), formula_in("my.own")
    ('-e^{-10u}', 'my.own')
    """
    if known := re.search(r"Optimal\(procedure=(\w+\(n=\d+\))", said):
        return f"optimum for {spoken(known[1])}"
    if known := re.match(r"(?:Chain\()?Exponential\(t=(-?[\d.]+)\)", said):
        return formula(Exponential(float(known[1])))
    simple = re.match(r"(?:Chain\()?(Identity|Log)\(\)", said)
    return said if simple is None else formula(Log() if simple[1] == "Log" else Identity())


def spoken(procedure: object) -> str:
    """A procedure in words, from itself or its repr.

    >>> spoken("BestOf(n=4)"), spoken("Standard()"), spoken("RewindAndRepeat(threshold=0.8, max_tries=3)")
    ('best of 4', 'one draw', 'RewindAndRepeat(threshold=0.8, max_tries=3)')
    """
    said = procedure if isinstance(procedure, str) else repr(procedure)
    known = re.fullmatch(r"(Best|Worst)Of\(n=(\d+)\)", said)
    return f"{known[1].lower()} of {known[2]}" if known else "one draw" if said == "Standard()" else said


def arm(name: str) -> str:
    """An arm of the frontier without training, by its name on the command line, as one writes it.

    >>> [arm(name) for name in ("exp:-10", "best-of:4", "raw", "mine")]
    ['-e^{-10u}', 'optimum for best of 4', 'raw score', 'mine']
    """
    kind, _, number = name.partition(":")
    if kind == "exp":
        return formula(Exponential(float(number)))
    if kind in ("best-of", "worst-of"):
        return f"optimum for {kind.removesuffix('-of')} of {number}"
    known = {"raw": "raw score", "log": "log u", "par": "PAR", "median": "median-centred"}
    return {**known, "log-sigmoid": "centred log-sigmoid"}.get(name, name)


def percents(rate: Stated) -> str:
    """A share with its interval.

    >>> percents(Stated(0.7123, 0.68, 0.741, 0.02, 50)), percents(Stated(0.5, None, None, None, 1))
    ('71.2 % [68.0, 74.1]', '50.0 %')
    """
    ends = "" if rate.low is None or rate.high is None else f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return f"{100 * rate.value:.1f} %{ends}"


def points(gain: Stated) -> str:
    """A difference between two shares, in percentage points.

    >>> points(Stated(-0.0123, -0.03, 0.005, 0.01, 50))
    '-1.2 points [-3.0, +0.5]'
    """
    ends = "" if gain.low is None or gain.high is None else f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    return f"{100 * gain.value:+.1f} points{ends}"


def tells(gain: Stated, about: float = 0.0) -> bool:
    """Whether the interval leaves out 0, or another value; one without ends, or without width, tells nothing.

    >>> ends = (0.1, 0.3), (0.0, 0.3), (None, None), (0.2, 0.2)
    >>> [tells(Stated(0.2, low, high, 0.1, 30)) for low, high in ends]
    [True, False, False, False]
    """
    if gain.low is None or gain.high is None or gain.low >= gain.high:
        return False
    return gain.low > about or gain.high < about


def caution(prompts: int) -> tuple[str, ...]:
    """What is to be known before any claim, where prompts are few.

    >>> caution(7), caution(100)
    (('7 prompts are few: below 20 even the intervals are rough, and what follows may be chance.',), ())
    """
    if prompts == 1:
        return ("1 prompt says nothing of others: there are no intervals, and nothing is claimed.",)
    rough = f"{prompts} prompts are few: below {FEW} even the intervals are rough, and what follows may be chance."
    return (rough,) if prompts < FEW else ()


def counted(number: int, what: str) -> str:
    """So many of something.

    >>> counted(1, "prompt"), counted(1234, "prompt")
    ('1 prompt', '1,234 prompts')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def measured(value: Stated) -> str:
    """Any quantity with its interval, short however large or small it is.

    >>> [measured(Stated(value, None, None, None, 1)) for value in (0.5, -1e38, 1.25e-7, 0.0)]
    ['0.500', '-1e+38', '1.25e-07', '0.000']
    >>> measured(Stated(0.5, 0.25, 0.75, 0.1, 9))
    '0.500 [0.250, 0.750]'
    """
    known = [value.value] if value.low is None or value.high is None else [value.value, value.low, value.high]
    first, *ends = [short(each, max(map(abs, known))) for each in known]
    return f"{first} [{', '.join(ends)}]" if ends else first


def short(value: float, beside: float | None = None) -> str:
    """A number to three digits, in the notation that fits the largest of those it stands beside.

    >>> short(12.3456), short(1e30), short(0.0, beside=1e30)
    ('12.346', '1e+30', '0')
    """
    largest = abs(value) if beside is None else beside
    return f"{value:.3f}" if largest == 0 or 0.01 <= largest < 1e5 else f"{value:.3g}"
