"""verl's own loading code and managers with the adapter: by file, by package, as a manager, and in a Ray actor."""

from __future__ import annotations

import asyncio
import os
import tempfile
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import torch
from hydra import compose, initialize_config_module
from subject import ADAPTERS, END, Subject, render, report, subject, tokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager

PACKAGE = "pkg://calibrated_rewards.adapters.verl_reward"
FUNCTION = ["reward.custom_reward_function.name=compute_score"]
MANAGER = [
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.name=CalibratedRewardManager",
    f"reward.reward_manager.module.path={PACKAGE}",
]


def configuration(*overrides: str) -> Any:
    """What the command line of the adapter's docstring makes."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def batch(asked: Subject, tokens: Any, *, streaming: bool) -> DataProto:
    """Rollouts as verl holds them: padded tokens, and a row's other columns as arrays of objects."""
    prompts = [tokens(render(chat), add_special_tokens=False).input_ids for chat in asked.chats]
    responses = [tokens(said + END, add_special_tokens=False).input_ids for said in asked.completions]
    left, right = (max(map(len, each)) for each in (prompts, responses))
    rows = [[0] * (left - len(p)) + p + r + [0] * (right - len(r)) for p, r in zip(prompts, responses, strict=True)]
    mask = [
        [0] * (left - len(p)) + [1] * (len(p) + len(r)) + [0] * (right - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    whole = torch.tensor(rows)
    other = {
        "data_source": ["mine"] * len(rows),
        "reward_model": [{"ground_truth": ""}] * len(rows),
        "extra_info": [{"uid": identifier, "index": at} for at, identifier in enumerate(asked.ids)],
        "raw_prompt": [np.array(chat, dtype=object) for chat in asked.chats],
    }
    if streaming:  # verl merges these into extra_info
        other["tool_extra_fields"] = [{"raw_prompt": chat} for chat in other["raw_prompt"]]
    columns = {name: objects(values) for name, values in other.items()}
    tensors = {"prompts": whole[:, :left], "responses": whole[:, left:], "attention_mask": torch.tensor(mask)}
    return DataProto.from_dict(tensors=tensors, non_tensors=columns)


def objects(values: list[Any]) -> np.ndarray:
    """One object each, whatever their lengths."""
    column = np.empty(len(values), dtype=object)
    for at, value in enumerate(values):
        column[at] = value
    return column


async def managed(manager: Any, data: DataProto) -> list[dict[str, Any]]:
    """All rows at once, as a reward worker asks."""
    return await asyncio.gather(*(manager.run_single(data[at : at + 1]) for at in range(len(data))))


def compared(asked: Subject, given: list[dict[str, Any]]) -> float:
    """The worst difference, of rewards and of what is logged."""
    logged = [each["reward_extra_info"] for each in given]
    worst = [asked.worst([each["reward_score"] for each in given]), asked.worst([each["score"] for each in logged])]
    worst += [
        float(np.abs(np.subtract([x[name] for x in logged], asked.details[name])).max()) for name in asked.details
    ]
    assert {frozenset(each) for each in logged} == {frozenset(("score", "raw", "u", "hit"))}
    return max(worst)


def main() -> None:
    """Compare, and report."""
    asked, tokens = subject(), tokenizer()
    worst: dict[str, float] = {}
    for way, path in (("file", f"{ADAPTERS}/verl_reward.py"), ("pkg", PACKAGE)):
        config = configuration(*FUNCTION, f"reward.custom_reward_function.path={path}")
        function = get_custom_reward_fn(config)
        rows = [
            {"data_source": "mine", "solution_str": said, "ground_truth": "", "extra_info": {"uid": identifier}}
            for _, said, identifier in asked.pairs
        ]

        async def all_rows(function: Any = function, rows: list[Any] = rows) -> list[Any]:
            return await asyncio.gather(*(function(**row) for row in rows))

        worst[f"get_custom_reward_fn, {way}, by id alone"] = asked.worst([x["score"] for x in asyncio.run(all_rows())])
        for streaming in (False, True):
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            manager = load_reward_manager(config, tokens)
            given = loop.run_until_complete(managed(manager, batch(asked, tokens, streaming=streaming)))
            worst[f"NaiveRewardManager.run_single, {way}, {'with' if streaming else 'without'} raw_prompt"] = compared(
                asked, given
            )
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    manager = load_reward_manager(configuration(*MANAGER), tokens)
    data = batch(asked, tokens, streaming=False)
    worst["CalibratedRewardManager.run_single"] = compared(asked, loop.run_until_complete(managed(manager, data)))
    del data.non_tensor_batch["extra_info"]
    with_messages = loop.run_until_complete(managed(manager, data))
    worst["CalibratedRewardManager.run_single, by messages alone"] = compared(asked, with_messages)
    tensor = type(manager).assemble_rm_scores(data, [each["reward_score"] for each in with_messages])
    worst["assemble_rm_scores (float32)"] = asked.worst(tensor.sum(dim=1))
    worst["RewardLoopWorker in a Ray actor"] = compared(asked, in_ray(tokens, batch(asked, tokens, streaming=False)))
    report(framework="verl", version=version("verl"), pairs=len(asked), worst=worst)


def in_ray(tokens: Any, data: DataProto) -> list[dict[str, Any]]:
    """Verl's own reward worker, in a process of its own that the environment variable reaches."""
    folder = tempfile.mkdtemp()
    tokens.save_pretrained(folder)
    with open(f"{folder}/config.json", "w") as file:
        file.write('{"model_type": "llama"}')
    config = configuration(*MANAGER, f"actor_rollout_ref.model.path={folder}")
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        runtime_env={"env_vars": {"CALIBRATED_REWARD": os.environ["CALIBRATED_REWARD"]}},
    )
    worker = ray.remote(RewardLoopWorker).remote(config)
    given: list[dict[str, Any]] = ray.get(worker.compute_score_batch.remote(data))
    ray.shutdown()
    return given


if __name__ == "__main__":
    main()
