"""RLOO with TRL's trainer, set so that its optimum is exact: pi_ref(y) e^{Phi(C)/beta} / Z.

    python -m calibrated_rewards.recipes.train_rloo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

For each prompt a group of completions is drawn and scored by the calibrated reward; beta times the log-ratio of policy
and reference, summed over the completion, goes from it; what is left, less the mean of the others of its group, says
how much more likely the completion shall be. The settings are those of `faithful.rloo_settings`, and what
`check_settings` says of them is printed.

It differs from the paper (InfAlign-CTRL, algorithm 1) in that it uses no value function, where the paper uses PPO: the
optimum is the same, and there is less to tune. Run it again after Ctrl-C or a crash, and it goes on from its last
checkpoint. On several GPUs: `accelerate launch --num_processes 4 -m calibrated_rewards.recipes.train_rloo ...`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from calibrated_rewards.faithful.trl_settings import rloo_settings
from calibrated_rewards.recipes import command, trl_run
from calibrated_rewards.recipes.trl_run import Settings
from calibrated_rewards.rollouts.sources import Asked
from calibrated_rewards.samplers.decoding import Decoding

__all__ = ["Settings", "main", "train"]
KIND = trl_run.Kind("train_rloo", RLOOTrainer, RLOOConfig, rloo_settings)


def train(
    policy: str | os.PathLike[str] | Any,
    reward: Any,
    prompts: Sequence[Asked],
    decoding: Decoding,
    settings: Settings,
    out: Path,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    show_progress: bool = True,
) -> Path:
    """Train in the folder `out`, or go on there from the last checkpoint; where the model is, when it is finished.

    `policy` is a path, an id of the Hub, or a model with its tokenizer; `reward` any function that TRL takes, such as
    a CalibratedReward or `RawReward(reward)`. The folder has settings.json, log.jsonl and model/ (an adapter with
    LoRA); other settings in it are a ValueError.
    """
    return trl_run.train(KIND, policy, reward, prompts, decoding, settings, out, tokenizer, dtype, show_progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main(str(__doc__), Settings, train, arguments, trl_run.run)


if __name__ == "__main__":
    raise SystemExit(main())
