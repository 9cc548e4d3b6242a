"""Names of transforms and procedures: as the command line has them, and as their repr is kept in saved files.

The command line names the transforms that are compared as rewards: those of `NAMED`, and the optimum for best-of-N,
for best-of-1-to-N where N is not known, or for worst-of-N. Power, NormalQuantile, Tabulated, Affine and Chain have no
name there: a program passes the objects. A new transform that shall have one is a row of `NAMED`; every new class is a
name in `WITH_REPR`.

>>> parse_transform("exp:10").transform, parse_procedure("best-of:4"), format_name(WorstOf(8))
(Exponential(t=10.0), BestOf(n=4), 'worst-of:8')
>>> parse_procedure("best-of:1-16"), format_name(BestOfUpTo(16))
(BestOfUpTo(n=16, weights=None), 'best-of:1-16')
>>> parse_repr("Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))")
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))
"""

import argparse
import ast
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, TypeAlias

from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.optimum import Optimal, optimal_transform
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
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
)

ByRank: TypeAlias = BestOf | BestOfUpTo | WorstOf | Standard
"""The procedures with a name on the command line: they look at ranks alone."""
# A class with a parameter takes a number after its name: exp:10.
NAMED: dict[str, Any] = {
    "identity": Identity,
    "log": Log,
    "exp": Exponential,
}
BEST_OR_WORST: dict[str, type[BestOf] | type[WorstOf]] = {"best-of": BestOf, "worst-of": WorstOf}
# For the help of commands: all names without a KL, and the same with what a KL adds.
TRANSFORM_NAMES = "identity, log or exp:T"
TRANSFORM_HELP = (
    f"{TRANSFORM_NAMES}; for a KL in nats identity:KL, log:KL or exp:T:KL; best-of:N:KL, worst-of:N:KL or, where N "
    "is not known, best-of:1-N:KL, the exact optimum"
)
# All classes of the library that a repr can be read back to: not Calibrated, whose function no repr holds.
WITH_REPR: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(Identity, Log, Exponential, NormalQuantile, Power, Affine, Tabulated, Chain, Optimal),
        *(Standard, BestOf, BestOfUpTo, WorstOf, SoftBestOf, RewindAndRepeat),
    )
}


@dataclass(frozen=True)
class NamedTransform:
    """A transform of the command line; `kl` and `procedure` are set if its name has them.

    A name holds no beta: the one that gives `kl` differs between tables, and `evaluation.expectations.expect` solves
    for it.
    """

    name: str
    transform: Transform
    kl: float | None = None
    procedure: ByRank = Standard()  # noqa: RUF009 (frozen)


def parse_transform(name: str) -> NamedTransform:
    """Parse the name of a transform, such as exp:10; with a KL (exp:10:1.0) the transform is on the unit scale.

    best-of:N:KL, best-of:1-N:KL and worst-of:N:KL are the exact optimum for that procedure at that KL.

    >>> parse_transform("exp:10")
    NamedTransform(name='exp:10', transform=Exponential(t=10.0), kl=None, procedure=Standard())
    >>> parse_transform("best-of:4:1.0").transform
    Chain(Optimal(procedure=BestOf(n=4), beta=0.083...), Affine(scale=2.5..., shift=1.0))
    """
    kind, *numbers = name.split(":")
    try:
        if kind in BEST_OR_WORST:
            n, nats = numbers
            procedure, kl = _parse_best_or_worst(kind, n), float(nats)
        else:
            parameters = len(fields(NAMED[kind]))
            transform = NAMED[kind](*map(float, numbers[:parameters]))
            if len(numbers) == parameters:
                return NamedTransform(name, transform)
            (kl,) = map(float, numbers[parameters:])
            procedure = None
    except (KeyError, ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"a transform is {TRANSFORM_NAMES}, these for a KL in nats (exp:10:1.0, identity:1.0), best-of:N:KL, "
            f"best-of:1-N:KL or worst-of:N:KL, such as best-of:4:1.0, with numbers; got {name!r}"
        ) from None
    if not (isfinite(kl) and kl > 0):
        raise argparse.ArgumentTypeError(f"a KL is a number of nats > 0, such as 0.5, got {kl:g} in {name!r}")
    if procedure is None:
        return NamedTransform(name, scaled(transform, "unit"), kl)
    return NamedTransform(name, _solve_optimum(name, procedure, kl), kl, procedure)


def _solve_optimum(name: str, procedure: ByRank, kl: float) -> Transform:
    """Solve for the optimal transform on the unit scale; errors are in the words of the command line."""
    t = "-T" if isinstance(procedure, WorstOf) else "T"
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


def _parse_best_or_worst(kind: str, n: str) -> ByRank:
    """Parse the N of best-of:N or worst-of:N, or the 1-N of best-of:1-N; ValueError for other text."""
    if kind == "best-of" and n.startswith("1-"):
        return BestOfUpTo(int(n.removeprefix("1-")))
    return BEST_OR_WORST[kind](int(n))


def parse_procedure(name: str) -> ByRank:
    """Parse the name or the repr of a procedure that a rank decides, such as best-of:4; ValueError for another.

    The names are standard, best-of:N, worst-of:N, and best-of:1-N for `BestOfUpTo(N)`.

    >>> parse_procedure("worst-of:8"), parse_procedure("BestOf(n=4)"), parse_procedure("standard")
    (WorstOf(n=8), BestOf(n=4), Standard())
    """
    kind, _, n = name.partition(":")
    if name == "standard":
        return Standard()
    try:
        procedure = _parse_best_or_worst(kind, n) if kind in BEST_OR_WORST else parse_repr(name)
    except ValueError:
        procedure = None
    if not isinstance(procedure, ByRank):
        names = "standard, best-of:N, best-of:1-N or worst-of:N, such as best-of:4"
        raise ValueError(f"a procedure is {names}, got {name!r:.80}")
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
        case ast.Call(func=ast.Name(id=name)) if name in WITH_REPR:
            options = {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
            return WITH_REPR[name](*map(_evaluate, node.args), **options)
    return ast.literal_eval(node)


def format_name(thing: object) -> str:
    """Write a transform or a procedure as the command line has it; its repr where the command line has no name.

    A procedure's name is no transform's: `parse_procedure` reads best-of:4, `parse_transform` needs best-of:4:KL, and
    the optimum of that name is written as its repr.

    >>> format_name(BestOf(4)), format_name(Exponential(-5.0)), format_name(Identity()), format_name(Standard())
    ('best-of:4', 'exp:-5', 'identity', 'standard')
    """
    if isinstance(thing, Standard):
        return "standard"
    if isinstance(thing, BestOfUpTo) and thing.weights is None:
        return f"best-of:1-{thing.n}"
    for name, cls in {**NAMED, **BEST_OR_WORST}.items():
        if isinstance(thing, cls):
            return ":".join([name, *(f"{x:g}" if isinstance(x, float) else str(x) for x in vars(thing).values())])
    return repr(thing)
