"""A transform by the name that it has on the command line."""

import argparse
from collections.abc import Callable

from calibrated_rewards.choice import Choice, optimum
from calibrated_rewards.procedures import BestOf, WorstOf
from calibrated_rewards.transforms import Exponential, Identity, Log, Transform

_NAMED: dict[str, Transform] = {"identity": Identity(), "log": Log()}
_PROCEDURES: dict[str, Callable[[int], BestOf | WorstOf]] = {"best-of": BestOf, "worst-of": WorstOf}


def transform(name: str) -> Transform:
    """The transform of a name; best-of:N:KL is the exact optimum for the best of N at that KL.

    >>> transform("identity"), transform("exp:10"), transform("exp:-5")
    (Identity(), Exponential(t=10.0), Exponential(t=-5.0))
    >>> transform("best-of:4:1.0")
    Chain(Optimal(procedure=BestOf(n=4), beta=0.083...), Affine(scale=2.5..., shift=1.0))
    """
    kind, *numbers = name.split(":")
    try:
        if kind in _PROCEDURES:
            return chosen(name).transform
        if kind == "exp":
            (t,) = numbers
            return Exponential(float(t))
        return _NAMED[name]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            "a transform is identity, log, exp:T, best-of:N:KL or worst-of:N:KL, with numbers, KL in nats, such as "
            f"best-of:4:1.0; got {name!r}"
        ) from None


def chosen(name: str) -> Choice:
    """Of best-of:N:KL and worst-of:N:KL: the transform with the beta that it is to be trained with."""
    kind, n, kl = name.split(":")
    return optimum(_PROCEDURES[kind](int(n)), kl=float(kl))
