"""Names of transforms and procedures on the command line, and their reprs in the results of a run.

The command line names the transforms of `NAMED`, and the optimum for best-of-N, for best-of-1-to-N where N is not
known, or for worst-of-N. Power, NormalQuantile, Tabulated, Affine and Chain have no name there: a program passes the
objects. A run's settings.json and results hold reprs, which `WITH_REPR` reads back; reward.json holds classes and
fields, which `CLASSES` of reward/saving.py reads.

>>> parse_transform("exp:10").transform, parse_procedure("best-of:4"), format_name(WorstOf(8))
(Exponential(t=10.0), BestOf(n=4), 'worst-of:8')
>>> parse_procedure("best-of:1-16"), format_name(BestOfUpTo(16))
(BestOfUpTo(n=16, weights=None), 'best-of:1-16')
>>> parse_repr("Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))")
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))
"""

import argparse
import ast
from contextlib import suppress
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


def _join_names(end: str) -> str:
    """Join the names of `NAMED`, each with a letter for its parameter and an end."""
    *names, last = [":".join([name, *(field.name.upper() for field in fields(cls))]) for name, cls in NAMED.items()]
    return f"{', '.join(name + end for name in names)} or {last}{end}"


# For the help of commands: all names without a KL, and the same with what a KL adds.
TRANSFORM_NAMES = _join_names("")
OPTIMUM_NAMES = "best-of:N:KL, worst-of:N:KL or, where N is not known, best-of:1-N:KL"
TRANSFORM_HELP = f"{TRANSFORM_NAMES}; for a KL in nats {_join_names(':KL')}; {OPTIMUM_NAMES}, the exact optimum"
# All classes of the library whose repr can be read back. The repr of Calibrated does not hold its function.
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
    try:
        thing, kl = make_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    is_procedure = isinstance(thing, BestOf | BestOfUpTo | WorstOf)
    if thing is None or (is_procedure and kl is None):
        raise argparse.ArgumentTypeError(
            f"a transform is {TRANSFORM_NAMES}, these for a KL in nats (exp:10:1.0, identity:1.0), best-of:N:KL, "
            f"best-of:1-N:KL or worst-of:N:KL, such as best-of:4:1.0, with numbers; got {name!r}"
        )
    if kl is None:
        return NamedTransform(name, thing)
    if not (isfinite(kl) and kl > 0):
        raise argparse.ArgumentTypeError(f"a KL is a number of nats > 0, such as 0.5, got {kl:g} in {name!r}")
    if not is_procedure:
        return NamedTransform(name, scaled(thing, "unit"), kl)
    return NamedTransform(name, _solve_optimum(name, thing, kl), kl, thing)


def make_named(name: str) -> tuple[Any, float | None]:
    """Make the transform or the procedure of a name, and read the KL after it if there is one.

    (None, None) for what has not the form of a name; ValueError for a parameter that the class refuses.

    >>> make_named("exp:10"), make_named("best-of:4:0.5"), make_named("exp")
    ((Exponential(t=10.0), None), (BestOf(n=4), 0.5), (None, None))
    """
    if not name.isascii():  # float and int read digits of all scripts
        return None, None
    kind, *numbers = name.split(":")
    cls: Any = NAMED.get(kind) or BEST_OR_WORST.get(kind)
    count = 1 if kind in BEST_OR_WORST else len(fields(cls)) if cls else 0
    if cls is None or len(numbers) not in (count, count + 1):
        return None, None
    if kind == "best-of" and numbers[0].startswith("1-"):
        cls, numbers[0] = BestOfUpTo, numbers[0].removeprefix("1-")
    try:
        parameters = [int(each) if kind in BEST_OR_WORST else float(each) for each in numbers[:count]]
        kl = float(numbers[count]) if len(numbers) > count else None
    except ValueError:
        return None, None
    return cls(*parameters), kl


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


def parse_procedure(name: str) -> ByRank:
    """Parse the name or the repr of a procedure that a rank decides, such as best-of:4; ValueError for another.

    The names are standard, best-of:N, worst-of:N, and best-of:1-N for `BestOfUpTo(N)`.

    >>> parse_procedure("worst-of:8"), parse_procedure("BestOf(n=4)"), parse_procedure("standard")
    (WorstOf(n=8), BestOf(n=4), Standard())
    """
    if name == "standard":
        return Standard()
    procedure = None
    with suppress(ValueError):
        procedure, kl = make_named(name) if name.startswith(tuple(BEST_OR_WORST)) else (parse_repr(name), None)
        procedure = procedure if kl is None else None
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
    """Write a transform or a procedure by its name on the command line, or as its repr where it has none.

    `parse_procedure` reads best-of:4. `parse_transform` needs best-of:4:KL, whose optimum is written as its repr.

    >>> format_name(BestOf(4)), format_name(Exponential(-5.0)), format_name(Identity()), format_name(Standard())
    ('best-of:4', 'exp:-5', 'identity', 'standard')
    """
    if isinstance(thing, Standard):
        return "standard"
    if isinstance(thing, BestOfUpTo) and thing.weights is None:
        return f"best-of:1-{thing.n}"
    for name, cls in {**NAMED, **BEST_OR_WORST}.items():
        if isinstance(thing, cls):
            return ":".join([name, *(str(each).removesuffix(".0") for each in vars(thing).values())])
    return repr(thing)
