"""Offline training, from rollouts that exist already: `rollouts.py` reads those of a calibration with their rewards.

`train.py` is the loop behind `calibrated-rewards train offline`, and `losses.py` has what it minimises. `groups.py`
makes rollouts into tokens, `log_probabilities.py` reads them with gradients, the prompt once for all completions,
`trained_weights.py` says which weights are trained. `dataset_folder.py` has `export`, which writes rollouts as a data
set for other trainers: `datasets.py` chooses the rows, `layouts.py` arranges them for a framework, `dataset_files.py`
writes them. `reward_model.py` distils a calibrated reward. `gradients.py` compares the policy gradients of rewards.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.training.offline.dataset_folder import Export as Export, export as export
    from calibrated_rewards.training.offline.datasets import Selection as Selection
    from calibrated_rewards.training.offline.gradients import (
        GradientComparison as GradientComparison,
        compare_gradients as compare_gradients,
    )
    from calibrated_rewards.training.offline.group_batches import Group as Group
    from calibrated_rewards.training.offline.log_probabilities import GroupReader as GroupReader
    from calibrated_rewards.training.offline.losses import (
        Loss as Loss,
        LossInputs as LossInputs,
        parse_loss as parse_loss,
    )
    from calibrated_rewards.training.offline.reward_model import (
        distil as distil,
        distillation_pairs as distillation_pairs,
    )
    from calibrated_rewards.training.offline.rollouts import (
        PromptRollouts as PromptRollouts,
        iterate_rollouts as iterate_rollouts,
    )
    from calibrated_rewards.training.offline.train import OfflineSettings as OfflineSettings

# Loaded when they are asked for: they bring heavy libraries.
LAZY = {
    "Export": "dataset_folder",
    "export": "dataset_folder",
    "Selection": "datasets",
    "GradientComparison": "gradients",
    "compare_gradients": "gradients",
    "Group": "log_probabilities",
    "GroupReader": "log_probabilities",
    "Loss": "losses",
    "LossInputs": "losses",
    "parse_loss": "losses",
    "distil": "reward_model",
    "distillation_pairs": "reward_model",
    "PromptRollouts": "rollouts",
    "iterate_rollouts": "rollouts",
    "OfflineSettings": "train",
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
