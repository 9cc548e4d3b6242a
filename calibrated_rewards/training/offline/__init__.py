"""Offline training, from rollouts that exist already.

`calibrated-rewards train offline` trains a policy: `train.py` is its loop, `losses.py` has the losses, `rollouts.py`
reads the rollouts of a calibration with their rewards, and `groups.py` makes them into tokens. `log_probabilities.py`
reads the completions of a prompt with gradients, the prompt once; `trained_weights.py` has checkpoints and the factor
that brings weights to a KL. `reward_model.py` distils a calibrated reward.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.training.offline.log_probabilities import Group as Group, GroupReader as GroupReader
    from calibrated_rewards.training.offline.losses import (
        Loss as Loss,
        LossInputs as LossInputs,
        parse_loss as parse_loss,
    )
    from calibrated_rewards.training.offline.reward_model import (
        distil as distil,
        distillation_pairs as distillation_pairs,
    )
    from calibrated_rewards.training.offline.train import OfflineSettings as OfflineSettings

# Loaded when they are asked for: they bring heavy libraries.
LAZY = {
    "Group": "log_probabilities",
    "GroupReader": "log_probabilities",
    "OfflineSettings": "train",
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
