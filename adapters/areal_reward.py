"""AReaL: a function of one completion.

    trainer.train(workflow="areal.workflow.rlvr.RLVRWorkflow", workflow_kwargs=dict(
        reward_fn="calibrated_rewards.adapters.areal_reward.reward", gconfig=..., tokenizer=...))

with CALIBRATED_REWARD=/abs/reward in the rollout workers' environment. It runs in a pool of processes, each of which
loads the reward, and AReaL makes 0 of what takes more than 15 s, the loading too: score by a server.
Prompt's key: the dataset's `messages`, or the rendered template; or the column that the reward names as `id_column`.
AReaL leaves special tokens at the end of completions: name them as `endings`.
Faithful to E[R] - beta KL: `actor.kl_ctl=BETA actor.kl_estimator=k1 actor.reward_norm=null actor.adv_norm=null
actor.reward_clip=1e6 actor.reward_scaling=1.0 actor.reward_bias=0.0`, and a `ref` engine: without one the KL term is an
entropy bonus. AReaL logs nothing beside the reward.
"""

from typing import Any

from calibrated_rewards.reward import configured, identifier, loud, number, score_one

SECONDS = 15  # what AsyncRewardWrapper waits


def reward(prompt: str, completions: str, *_: Any, messages: Any = None, **row: Any) -> float:
    """Reward one completion, which AReaL calls `completions`; tokens follow, and by name the dataset's columns."""
    with loud("AReaL", SECONDS):
        calibrated = configured()
        name = identifier(row, calibrated.id_column)
        return number(score_one(calibrated, prompt if messages is None else messages, completions, name))
