"""Directories of a calibration without models: prompts with the completions and scores that a test names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibrated_rewards import ReferenceTable
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, Shard
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout

Drawn = tuple[Any, Sequence[Any], Sequence[float]]


def save_run(folder: Path, drawn: Sequence[Drawn], per_shard: int = 2, scorer: str = "reward") -> ReferenceTable:
    """Write a run of (prompt, completions, scores), a completion being a text, messages or a Rollout, and its table."""
    directory = RunDirectory(folder)
    directory.write_settings({"seed": 0, "sampler": {"kind": "named"}, "scorers": {scorer: {"kind": "named"}}})
    for number, at in enumerate(range(0, len(drawn), per_shard)):
        some = drawn[at : at + per_shard]
        prompts = tuple(Planned(prompt_key(prompt), prompt) for prompt, _, _ in some)
        rollouts = tuple(
            tuple(each if isinstance(each, Rollout) else Rollout(each, 1, "stop", -1.5) for each in completions)
            for _, completions, _ in some
        )
        seeds = tuple(tuple(range(len(each))) for each in rollouts)
        scores = tuple(np.array(each, np.float32) for _, _, each in some)
        directory.write_prompts(f"{number:05d}", list(prompts))
        directory.save(f"{number:05d}", Shard(prompts, rollouts, seeds, {scorer: scores}))
    table = ReferenceTable.build((prompt, scores) for prompt, _, scores in drawn if len(scores))
    table.save(folder)
    return table


def chat(text: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": text}]
