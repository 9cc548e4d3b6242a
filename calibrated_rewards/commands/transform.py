"""A transform by the name that it has on the command line."""

import argparse
from collections.abc import Callable

from calibrated_rewards.choice import Choice, optimum
from calibrated_rewards.procedures import BestOf, WorstOf
from calibrated_rewards.scaling import scaled
from calibrated_rewards.theory import beta_for_kl, win_rate
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
        choice = chosen(name)
        return _plain(kind, numbers)[0] if choice is None else choice.transform
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            "a transform is identity, log or exp:T, these for a KL in nats (exp:10:1.0, identity:1.0), best-of:N:KL or "
            f"worst-of:N:KL, such as best-of:4:1.0, with numbers; got {name!r}"
        ) from None


def chosen(name: str) -> Choice | None:
    """Of a name with a KL: the transform with the beta that it is to be trained with; None of a name without.

    The win rate is after the procedure that the name says, and of one completion where it says none.

    >>> choice = chosen("exp:10:0.5")
    >>> print(f"beta {choice.beta:.4f}, win rate {choice.win_rate:.4f}")
    beta 0.3184, win rate 0.7117
    >>> chosen("exp:10")
    """
    kind, *numbers = name.split(":")
    if kind in _PROCEDURES:
        n, kl = numbers
        return optimum(_PROCEDURES[kind](int(n)), kl=float(kl))
    plain, left = _plain(kind, numbers)
    if not left:
        return None
    unit, nats = scaled(plain, "unit"), float(left[0])
    beta = beta_for_kl(unit, nats)
    return Choice(unit, beta, nats, win_rate(unit, beta, BestOf(1)))


def _plain(kind: str, numbers: list[str]) -> tuple[Transform, list[str]]:
    """The transform of a kind, and what of its numbers is left: a KL, or nothing."""
    taken = 1 if kind == "exp" else 0
    if len(numbers) not in (taken, taken + 1):
        raise ValueError(f"{kind} takes {taken} numbers and a KL, got {numbers}")
    return Exponential(float(numbers[0])) if taken else _NAMED[kind], numbers[taken:]
