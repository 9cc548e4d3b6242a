"""How near each trainer comes to the enumerated optimum, with CalibratedReward, for seven transforms.

    python benchmarks/tabular/trainers.py               # goes on where it was; one core, about a minute a case
    python benchmarks/tabular/trainers.py --far         # worst of 4 at larger KL: tabular_far.json
    python benchmarks/tabular/trainers.py --quick       # a case of each, a few steps, nothing is kept

TRL's RLOO and GRPO with `rloo_settings` and `grpo_settings`, and the plain loops of PPO and GRPO. Each finished case is
written to benchmarks/results/tabular.json, and not run again; `plots.py` draws them. What is trained is enumerated: no
sampling stands between the weights after the last step and the numbers. Beta is that of the optimum with the KL of
`world.KLS`. Win rates are compared with those of the same transform's optimum at the trained policy's own KL.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from world import KLS, LENGTH, LETTERS, PROMPTS, TRANSFORMS, World, enumerable, known, laws, save

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training.check_settings.trl import grpo_settings, rloo_settings
from calibrated_rewards.training.online import GRPOSettings, PPOSettings, grpo, ppo

GROUP, RATE = 32, 0.15
STEPS = {name: 1600 if KLS[name] < 0.5 else 800 for name in TRANSFORMS}
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Loop:
    """A plain loop, and what it is set to."""

    loop: Any
    options: Any
    settings: dict[str, Any]

    def __call__(self, model: Any, reward: Any, beta: float, seed: int, steps: int) -> Any:
        """The trained model."""
        policy = Policy(model, enumerable.tokenizer(LETTERS), Decoding(LENGTH), Text())
        shared = {"beta": beta, "seed": seed, "steps": steps, "prompts_a_step": len(PROMPTS), "rows": 1000}
        self.loop.train(policy, reward, [Asked(p) for p in PROMPTS], self.options(**shared, **self.settings))
        return model


@dataclass(frozen=True)
class Trl:
    """A trainer of TRL, and what it is set to."""

    trainer: Any
    config: Any
    faithful: Any

    def __call__(self, model: Any, reward: Any, beta: float, seed: int, steps: int) -> Any:
        """The trained model; the reference is loaded from its files."""
        size = {"max_completion_length": LENGTH, "per_device_train_batch_size": len(PROMPTS) * GROUP}
        rate = {"learning_rate": RATE, "adam_beta2": 0.95, "max_steps": steps, "seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            enumerable.tokenizer(LETTERS).save_pretrained(folder)
            own = enumerable.Tabular.from_pretrained(folder)
            args = self.config(output_dir=folder, **PLAIN, **size, **rate, **self.faithful(beta, GROUP))
            data = Dataset.from_dict({"prompt": list(PROMPTS)})
            run = self.trainer(own, reward, args, train_dataset=data, processing_class=enumerable.tokenizer(LETTERS))
            run.remove_callback(PrinterCallback)
            run.train()
        return own


TRAINERS: dict[str, Any] = {
    "RLOO (TRL)": Trl(RLOOTrainer, RLOOConfig, rloo_settings),
    "PPO": Loop(ppo, PPOSettings, {"completions": GROUP * len(PROMPTS), "lr": RATE, "value_lr": 0.03, "epochs": 1}),
    "grpo_plain": Loop(grpo, GRPOSettings, {"completions": GROUP, "lr": RATE}),
    "GRPO (TRL)": Trl(GRPOTrainer, GRPOConfig, grpo_settings),
}
# GRPO's own optimum is another one.
EXACT = tuple(name for name in TRAINERS if name != "GRPO (TRL)")


def measured(here: World, values: np.ndarray, beta: float, got: np.ndarray) -> dict[str, Any]:
    """A policy's distance from the optimum at its beta, and its win rates beside the optimum's at its KL."""
    exact, kl = here.exact, here.exact.kl(got)
    ours, best = exact.win_rates(got), exact.win_rates(exact.at_kl(values, kl))
    missed = {name: best[name] - ours[name] for name in ours}
    start, there = exact.laws, exact.optimum(values, beta)
    distances = {"tv_before": exact.distance(start, there), "tv": exact.distance(got, there)}
    return {"beta": beta, "kl": kl, **distances, "win_rates": ours, "missed": missed}


def run(here: World, trainer: str, transform: str, seed: int, steps: int, kl: float | None = None) -> dict[str, Any]:
    """One case."""
    values = here.values(transform)
    beta = here.exact.beta(values, kl or KLS[transform])
    reward = CalibratedReward(here.scorer, here.table(), TRANSFORMS[transform])
    began = time.perf_counter()
    model = TRAINERS[trainer](here.model(), reward, beta, seed, steps)
    seconds = round(time.perf_counter() - began, 1)
    found = measured(here, values, beta, laws(model))
    return {"trainer": trainer, "transform": transform, "seed": seed, "steps": steps, **found, "seconds": seconds}


def told(row: dict[str, Any]) -> str:
    """A line of the table: distances, and what is missed of each win rate in points."""
    missed = " ".join(f"{100 * value:6.2f}" for value in row["missed"].values())
    numbers = f"{row['kl']:.3f} {row['tv']:.4f} {missed} {row['seconds']:5.0f}s"
    return f"{row['trainer']:<11} {row['transform']:<10} {row['seed']} {numbers}"


def far() -> None:
    """Worst of 4 farther from the reference, where beta is far below the spread of the rewards."""
    here, rows = World(), known("tabular_far")
    done = {(row["trainer"], row["asked"]) for row in rows}
    for trainer, kl in [(trainer, kl) for kl in (1.0, 0.5) for trainer in EXACT[1:]]:
        if (trainer, kl) not in done:
            rows.append({"asked": kl, **run(here, trainer, "worst of 4", 0, STEPS["worst of 4"], kl)})
            tqdm.write(told(rows[-1]), file=sys.stderr)
            save("tabular_far", rows)


def near(quick: bool, seeds: int) -> None:
    """Each trainer and transform."""
    cases = [(trainer, phi, seed, STEPS[phi]) for seed in range(seeds) for phi in TRANSFORMS for trainer in EXACT]
    cases += [("PPO", "-e^{-10u}", 0, 4000)]  # for which 1600 were too few
    cases += [("GRPO (TRL)", phi, 0, STEPS[phi]) for phi in TRANSFORMS]
    cases = [(trainer, "identity", 0, 20) for trainer in TRAINERS] if quick else cases
    here, rows = World(), [] if quick else known("tabular")
    done = {(row["trainer"], row["transform"], row["seed"], row["steps"]) for row in rows}
    for case in tqdm([each for each in cases if each not in done], delay=3, disable=None):
        rows.append(run(here, *case))
        tqdm.write(told(rows[-1]), file=sys.stderr)
        if not quick:
            save("tabular", rows)


def main() -> None:
    """All that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case each, 20 steps, nothing is kept")
    parser.add_argument("--far", action="store_true", help="farther from the reference: tabular_far.json")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if args.far:
        far()
    else:
        near(args.quick, args.seeds)


if __name__ == "__main__":
    main()
