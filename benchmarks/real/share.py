"""What share of a training run calibration is: both measured here, on one machine with one policy and one reward model.

    python benchmarks/real/share.py    # minutes

Measured: the seconds of processor time that a completion takes in `calibrate` (drawn, scored, tabulated; K = 100), and
in TRL's RLOOTrainer with the table as its reward (drawn, scored, looked up, log-probabilities of policy and reference,
forward and backward, optimizer; all weights in bfloat16). Arithmetic: the shares, for other K, epochs and completions a
prompt, from those seconds. The paper's 29 % counts neither's drawing: 100 forward passes to calibrate a prompt against
80 epochs of one completion, forward and backward at 1 : 2. Writes benchmarks/results/real_share.json.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from policy import DECODING, policy, sampler
from reward_models import load
from transformers import AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from watch import Watch, Watched

from calibrated_rewards.cli.demo.assets import CACHE, fetch_language_model
from calibrated_rewards.cli.demo.reward_models import make_prompts, train_reward_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.scorers.protocol import score
from calibrated_rewards.table.reference_table import ReferenceTable

K, PROMPTS = 100, 12
GROUP, ROWS, STEPS = 8, 32, 5
# Epochs and completions a prompt and epoch: the paper's, and what is usual.
RUNS = [(80, 1), (1, 4), (1, 8), (1, 16), (2, 8), (4, 8), (4, 16)]


@dataclass(frozen=True)
class Reward:
    """The calibrated reward as TRL calls it: scores, then their quantiles among the prompt's references."""

    table: ReferenceTable
    scorer: Any
    watch: Watch

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """One number in [0, 1] for each completion."""
        with self.watch("scoring"):
            scores = score(self.scorer, prompts, completions)
        with self.watch("look-up"):
            return EmpiricalCDF()(self.table, self.table.rows(prompts), scores).tolist()


class Timed(RLOOTrainer):
    """TRL's trainer by the watch; what it measures does not overlap."""

    def __init__(self, watch: Watch, **options: Any) -> None:
        self.watch = watch
        super().__init__(**options)
        for model in (self.model, self.ref_model):
            # On a CPU, a slice that is not contiguous makes this product in bfloat16 many times slower.
            model.lm_head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))

    def _generate(self, *given: Any) -> Any:
        with self.watch("drawing"):
            return super()._generate(*given)

    def _get_per_token_logps_and_entropies(self, model: Any, *given: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *given, **options)
        with self.watch("log-probabilities"):
            return super()._get_per_token_logps_and_entropies(model, *given, **options)


@dataclass(frozen=True)
class FromSecondStep(TrainerCallback):
    """Starts the watch after the first step, which takes longer."""

    watch: Watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        if state.global_step == 1:
            self.watch.restart()


def calibration(cache: Path, scorer: Any) -> tuple[ReferenceTable, dict[str, float]]:
    """A table of all prompts, and the seconds that a completion took, by part."""
    asked, draw, watch = make_prompts(cache, PROMPTS), sampler(cache), Watch()
    draw(asked[:1], [list(range(8))])  # the first call of a process takes longer
    watch.restart()
    table = calibrate(asked, Watched(draw, watch, "drawing"), Watched(scorer, watch, "scoring"), k=K)
    return table, per_completion(watch.parts("table"), PROMPTS * K)


def training(cache: Path, table: ReferenceTable, scorer: Any) -> dict[str, float]:
    """The seconds that a completion takes in training, by part; the first step is not counted."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as out:
        trainer = Timed(
            watch,
            model=policy(cache),
            reward_funcs=Reward(table, scorer, watch),
            args=settings(out),
            train_dataset=Dataset.from_dict({"prompt": make_prompts(cache, PROMPTS)}),
            processing_class=AutoTokenizer.from_pretrained(fetch_language_model(cache), padding_side="left"),
            callbacks=[FromSecondStep(watch)],
        )
        trainer.train()
        return per_completion(watch.parts("forward, backward, optimizer"), (STEPS - 1) * ROWS)


def per_completion(seconds: dict[str, float], completions: int) -> dict[str, float]:
    """Seconds a completion by part."""
    return {name: value / completions for name, value in seconds.items()}


def settings(out: str) -> RLOOConfig:
    """The trainer's settings whose optimum is the KL-regularised one, with the calibration's decoding."""
    return RLOOConfig(
        out,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=DECODING.max_tokens,
        temperature=DECODING.temperature,
        beta=0.05,
        learning_rate=1e-5,
        max_steps=STEPS,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # the weights are
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=STEPS,
        seed=0,
    )


def shares(calibrating: dict[str, float], training: dict[str, float]) -> list[dict[str, float]]:
    """Calibration's share of a whole run by seconds a completion: with everything, and without drawing in either."""
    rows = []
    for k in (K, 32, 16):
        for epochs, group in RUNS:
            row: dict[str, float] = {"k": k, "epochs": epochs, "completions": group}
            for name, left_out in (("share", 0.0), ("share_without_drawing", 1.0)):
                once = k * (calibrating["all"] - left_out * calibrating["drawing"])
                then = epochs * group * (training["all"] - left_out * training["drawing"])
                row[name] = once / (once + then)
            rows.append(row)
    return rows


def as_the_paper_counts(training: dict[str, float]) -> dict[str, float]:
    """The share of 100 forward passes a prompt against 80 epochs of one completion, forward and backward.

    By the paper's 1 : 2; by the seconds measured, a forward pass being half of the two that give log-probabilities;
    and by passes, if drawing, scoring and the reference are one each: 100 x 2 against 80 x 6, which is the same 29 %.
    """
    k, epochs = 100, 80
    forward, both = training["log-probabilities"] / 2, training["forward, backward, optimizer"]
    return {
        "by the paper's ratio": k / (k + epochs * 3),
        "by seconds measured": k * forward / (k * forward + epochs * both),
        "by passes, with drawing, scoring and the reference": k * 2 / (k * 2 + epochs * 6),
    }


def main() -> None:
    """Measure both, and do the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    cache = parser.parse_args().cache
    scorer = load(train_reward_model(cache), show_progress=False)
    table, calibrating = calibration(cache, scorer)
    print("calibration, ms a completion:", {name: round(1e3 * value, 2) for name, value in calibrating.items()})
    trained = training(cache, table, scorer)
    print("training, ms a completion:   ", {name: round(1e3 * value, 2) for name, value in trained.items()})
    rows = shares(calibrating, trained)
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    results = {
        "prompts": PROMPTS,
        "k": K,
        "steps": STEPS,
        "completions_a_step": ROWS,
        "completions_a_prompt": GROUP,
        "tokens": DECODING.max_tokens,
        "threads": torch.get_num_threads(),
        "processor_seconds_a_completion": {"calibration": calibrating, "training": trained},
        "shares": rows,
        "as_the_paper_counts": as_the_paper_counts(trained),
    }
    print(save("real_share", results))


if __name__ == "__main__":
    main()
