"""SkyRL: an environment of one turn.

    export CALIBRATED_REWARD=/abs/reward
    # in the entry point, inside the Ray task, before the generator is made:
    from skyrl_gym.envs import register
    register(id="calibrated", entry_point="calibrated_rewards.adapters.skyrl_env:CalibratedEnv")
    # command line: environment.env_class=calibrated

Prompt's key: the messages; or the dataset column that the reward names as `id_column`.
Faithful to E[R] - beta KL: `trainer.algorithm.advantage_estimator=rloo trainer.algorithm.use_kl_in_reward=true
trainer.algorithm.use_kl_loss=false trainer.algorithm.kl_estimator_type=k1 trainer.algorithm.kl_loss_coef=BETA`, and
`generator.zero_reward_on_non_stop=false`.
"""

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from calibrated_rewards.reward import configured, details, identifier, loud, number, score_one


class CalibratedEnv(BaseTextEnv):  # type: ignore[misc]  # skyrl_gym ships no types
    """An environment that rewards the first answer and ends."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.row = extras or {}
        self.metrics: dict[str, float] = {}

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Keep the prompt as it is now: SkyRL appends to it later."""
        self.prompt = list(prompt)
        return prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Score the answer; called from threads, which share batches."""
        with loud("SkyRL"):
            reward = configured()
            score = score_one(reward, self.prompt, action, identifier(self.row, reward.id_column))
            self.metrics = details(score)
            return BaseTextEnvStepOutput(observations=[], reward=number(score), done=True, metadata=self.metrics)

    def get_metrics(self) -> dict[str, float]:
        """Give the numbers that SkyRL averages and logs."""
        return self.metrics
