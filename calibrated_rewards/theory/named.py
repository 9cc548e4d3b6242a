"""A transform by the name that it has on the command line."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from calibrated_rewards.theory.optimum import optimal_transform
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform, scaled

_PLAIN: dict[str, Transform] = {"identity": Identity(), "log": Log()}
_PROCEDURES: dict[str, Callable[[int], BestOf | WorstOf]] = {"best-of": BestOf, "worst-of": WorstOf}


@dataclass(frozen=True)
class NamedTransform:
    """A transform of the command line; where its name says a KL, that, and the procedure that it is for.

    The beta for the KL is another one on each table: `table_expectations.expect` solves for it.
    """

    name: str
    transform: Transform
    kl: float | None = None
    procedure: BestOf | WorstOf | Standard = Standard()  # noqa: RUF009 (frozen)


def transform(name: str) -> Transform:
    """The transform of a name; best-of:N:KL is the exact optimum for the best of N at that KL.

    >>> transform("identity"), transform("exp:10"), transform("exp:-5")
    (Identity(), Exponential(t=10.0), Exponential(t=-5.0))
    >>> transform("best-of:4:1.0")
    Chain(Optimal(procedure=BestOf(n=4), beta=0.083...), Affine(scale=2.5..., shift=1.0))
    """
    return parse_transform(name).transform


def parse_transform(name: str) -> NamedTransform:
    """A name with all that it says; with a KL the transform is on the unit scale.

    >>> parse_transform("exp:10")
    NamedTransform(name='exp:10', transform=Exponential(t=10.0), kl=None, procedure=Standard())
    >>> parse_transform("best-of:4:1.0").procedure
    BestOf(n=4)
    """
    kind, *numbers = name.split(":")
    try:
        if kind in _PROCEDURES:
            n, kl = numbers
            procedure, nats = _PROCEDURES[kind](int(n)), float(kl)
        else:
            taken = 1 if kind == "exp" else 0
            plain = Exponential(float(numbers[0])) if taken else _PLAIN[kind]
            left = [float(number) for number in numbers[taken:]]
            if not left:
                return NamedTransform(name, plain)
            (nats,) = left
    except (KeyError, ValueError, IndexError):
        raise argparse.ArgumentTypeError(
            "a transform is identity, log or exp:T, these for a KL in nats (exp:10:1.0, identity:1.0), best-of:N:KL or "
            f"worst-of:N:KL, such as best-of:4:1.0, with numbers; got {name!r}"
        ) from None
    if not (isfinite(nats) and nats > 0):
        raise argparse.ArgumentTypeError(f"a KL is a number of nats > 0, such as 0.5, got {nats:g} in {name!r}")
    if kind in _PROCEDURES:
        return NamedTransform(name, _optimum(name, procedure, nats), nats, procedure)
    return NamedTransform(name, scaled(plain, "unit"), nats)


def _optimum(name: str, procedure: BestOf | WorstOf, kl: float) -> Transform:
    """The optimal transform on the unit scale; an error in the words of the command line if there is none."""
    try:
        return scaled(optimal_transform(procedure, kl=kl), "unit")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    except ArithmeticError:
        t = "T" if isinstance(procedure, BestOf) else "-T"
        raise argparse.ArgumentTypeError(
            f"{name}: the optimal transform for {procedure!r} at a KL of {kl:g} could not be solved for. Ask for "
            f"another KL, or use exp:{t}:{kl:g}, which needs no solving"
        ) from None
