"""NeMo-RL: an environment of one turn, a Ray actor.

    # in the driver, before setup:
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY, PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env
    name = "calibrated_rewards.adapters.nemo_env.CalibratedEnv"
    register_env("calibrated", name)
    ACTOR_ENVIRONMENT_REGISTRY[name] = PY_EXECUTABLES.SYSTEM    # without it: "No actor environment registered"
    # yaml: env: {calibrated: {}}  data: {default: {env_name: calibrated}}

with CALIBRATED_REWARD=/abs/reward in the environment, which the actor inherits.
Prompt's key: the rendered template, into which NeMo-RL's processors turn the messages before an environment sees them;
or the entry of `extra_env_info` (a processor of yours puts it there) that the reward names as `id_column`.
Faithful to E[R] - beta KL: only near. GRPO with `grpo.normalize_rewards=false grpo.use_leave_one_out_baseline=true
loss_fn.reference_policy_kl_penalty=BETA loss_fn.reference_policy_kl_type=k2`; no `reward_scaling`, no `reward_shaping`.
"""

from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from calibrated_rewards.reward import configured, details, identifier, loud, number


@ray.remote
class CalibratedEnv(EnvironmentInterface):  # type: ignore[misc]  # nemo_rl ships no types
    """An environment that rewards the last message of each log and ends."""

    def __init__(self, cfg: Any = None) -> None:
        self.logs: list[dict[str, float]] = []

    def step(self, message_log_batch: list[list[dict[str, Any]]], metadata: list[Any]) -> EnvironmentReturn:
        """Reward all samples of a step at once."""
        with loud("NeMo-RL"):
            reward, n = configured(), len(message_log_batch)
            prompts = ["".join(message["content"] for message in log[:-1]) for log in message_log_batch]
            ids = [identifier(info or {}, reward.id_column) for info in metadata]
            scores = reward.score(prompts, [log[-1]["content"] for log in message_log_batch], ids)
            self.logs += map(details, scores)
            observations = [{"role": "environment", "content": ""}] * n
            rewards = torch.tensor([number(score) for score in scores])
            return EnvironmentReturn(
                observations, metadata, [None] * n, rewards, torch.ones(n, dtype=torch.bool), [None] * n
            )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Average what was scored since the last call, for the log."""
        logs, self.logs = self.logs, []
        return batch, {f"calibrated/{name}": sum(log[name] for log in logs) / len(logs) for name in (logs or [{}])[0]}
