"""ms-swift: a reward function, and a plug-in for a reward model that the trainer itself loads and shards.

    export CALIBRATED_REWARD=/abs/reward
    swift rlhf --rlhf_type grpo --external_plugins "$(calibrated-rewards path swift_reward)" \
      --reward_funcs calibrated ...                                        # the reward's own scorer
    swift rlhf ... --reward_model HF_ID --reward_model_plugin calibrated   # only table and transform

Under ZeRO-3 a reward function must not load a model: use the plug-in, or a scorer behind a server. The plug-in's raw
scores come of ms-swift's template, so calibrate with scores that do, and watch that u starts at 1/2 in the mean.
Prompt's key: the messages before the completion, with `--system` if there is one; or the dataset column that the reward
names as `id_column`. Not `prompt_id`, which is new in every run.
Faithful to E[R] - beta KL: `--advantage_estimator rloo --kl_in_reward true --scale_rewards none --beta BETA`.
"""

from dataclasses import dataclass
from typing import Any

from swift.rewards import orms, rm_plugins

from calibrated_rewards.reward import configured, identifier, loud


@dataclass(frozen=True)
class Calibrated:
    """The reward function; ms-swift passes the trainer's arguments, which it does not need."""

    args: Any = None

    def __call__(self, completions: list[str], messages: list[Any], **columns: Any) -> list[float | None]:
        """Reward the completions that end the messages; None where `on_missing="skip"` leaves one out."""
        with loud("ms-swift"):
            return [*configured()([before[:-1] for before in messages], completions, **columns)]


@dataclass(frozen=True)
class CalibratedModel:
    """The reward model's plug-in: raw scores by ms-swift's own plug-in, then the table and the transform."""

    model: Any
    template: Any

    def __call__(self, inputs: list[dict[str, Any]], **columns: Any) -> Any:
        """Reward rows, as a tensor on the device of the scores."""
        with loud("ms-swift"):
            reward = configured()
            ids = [identifier(row, reward.id_column) for row in inputs]
            raw = rm_plugins["default"](model=self.model, template=self.template)(inputs, **columns)
            return reward.from_scores([row["messages"][:-1] for row in inputs], raw, ids)


orms["calibrated"] = Calibrated
rm_plugins["calibrated"] = CalibratedModel
