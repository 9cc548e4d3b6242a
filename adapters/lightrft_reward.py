"""LightRFT: `reward_func` of a file.

    export CALIBRATED_REWARD=/abs/reward
    ... --remote_rm_url "$(calibrated-rewards path lightrft_reward)"

Each rank loads the reward on its own.
Prompt's key: the rendered template, as the policy reads it; or, for a reward with an `id_column`, the label, which may
be a mapping that has the column. LightRFT leaves special tokens and padding at the end of completions: name both as
`endings`, such as ("<|im_end|>", "<|endoftext|>").
Faithful to E[R] - beta KL: `--advantage_estimator rloo --init_kl_coef BETA --reward_clip 0`, no `--use_kl_loss`,
`--reward_running_norm` or `--advantages_norm`. LightRFT logs nothing beside the reward.
"""

from typing import Any

from calibrated_rewards.reward import completion_of, configured, identifier, loud, number


def reward_func(queries: list[str], prompts: list[str], labels: list[Any] | None = None, **_: Any) -> Any:
    """Reward whole sequences that have their prompts in them, as a tensor."""
    import torch

    with loud("LightRFT"):
        reward = configured()
        completions = [completion_of(*each) for each in zip(queries, prompts, strict=True)]
        ids = [identifier(label, reward.id_column) for label in labels] if labels else None
        return torch.tensor([number(score) for score in reward.score(prompts, completions, ids)])
