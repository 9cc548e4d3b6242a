"""A transform by the name that it has on the command line."""

import argparse

from calibrated_rewards.transforms import Exponential, Identity, Log, Transform

_NAMED: dict[str, Transform] = {"identity": Identity(), "log": Log()}


def transform(name: str) -> Transform:
    """The transform of a name.

    >>> transform("identity"), transform("exp:10"), transform("exp:-5")
    (Identity(), Exponential(t=10.0), Exponential(t=-5.0))
    """
    kind, _, number = name.partition(":")
    try:
        if kind == "exp" and number:
            return Exponential(float(number))
        return _NAMED[name]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"a transform is identity, log, or exp:T with a number T, got {name!r}"
        ) from None
