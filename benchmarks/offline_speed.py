"""Offline training against TRL's SFTTrainer: rollouts per second and peak memory, on one CPU core.

    python benchmarks/offline_speed.py           # a Llama of 8 layers, 256 wide, float32, LoRA; minutes
    python benchmarks/offline_speed.py --quick   # one round, nothing is kept

Both train the same LoRA adapters on the same tokens with AdamW, without gradient checkpointing. TRL reads each prompt
with each completion, in batches of 8, its default, and updates after each; the offline loop reads a prompt once for its
completions. `shared` has 32 completions of 64 tokens for one prompt of 512, one step of the offline loop; `alone` has 8
prompts with one completion each, where nothing can be shared. Each measurement is a process of its own, the sides take
turns, and medians count. Seconds are of the processor: the machine may be shared. Memory is the peak of the process,
libraries and model included.

The bound of `shared` is the ratio of the tokens that are read: (512 + 64) 32 / (512 + 64 * 32) = 7.2.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

CASES = {"shared": {"prompts": 1, "completions": 32}, "alone": {"prompts": 8, "completions": 1}}
PROMPT, COMPLETION, VOCABULARY = 512, 64, 8192
SIDES = ("offline", "trl")
RANK, BATCH = 16, 8
# The first step is slower, and is not counted.
STEPS = 1 + 2


def build_model() -> Any:
    """Build the Llama that is trained, from its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config)


def draw_groups(prompts: int, completions: int) -> list[tuple[list[int], list[list[int]]]]:
    """Draw random tokens for prompts and completions."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(n: int) -> list[int]:
        return [int(token) for token in rng.integers(3, VOCABULARY, n)]

    return [(draw(PROMPT), [draw(COMPLETION) for _ in range(completions)]) for _ in range(prompts)]


def time_offline(case: dict[str, int]) -> list[float]:
    """Measure the processor seconds of each step of the offline loop."""
    import numpy as np
    import torch

    from calibrated_rewards.training.offline.group_batches import Group
    from calibrated_rewards.training.offline.groups import PromptGroup
    from calibrated_rewards.training.offline.log_probabilities import GroupReader
    from calibrated_rewards.training.offline.losses import parse_loss
    from calibrated_rewards.training.offline.train import OfflineSettings, take_step
    from calibrated_rewards.training.offline.trained_weights import TrainedWeights, build_optimizer, select_weights

    model = select_weights(build_model(), 0, RANK, 0).eval()
    settings = OfflineSettings(loss="weighted", optimizer="adamw", lr=1e-4, lora_rank=RANK)
    weights, reader = TrainedWeights.of(model), GroupReader(model)
    optimizer = build_optimizer(weights, "adamw", settings.lr, 0.0)
    groups = []
    for at, (prompt, completions) in enumerate(draw_groups(**case)):
        rewards = np.zeros(len(completions))
        own = PromptGroup(bytes([at]), str(at), Group(prompt, completions), rewards, rewards, 1.0, 0.0, None)
        groups.append((own, torch.zeros(len(completions))))
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        take_step(reader, groups, parse_loss(settings.loss), weights, optimizer, settings)
        seconds.append(time.process_time() - start)
    return seconds


def time_trl(case: dict[str, int]) -> list[float]:
    """Measure the processor seconds of each step of TRL's SFTTrainer, on rows that are tokens already."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from calibrated_rewards.models.adapters import build_lora_config

    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Times a step from its begin to its end, the optimizer's update included."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time() - self.start)

    rows = [
        {"input_ids": prompt + each, "labels": [-100] * PROMPT + each}
        for prompt, completions in draw_groups(**case)
        for each in completions
    ]
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1")
    model = build_model()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=build_lora_config(model, RANK),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def measure(side: str, case: str) -> dict[str, float]:
    """Measure one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--case", case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} {case}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, rounds: int) -> dict[str, Any]:
    """Compare both sides, which take turns, by their medians."""
    sides: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            sides[side].append(measure(side, case))
            sys.stderr.write(f"{case} {side}: {sides[side][-1]}\n")
    medians = {
        side: {name: round(statistics.median(each[name] for each in found), 3) for name in found[0]}
        for side, found in sides.items()
    }
    ours, theirs = medians["offline"], medians["trl"]
    rows = {"prompts": CASES[case]["prompts"], "completions": CASES[case]["completions"]}
    read = rows["prompts"] * (PROMPT + COMPLETION * rows["completions"])
    bound = (PROMPT + COMPLETION) * rows["prompts"] * rows["completions"] / read
    speedup = ours["rollouts_per_second"] / theirs["rollouts_per_second"]
    return {
        **rows,
        **medians,
        "speedup": round(speedup, 2),
        "token_ratio_bound": round(bound, 2),
        "share_of_bound": round(speedup / bound, 2),
        "memory_ratio": round(ours["peak_mb"] / theirs["peak_mb"], 2),
        "rounds": {side: [each["rollouts_per_second"] for each in found] for side, found in sides.items()},
    }


def main() -> None:
    """Measure both cases and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, nothing is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        case = CASES[args.case]
        seconds = (time_offline if args.side == "offline" else time_trl)(case)[1:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = BATCH if args.side == "trl" else case["prompts"] * case["completions"]
        pace = size / statistics.median(seconds)
        print(json.dumps({"rollouts_per_second": round(pace, 3), "peak_mb": round(peak)}))
        return
    results = {case: compare(case, 1 if args.quick else args.rounds) for case in CASES}
    for case, found in results.items():
        print(case, json.dumps(found, indent=1))
    if not args.quick:
        shape = {"prompt": PROMPT, "completion": COMPLETION, "lora_rank": RANK, "trl_batch": BATCH, "dtype": "float32"}
        save_results({"settings": shape, **results})


def save_results(results: dict[str, Any]) -> None:
    """Save the numbers as a result of the benchmark."""
    from environment import save

    save("offline_speed", results)


if __name__ == "__main__":
    main()
