"""Verifiers, and prime-rl that trains with it: `reward` for its v1, `group` for releases up to 0.1.14.

    [env.taskset.task.rewards]           # prime-rl: [orchestrator.train.source.env.taskset.task.rewards]
    calibrated = { fn = "calibrated_rewards.adapters.verifiers_reward:reward", weight = 1.0 }

    rubric = vf.Rubric(funcs=[verifiers_reward.group])    # up to 0.1.14

The reward is that of the directory in CALIBRATED_REWARD.
Prompt's key: the field of the task (`group`: of its `info`) that the reward names as `id_column`, else `task.id`; or
the messages that the policy is sent, which are the system prompt, if any, and the prompt.
Faithful to E[R] - beta KL: not with prime-rl's own loss, whose `kl_tau` holds to the last policy and not to the
reference; give a loss of your own (`trainer.loss.type = "custom"`).
"""

from collections.abc import Sequence
from typing import Any

from calibrated_rewards.reward import ascore, ascore_one, configured, identifier, loud, number


async def reward(task: Any, trace: Any) -> float:
    """Reward the last reply of a trace."""
    with loud("verifiers"):
        calibrated = configured()
        prompt = [{"role": "user", "content": task.prompt}] if isinstance(task.prompt, str) else list(task.prompt)
        if task.system_prompt is not None:
            prompt = [{"role": "system", "content": task.system_prompt}, *prompt]
        name = getattr(task, calibrated.id_column or "id", None)
        # As it was sampled: `trace.last_reply` strips it.
        reply = trace.assistant_messages[-1].content if trace.root_reply is None else trace.root_reply
        return number(await ascore_one(calibrated, prompt, reply or "", name))


async def group(
    prompts: Sequence[Any], completions: Sequence[Any], infos: Sequence[dict[str, Any]], **_: Any
) -> list[float]:
    """Reward the rollouts of one prompt together."""
    try:
        calibrated = configured()
        ids = [identifier(info or {}, calibrated.id_column) for info in infos]
        return list(map(number, await ascore(calibrated, prompts, completions, ids)))
    except Exception as error:
        # A Rubric makes 0 of any other error, and 0 is a reward.
        raise SystemExit(f"the calibrated reward failed: {type(error).__name__}: {error}") from error
