"""tinker-cookbook's own types around the adapter's builder: made, rewarded, centred; a real renderer."""

from __future__ import annotations

import asyncio
import pickle
from importlib.metadata import version
from typing import Any

from subject import raised, report, subject, tokenizer
from tinker_cookbook import renderers
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.rl.data_processing import compute_advantages
from tinker_cookbook.rl.types import Trajectory, TrajectoryGroup, Transition

from calibrated_rewards.adapters.tinker_env import CalibratedGroup


async def rewarded(group: CalibratedGroup, texts: list[str], tokens: Any) -> list[tuple[float, Any]]:
    """A step in each environment, and the rewards of them all."""
    environments = await group.make_envs()
    trajectories = []
    for environment, text in zip(environments, texts, strict=True):
        observed, _ = await environment.initial_observation()
        action = tokens(text + "\n\nUser:", add_special_tokens=False)["input_ids"]
        step = await environment.step(action)
        assert step.episode_done
        assert step.reward == 0
        taken = Transition(
            ob=observed, ac=TokensWithLogprobs(action, [0.0] * len(action)), reward=step.reward, episode_done=True
        )
        trajectories.append(Trajectory([taken], step.next_observation))
    given = await group.compute_group_rewards(trajectories, environments)
    whole = TrajectoryGroup(trajectories, [reward for reward, _ in given], [metrics for _, metrics in given])
    centred = compute_advantages([whole])[0].tolist()
    mean = sum(whole.get_total_rewards()) / len(given)
    assert all(abs(a - (reward - mean)) < 1e-6 for a, (reward, _) in zip(centred, given, strict=True))
    return given


def main() -> None:
    """Run it, and report how far each number is from what it should be."""
    asked, tokens = subject(), tokenizer()
    renderer = renderers.get_renderer("role_colon", tokens)
    worst: dict[str, float] = {}
    for name in ("ids", "no ids"):
        given: list[tuple[float, Any]] = []
        for at in range(0, len(asked), 4):
            chat, uid = asked.chats[at], asked.ids[at] if name == "ids" else None
            group = CalibratedGroup(chat, renderer, 4, uid)
            given += asyncio.run(rewarded(group, asked.completions[at : at + 4], tokens))
        worst[name] = asked.worst([reward for reward, _ in given])
        for what, wanted in asked.details.items():
            worst[f"{what}, {name}"] = max(abs(m[what] - x) for (_, m), x in zip(given, wanted, strict=True))
    unknown = raised(
        lambda: asyncio.run(
            rewarded(CalibratedGroup([{"role": "user", "content": "Who?"}], renderer, 1), ["I"], tokens)
        )
    )
    report(
        framework="tinker-cookbook",
        version=version("tinker-cookbook"),
        pairs=len(asked),
        worst=worst,
        unknown=unknown,
        picklable_without_renderer=pickle.loads(pickle.dumps(CalibratedGroup(asked.chats[0], None, 2))).num_envs == 2,
    )


if __name__ == "__main__":
    main()
