"""tinker-cookbook: a builder whose group of answers to one prompt is rewarded together.

    # an RLDataset's get_batch: [CalibratedGroup(messages, renderer, num_envs=16) for messages in ...]

The reward is that of the directory in CALIBRATED_REWARD, in the process that trains.
Prompt's key: the builder's `id`, or its messages. The completion is the text that the renderer parses, without
thinking: calibrate on such texts.
Faithful to E[R] - beta KL: `kl_penalty_coef=b, kl_discount_factor=1.0` with the reference as `kl_reference_config`; in
asynchronous runs also `AsyncConfig(loss_fn="importance_sampling")`, since their default refuses that discount.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tinker
from tinker_cookbook.renderers import Renderer, get_text_content
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, StepResult, Trajectory

from calibrated_rewards.reward import ascore, configured, details, number


@dataclass(frozen=True)
class Answering(Env):  # type: ignore[misc]  # tinker ships no types
    """An environment of one prompt and one answer, which is rewarded with its group."""

    messages: Sequence[Any]
    renderer: Renderer

    async def initial_observation(self) -> tuple[tinker.ModelInput, Any]:
        """Give the prompt as the policy reads it."""
        return self.renderer.build_generation_prompt(list(self.messages)), self.renderer.get_stop_sequences()

    async def step(self, action: Sequence[int], *, extra: Any = None) -> StepResult:
        """End after the one answer, with no reward of its own."""
        return StepResult(0.0, True, tinker.ModelInput.empty(), self.renderer.get_stop_sequences())


@dataclass(frozen=True)
class CalibratedGroup(EnvGroupBuilder):  # type: ignore[misc]
    """A group of answers to one prompt."""

    messages: Sequence[Any]
    renderer: Renderer
    num_envs: int
    id: str | int | None = None

    async def make_envs(self) -> Sequence[Env]:
        """Make an environment for each answer."""
        return [Answering(self.messages, self.renderer) for _ in range(self.num_envs)]

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, dict[str, float]]]:
        """Compute the calibrated rewards, and raw scores and quantiles for the log."""
        parsed = [self.renderer.parse_response(each.transitions[-1].ac.tokens)[0] for each in trajectory_group]
        texts, many = [get_text_content(message) for message in parsed], len(parsed)
        scores = await ascore(configured(), [list(self.messages)] * many, texts, [self.id] * many)
        return [(number(score), details(score)) for score in scores]
