"""SkyRL's own registry with the adapter: an environment for each completion, in threads as its generator has them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import skyrl_gym
from skyrl_gym.envs import register
from subject import raised, report, subject


def played(pair: tuple[Any, str, str | None]) -> dict[str, Any]:
    """One episode."""
    chat, said, own = pair
    env = skyrl_gym.make("calibrated", env_config={}, extras={"uid": own, "max_turns": 1})
    prompt, _ = env.init(list(chat))
    assert prompt == chat
    step = env.step(said)
    assert (step["done"], step["observations"]) == (True, [])
    assert env.get_metrics() == step["metadata"]
    env.close()
    return dict(step)


def main() -> None:
    """Compare, and report."""
    asked = subject()
    register(id="calibrated", entry_point="calibrated_rewards.adapters.skyrl_env:CalibratedEnv")
    worst: dict[str, float] = {}
    for how, pairs in (("by id", asked.pairs), ("by messages", [(chat, said, None) for chat, said, _ in asked.pairs])):
        with ThreadPoolExecutor(32) as pool:
            steps = list(pool.map(played, pairs))
        worst[f"reward {how}"] = asked.worst([step["reward"] for step in steps])
        for name, wanted in asked.details.items():
            worst[f"{name} {how}"] = max(abs(s["metadata"][name] - x) for s, x in zip(steps, wanted, strict=True))
    unknown = raised(lambda: played(([{"role": "user", "content": "Who?"}], "I", None)))
    report(
        framework="SkyRL", version=f"skyrl-gym {version('skyrl-gym')}", pairs=len(asked), worst=worst, unknown=unknown
    )


if __name__ == "__main__":
    main()
