"""Training runs online, each of which reads in one file: RLOO, GRPO and A2PO by TRL, GRPO and PPO in plain PyTorch.

`calibrated-rewards train rloo|grpo|a2po|ppo` starts one from files. From Python:

    from calibrated_rewards.training.online import TRLSettings, train_rloo

    train_rloo("./sft", reward, prompts, Decoding(max_tokens=64), TRLSettings(beta=0.1), "run/")

`trl.py` has `train_rloo` and `train_grpo`, `a2po.py` has `train_a2po`; `grpo.py` and `ppo.py` are the plain loops, each
with its `train`. Copy one to change it. `reference_values.py` has a reward's mean and its optimal value.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.training.online.a2po import train_a2po as train_a2po
    from calibrated_rewards.training.online.grpo import GRPOSettings as GRPOSettings
    from calibrated_rewards.training.online.ppo import PPOSettings as PPOSettings
    from calibrated_rewards.training.online.trl import (
        TRLSettings as TRLSettings,
        train_grpo as train_grpo,
        train_rloo as train_rloo,
    )

# Loaded when they are asked for: they bring torch and TRL.
LAZY = {
    "TRLSettings": "trl",
    "train_a2po": "a2po",
    "train_rloo": "trl",
    "train_grpo": "trl",
    "GRPOSettings": "grpo",
    "PPOSettings": "ppo",
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
