"""verl: a reward manager, which sees the prompt, and a function, which does not.

    export CALIBRATED_REWARD=/abs/reward    # in the workers' environment: +ray_kwargs.ray_init.runtime_env.env_vars...
    python -m verl.trainer.main_ppo reward.reward_manager.source=importlib \
      reward.reward_manager.name=CalibratedRewardManager \
      reward.reward_manager.module.path=pkg://calibrated_rewards.adapters.verl_reward ...
    python -m verl.trainer.main_ppo reward.custom_reward_function.name=compute_score \
      reward.custom_reward_function.path=pkg://calibrated_rewards.adapters.verl_reward ...

Prompt's key: the messages (`raw_prompt`); or the entry of `extra_info` that the reward names as `id_column` (a column
`uid` outside of it is overwritten). The function finds messages only in `extra_info`, as `raw_prompt` (verl puts it
there in some modes) or `prompt` (yours); without them it needs the id, and a reward saved with its prompts.
Reward workers have no GPU: score by a server. Not with `rate_limited`, which makes 0 of errors.
Faithful to E[R] - beta KL: `algorithm.adv_estimator=rloo algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=BETA
actor_rollout_ref.actor.use_kl_loss=False`.
"""

import asyncio
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from calibrated_rewards.reward import ascore_one, configured, details, identifier, loud, number


async def compute_score(*, solution_str: str, extra_info: dict[str, Any] | None = None, **_: Any) -> dict[str, float]:
    """Reward one response; what is beside "score" is logged ("reward" must not be: verl counts one of its own)."""
    info = extra_info or {}
    return await _score(info.get("raw_prompt", info.get("prompt")), solution_str, info)


class CalibratedRewardManager(RewardManagerBase):  # type: ignore[misc]  # verl ships no types
    """A manager that scores the last response of a rollout, decoded as verl's own managers do."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, *_: Any, **__: Any) -> None:
        super().__init__(config, tokenizer, compute_score)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Score one row; verl calls it for many at a time, which share batches."""
        item = data[-1:][0]
        tokens = item.batch["responses"]
        length = int(item.batch["attention_mask"][-len(tokens) :].sum())
        response = await asyncio.to_thread(self.tokenizer.decode, tokens[:length], skip_special_tokens=True)
        info = item.non_tensor_batch.get("extra_info") or {}
        scored = await _score(item.non_tensor_batch["raw_prompt"], response, info)
        return {"reward_score": scored["score"], "reward_extra_info": scored}


async def _score(prompt: Any, response: str, info: dict[str, Any]) -> dict[str, float]:
    with loud("verl"):
        reward = await asyncio.to_thread(configured)
        score = await ascore_one(reward, prompt, response, identifier(info, reward.id_column))
        return {"score": number(score), **details(score)}
