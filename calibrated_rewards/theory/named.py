"""Names of transforms and procedures: as the command line has them, and as their repr is kept in saved files.

>>> parse_transform("exp:10").transform, parse_procedure("best-of:4"), format_name(WorstOf(8))
(Exponential(t=10.0), BestOf(n=4), 'worst-of:8')
>>> parse_repr("Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))")
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))
"""

import argparse
import ast
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

from calibrated_rewards.theory.optimum import Optimal, optimal_transform
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Tabulated,
    Transform,
    scaled,
)

ByRank: TypeAlias = BestOf | WorstOf | Standard
PLAIN: dict[str, Transform] = {"identity": Identity(), "log": Log()}
OF_N: dict[str, type[BestOf] | type[WorstOf]] = {"best-of": BestOf, "worst-of": WorstOf}
# The classes whose repr can be read back; a Calibrated is known by its function, which no repr holds.
KNOWN = (
    *(Identity, Log, Exponential, NormalQuantile, Power, Affine, Tabulated, Chain, Optimal),
    *(Standard, BestOf, WorstOf, SoftBestOf, RewindAndRepeat),
)
CLASSES: dict[str, Any] = {each.__name__: each for each in KNOWN}


@dataclass(frozen=True)
class NamedTransform:
    """A transform of the command line; where its name says a KL, that, and the procedure that it is for.

    The beta for the KL is another one on each table: `evaluation.expectations.expect` solves for it.
    """

    name: str
    transform: Transform
    kl: float | None = None
    procedure: ByRank = Standard()  # noqa: RUF009 (frozen)


def parse_transform(name: str) -> NamedTransform:
    """Parse the name of a transform, such as exp:10; with a KL (exp:10:1.0) the transform is on the unit scale.

    best-of:N:KL and worst-of:N:KL are the exact optimum for that procedure at that KL.

    >>> parse_transform("exp:10")
    NamedTransform(name='exp:10', transform=Exponential(t=10.0), kl=None, procedure=Standard())
    >>> parse_transform("best-of:4:1.0").transform
    Chain(Optimal(procedure=BestOf(n=4), beta=0.083...), Affine(scale=2.5..., shift=1.0))
    """
    kind, *numbers = name.split(":")
    procedure: ByRank = Standard()
    try:
        if kind in OF_N:
            n, nats = numbers
            procedure, rest = OF_N[kind](int(n)), [float(nats)]
        else:
            taken = 1 if kind == "exp" else 0
            plain = Exponential(float(numbers[0])) if taken else PLAIN[kind]
            rest = [float(number) for number in numbers[taken:]]
            if not rest:
                return NamedTransform(name, plain)
        (kl,) = rest
    except (KeyError, ValueError, IndexError):
        raise argparse.ArgumentTypeError(
            "a transform is identity, log or exp:T, these for a KL in nats (exp:10:1.0, identity:1.0), best-of:N:KL or "
            f"worst-of:N:KL, such as best-of:4:1.0, with numbers; got {name!r}"
        ) from None
    if not (isfinite(kl) and kl > 0):
        raise argparse.ArgumentTypeError(f"a KL is a number of nats > 0, such as 0.5, got {kl:g} in {name!r}")
    if isinstance(procedure, Standard):
        return NamedTransform(name, scaled(plain, "unit"), kl)
    return NamedTransform(name, _solve_optimum(name, procedure, kl), kl, procedure)


def _solve_optimum(name: str, procedure: BestOf | WorstOf, kl: float) -> Transform:
    """Solve for the optimal transform on the unit scale; errors are in the words of the command line."""
    t = "T" if isinstance(procedure, BestOf) else "-T"
    try:
        return scaled(optimal_transform(procedure, kl=kl), "unit")
    except ValueError as error:
        # The command line has no tune(): name what to type.
        message = str(error).replace("as tune() finds", f"exp:{t}:{kl:g} such as exp:{t.replace('T', '10')}:{kl:g}")
        raise argparse.ArgumentTypeError(f"{name}: {message}") from None
    except ArithmeticError:
        raise argparse.ArgumentTypeError(
            f"{name}: the optimal transform for {procedure!r} at a KL of {kl:g} could not be solved for. Ask for "
            f"another KL, or use exp:{t}:{kl:g}, which needs no solving"
        ) from None


def parse_procedure(name: str) -> ByRank:
    """Parse the name or the repr of a procedure that a rank decides: standard, best-of:N, worst-of:N; or ValueError.

    >>> parse_procedure("worst-of:8"), parse_procedure("BestOf(n=4)"), parse_procedure("standard")
    (WorstOf(n=8), BestOf(n=4), Standard())
    """
    kind, _, n = name.partition(":")
    if name == "standard":
        return Standard()
    try:
        procedure = OF_N[kind](int(n)) if kind in OF_N else parse_repr(name)
    except ValueError:
        procedure = None
    if not isinstance(procedure, ByRank):
        raise ValueError(f"a procedure is standard, best-of:N or worst-of:N, such as best-of:4, got {name!r:.80}")
    return procedure


def parse_repr(text: str) -> Any:
    """Make the transform or the procedure whose repr this is; ValueError for any other text, no part of which is run.

    >>> parse_repr("print('no')")
    Traceback (most recent call last):
        ...
    ValueError: a transform or procedure of the library is written as its constructor call, got "print('no')"
    """
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"a transform or procedure of the library is written as its constructor call, got {text!r:.80}"
        ) from None


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in CLASSES:
            options = {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
            return CLASSES[name](*map(_evaluate, node.args), **options)
    return ast.literal_eval(node)


def format_name(thing: object) -> str:
    """Write a transform or a procedure as the command line has it; its repr where the command line has no name.

    >>> format_name(BestOf(4)), format_name(Exponential(-5.0)), format_name(Identity()), format_name(Standard())
    ('best-of:4', 'exp:-5', 'identity', 'standard')
    """
    match thing:
        case BestOf(n=n):
            return f"best-of:{n}"
        case WorstOf(n=n):
            return f"worst-of:{n}"
        case Exponential(t=t):
            return f"exp:{t:g}"
        case Standard():
            return "standard"
    return next((name for name, transform in PLAIN.items() if transform == thing), repr(thing))
