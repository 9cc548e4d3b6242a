"""The loading code of frameworks that no package index has, from their sources: slime, AReaL, NeMo-RL.

python benchmarks/frameworks/source_loading.py slime ~/sources/slime
"""

from __future__ import annotations

import asyncio
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from subject import END, Subject, render, report, served, subject


def slime(asked: Subject) -> dict[str, float]:
    """Its reward hub: a sample each, and a group, of rendered prompts and of messages."""
    from slime.rollout.rm_hub import async_rm, batched_async_rm
    from slime.utils.types import Sample

    path = "calibrated_rewards.adapters.slime_reward.reward"
    plain = SimpleNamespace(custom_rm_path=path, reward_key=None)
    keyed = SimpleNamespace(custom_rm_path=path, reward_key="reward")
    by_text = [Sample(prompt=render(chat), response=said) for chat, said, _ in asked.pairs]
    by_id = [Sample(prompt=chat, response=said, metadata={"uid": own}) for chat, said, own in asked.pairs]

    async def each(args: Any, samples: list[Any]) -> list[Any]:
        return list(await asyncio.gather(*(async_rm(args, sample) for sample in samples)))

    worst = {"async_rm, rendered": asked.worst(asyncio.run(each(plain, by_text)))}
    worst["async_rm, messages and id"] = asked.worst(asyncio.run(each(plain, by_id)))
    with served() as url:
        remote = SimpleNamespace(custom_rm_path=None, rm_type="remote_rm", rm_url=url)
        worst["remote_rm"] = asked.worst(asyncio.run(each(remote, by_text)))
    worst["batched_async_rm"] = asked.worst(asyncio.run(batched_async_rm(plain, by_text)))
    for sample, given in zip(by_text, asyncio.run(batched_async_rm(keyed, by_text)), strict=True):
        sample.reward = given
    worst["get_reward_value, --reward-key"] = asked.worst([sample.get_reward_value(keyed) for sample in by_text])
    return worst


def areal(asked: Subject) -> dict[str, float]:
    """Its pool of processes, which finds the function by its name."""
    import areal  # a folder of the source, whose __init__ wants a GPU's packages

    assert areal.__path__
    from areal.api.reward_api import AsyncRewardWrapper

    from calibrated_rewards.adapters.areal_reward import reward

    wrapper = AsyncRewardWrapper(reward, timeout_seconds=60, max_workers=1)

    async def each() -> list[float]:
        calls = [
            wrapper(render(chat), said + END, [1], [2], messages=chat, uid=own, solution="4")
            for chat, said, own in asked.pairs
        ]
        return list(await asyncio.gather(*calls))

    return {"AsyncRewardWrapper, in a process of its pool": asked.worst(asyncio.run(each()))}


def nemo(asked: Subject) -> dict[str, float]:
    """Its registry, its actor, and a step as its rollouts make one."""
    import ray
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY, PY_EXECUTABLES
    from nemo_rl.environments.utils import create_env, register_env

    name = "calibrated_rewards.adapters.nemo_env.CalibratedEnv"
    register_env("calibrated", name)
    ACTOR_ENVIRONMENT_REGISTRY[name] = PY_EXECUTABLES.SYSTEM
    ray.init(num_cpus=1, include_dashboard=False)
    env = create_env("calibrated", {})
    logs = [
        [{"role": "user", "content": render(chat)}, {"role": "assistant", "content": said}]
        for chat, said, _ in asked.pairs
    ]
    given = ray.get(env.step.remote(logs, [None] * len(logs)))
    worst = {"step in a Ray actor (float32), rendered": asked.worst(given.rewards)}
    _, metrics = ray.get(env.global_post_process_and_metrics.remote({}))
    worst["mean u"] = abs(metrics["calibrated/u"] - float(asked.expected.u.mean()))
    ray.shutdown()
    return worst


def only(package: str, folder: str) -> None:
    """Stand in for a package whose __init__ imports what only its GPU image has; its modules are the real ones."""
    module = ModuleType(package)
    module.__path__ = [os.path.join(folder, *package.split("."))]
    sys.modules[package] = module


FRAMEWORKS = {"slime": slime, "AReaL": areal, "NeMo-RL": nemo}


def main() -> None:
    """Compare, and report."""
    framework, folder = sys.argv[1:3]
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder
    if framework == "AReaL":
        for package in ("areal", "areal.api"):
            only(package, folder)
    asked = subject()
    worst = FRAMEWORKS[framework](asked)
    report(framework=framework, version="source", pairs=len(asked), worst=worst)


if __name__ == "__main__":
    main()
