"""The PPO trainer of TRL 1.0 to 1.12, whose reward model is a module that is given token ids.

    PPOTrainer(reward_model=RewardModule(tokenizer), ...)    # the reward of the directory in CALIBRATED_REWARD

Prompt's key: the longest calibrated prompt that the decoded text starts with. Conversations need their rendered
template among the table's names; plain prompts, tokenized with a BOS, `skip_special_tokens=True`.
Faithful to E[R] - beta KL: `kl_coef=b, kl_estimator="k1", gamma=1, lam=1, whiten_rewards=False, temperature=1.0,
missing_eos_penalty=None`; its advantages are whitened all the same.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from calibrated_rewards.reward import CalibratedReward, configured


class Output(NamedTuple):
    """The output of a backbone: TRL reads the last of its hidden states."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]


class RewardModule(nn.Module):
    """A reward model for TRL's `get_reward`: a row's reward stands at each of its positions."""

    base_model_prefix = "backbone"

    def __init__(
        self, tokenizer: Any, reward: CalibratedReward | None = None, *, skip_special_tokens: bool = False
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.reward = reward
        self.skip_special_tokens = skip_special_tokens

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Output:
        """Compute the calibrated rewards of whole rows, prompt and completion, padded on either side."""
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens) for ids in rows]
        rewards = (self.reward or configured()).score_texts(texts).reward
        hidden = torch.tensor(rewards, dtype=torch.float32, device=input_ids.device)
        hidden = hidden[:, None, None].expand(-1, input_ids.shape[1], 1)
        return Output(hidden, (hidden,))

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states, which are the rewards already."""
        return hidden
