"""GRPO with TRL's trainer, set so that it comes close to the optimum pi_ref(y) e^{Phi(C)/beta} / Z.

    python -m calibrated_rewards.training.online.train_grpo --policy ./sft --reward reward/ --prompts p.jsonl --out run/

As train_rloo.py, but for the trainer: its KL is a term of each token's loss, so that a token has no credit for the KL
of those that come after it, and the optimum is another one: nearly the same for one token, further off the longer
completions are and the smaller beta is (docs/evidence/results.md has numbers). The settings are those of
`faithful.grpo_settings`, which do not divide rewards by their group's standard deviation; what `check_settings` says of
them is printed. The log's KL is TRL's estimate of it, which is never negative, per token times their mean number.

It differs from the paper (InfAlign-CTRL, algorithm 1), which uses PPO, in that, and in that it needs no value function.
Where nothing speaks for GRPO, train_rloo.py is the one to take. Run it again after Ctrl-C or a crash, and it goes on
from its last checkpoint. On several GPUs: `accelerate launch -m calibrated_rewards.training.online.train_grpo ...`.
"""

from collections.abc import Sequence

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from calibrated_rewards.training import launch as command
from calibrated_rewards.training.check_settings.trl import grpo_settings
from calibrated_rewards.training.online import trl as trl_run
from calibrated_rewards.training.online.trl import Settings

__all__ = ["Settings", "main", "train"]
train = trl_run.Kind("train_grpo", GRPOTrainer, GRPOConfig, grpo_settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main(str(__doc__), Settings, train, arguments, trl_run.run)


if __name__ == "__main__":
    raise SystemExit(main())
