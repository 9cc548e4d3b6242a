"""Offline training, from rollouts that exist already.

`rollouts.py` reads the rollouts of a calibration with their rewards, `losses.py` has the losses that a policy learns
from them by, `reward_model.py` distils a calibrated reward.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.training.offline.losses import (
        Loss as Loss,
        LossInputs as LossInputs,
        parse_loss as parse_loss,
    )
    from calibrated_rewards.training.offline.reward_model import (
        distil as distil,
        distillation_pairs as distillation_pairs,
    )

# Loaded when they are asked for: they bring heavy libraries.
LAZY = {
    "Loss": "losses",
    "LossInputs": "losses",
    "parse_loss": "losses",
    "distil": "reward_model",
    "distillation_pairs": "reward_model",
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
