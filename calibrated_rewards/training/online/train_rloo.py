"""RLOO with TRL's trainer, set so that its optimum is exact: pi_ref(y) e^{Phi(C)/beta} / Z.

    python -m calibrated_rewards.training.online.train_rloo --policy ./sft --reward reward/ --prompts p.jsonl --out run/

For each prompt a group of completions is drawn and scored by the calibrated reward; beta times the log-ratio of policy
and reference, summed over the completion, goes from it; what is left, less the mean of the others of its group, says
how much more likely the completion shall be. The settings are those of `faithful.rloo_settings`, and what
`check_settings` says of them is printed.

It differs from the paper (InfAlign-CTRL, algorithm 1) in that it uses no value function, where the paper uses PPO: the
optimum is the same, and there is less to tune. Run it again after Ctrl-C or a crash, and it goes on from its last
checkpoint. On several GPUs: `accelerate launch --num_processes 4 -m calibrated_rewards.training.online.train_rloo ...`.
"""

from collections.abc import Sequence

from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from calibrated_rewards.training import launch as command
from calibrated_rewards.training.check_settings.trl import rloo_settings
from calibrated_rewards.training.online import trl as trl_run
from calibrated_rewards.training.online.trl import Settings

__all__ = ["Settings", "main", "train"]
train = trl_run.Kind("train_rloo", RLOOTrainer, RLOOConfig, rloo_settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main(str(__doc__), Settings, train, arguments, trl_run.run)


if __name__ == "__main__":
    raise SystemExit(main())
