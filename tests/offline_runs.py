"""Small runs of offline training without files: groups of random tokens, and a model trained on some of them."""

from pathlib import Path
from typing import Any

import numpy as np

from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import PromptGroup, ReferenceFile
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.train import OfflineSettings, train
from calibrated_rewards.training.run_folder import RunFolder

BETA = 0.3


def make_group(name: str, K: int = 8, tied: bool = False) -> PromptGroup:
    """A prompt with completions of three tokens, whose rewards rise with the number of the completion."""
    rng = np.random.default_rng(len(name) + K)
    rewards = np.zeros(K) if tied else np.linspace(0, 1, K)
    tokens = Group(rng.integers(8, 200, 5).tolist(), rng.integers(8, 200, (K, 3)).tolist())
    log_z = float(np.log(np.exp(rewards / BETA).mean()))
    return PromptGroup(name.encode(), name, tokens, rewards, rewards, BETA, log_z, None)


def fit(model: Any, folder: Path, **changes: Any) -> Any:
    """Train on two prompts, with two that are held out."""
    groups = [make_group(name) for name in ("a", "bb", "ccc", "dddd")]
    options = {"steps": 4, "prompts_a_step": 2, "completions": 8, "layers": 0, "check_steps": 1, "beta": BETA}
    settings = OfflineSettings(**{**options, **changes})
    reference = ReferenceFile(folder / "reference.safetensors", "a")
    return train(GroupReader(model), groups[:2], groups[2:], settings, RunFolder(folder), reference)
