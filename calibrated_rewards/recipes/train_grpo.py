"""GRPO with TRL's trainer, set so that it comes close to the optimum pi_ref(y) e^{Phi(C)/beta} / Z.

    python -m calibrated_rewards.recipes.train_grpo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

As train_rloo.py, but for the trainer: its KL is a term of each token's loss, so that a token has no credit for the KL
of those that come after it, and the optimum is another one: nearly the same for one token, further off the longer
completions are and the smaller beta is (docs/faithful.md has numbers). The settings are those of
`faithful.grpo_settings`, which do not divide rewards by their group's standard deviation; what `check_settings` says of
them is printed. The log's KL is TRL's estimate of it, which is never negative, per token times their mean number.

It differs from the paper (InfAlign-CTRL, algorithm 1), which uses PPO, in that, and in that it needs no value function.
Where nothing speaks for GRPO, train_rloo.py is the one to take. Run it again after Ctrl-C or a crash, and it goes on
from its last checkpoint. On several GPUs: `accelerate launch -m calibrated_rewards.recipes.train_grpo ...`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from calibrated_rewards.faithful.trl_settings import grpo_settings
from calibrated_rewards.recipes import command, trl_run
from calibrated_rewards.recipes.trl_run import Settings
from calibrated_rewards.rollouts.sources import Asked
from calibrated_rewards.samplers.decoding import Decoding

__all__ = ["Settings", "main", "train"]
KIND = trl_run.Kind("train_grpo", GRPOTrainer, GRPOConfig, grpo_settings)


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
