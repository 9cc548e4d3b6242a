"""TRL's GRPO, RLOO, AsyncGRPO and Online DPO, and what calls rewards as TRL does (axolotl, Unsloth).

    export CALIBRATED_REWARD=reward/
    trl rloo --reward_funcs calibrated_rewards.adapters.trl_reward.reward --beta 0.05 ...

From Python no adapter is needed: `RLOOTrainer(reward_funcs=CalibratedReward.from_pretrained("reward/"), ...)`.

Prompt's key: the dataset's prompt, text or messages; or its column that the reward names as `id_column`
(`remove_unused_columns=False`, the default, keeps it).
Faithful to E[R] - beta KL: RLOO with `beta=b, normalize_advantages=False, num_iterations=1`; GRPO is near with
`beta=b * (G - 1) / G, scale_rewards="none", loss_type="dr_grpo"`; both with `temperature=1, top_p=1, top_k=0`.
"""

from typing import Any

from calibrated_rewards.reward import configured


def __getattr__(name: str) -> Any:
    """Load `reward` when it is asked for: TRL takes it by its path, and logs its own name."""
    if name == "reward":
        return configured()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has `reward`")
