"""Training a preference head against TRL's RewardTrainer: tokens per second and peak memory, on one CPU core.

    python benchmarks/head_speed.py           # a Llama of 8 layers, 256 wide, float32; some ten minutes
    python benchmarks/head_speed.py --quick   # one round, nothing is kept

Both sides train the same backbone on the same pairs of tokens in batches of 8 pairs with AdamW, without activation
checkpointing: all weights, LoRA adapters of rank 16, or the head alone. `packed` is the head with texts packed into
rows of 512 tokens. Tokens are those of the pairs, without padding. Of `frozen`, three epochs are measured as a whole:
the head reads its backbone once, RewardTrainer in each epoch. Each measurement is a process of its own, the sides take
turns, and medians count. Seconds are of the processor: the machine may be shared.
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
from pathlib import Path
from typing import Any

CASES = {"full": ("head", "packed", "trl"), "lora": ("head", "packed", "trl"), "frozen": ("head", "trl")}
VOCABULARY, BATCH, RANK, WINDOW, EPOCHS = 8192, 8, 16, 512, 3
# Tokens of a text: their median, and the standard deviation of their logarithm.
MEDIAN, SPREAD, LEAST, MOST = 120, 0.5, 16, 480
# The first step is slower, and is not counted.
STEPS = 1 + 3
FROZEN_PAIRS = 32


def build_config() -> Any:
    """Build the config of the backbone."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        num_labels=1,
    )


def build_tokenizer() -> Any:
    """Build a tokenizer of one word a token; its texts are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1")


def draw_pairs(count: int) -> list[tuple[list[int], list[int]]]:
    """Draw the tokens of pairs: texts of many lengths, which end in EOS."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.clip(MEDIAN * np.exp(SPREAD * rng.standard_normal((count, 2))), LEAST, MOST).astype(int)
    draw = [[[*rng.integers(3, VOCABULARY, n - 1).tolist(), 1] for n in pair] for pair in lengths.tolist()]
    return [(chosen, rejected) for chosen, rejected in draw]


def build_arguments(kind: Any, folder: str, steps: int, **options: Any) -> Any:
    """Make the arguments that both sides have in common."""
    return kind(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        activation_checkpointing=False,
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def build_clock(seconds: list[float]) -> Any:
    """Make a callback that times steps from begin to end, the optimiser's update included."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times each step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Start the clock of a training step."""
            self.start = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Keep the processor seconds of the training step."""
            seconds.append(time.process_time() - self.start)

    return Clock()


def run_head(case: str, packed: bool) -> tuple[list[float], float]:
    """Train a preference head; return the seconds of the steps, and of all."""
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM, TrainingArguments

    from calibrated_rewards.heads import (
        EncodedPair,
        HeadedModel,
        HeadLoss,
        JointLoss,
        PreferenceHeadTrainer,
        cache_states,
    )

    torch.manual_seed(0)
    model = LlamaForCausalLM(build_config())
    headed = HeadedModel.build(model, build_tokenizer(), backbone=case, rank=RANK)
    count, steps = (FROZEN_PAIRS, EPOCHS * FROZEN_PAIRS // BATCH) if case == "frozen" else (STEPS * BATCH, STEPS)
    pairs = [EncodedPair(chosen, rejected) for chosen, rejected in draw_pairs(count)]
    seconds: list[float] = []
    start = time.process_time()
    if case == "frozen":
        pairs = cache_states(headed, pairs, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceHeadTrainer(
            headed,
            build_arguments(TrainingArguments, folder, steps),
            pairs,
            order=np.arange(steps * BATCH) % count,
            loss=JointLoss(HeadLoss("contrastive", smoothing=0.0)),
            window=WINDOW if packed else 0,
            callbacks=[build_clock(seconds)],
        )
        trainer.train()
    return seconds, time.process_time() - start


def run_trl(case: str) -> tuple[list[float], float]:
    """Train TRL's reward model; return the seconds of the steps, and of all."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(build_config())
    count, steps = (FROZEN_PAIRS, EPOCHS * FROZEN_PAIRS // BATCH) if case == "frozen" else (STEPS * BATCH, STEPS)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="SEQ_CLS")
    if case == "frozen":
        model.model.requires_grad_(False)
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in draw_pairs(count)]
    seconds: list[float] = []
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=build_arguments(RewardConfig, folder, steps, max_length=None),
            train_dataset=Dataset.from_list(rows),
            processing_class=build_tokenizer(),
            peft_config=adapter if case == "lora" else None,
            callbacks=[build_clock(seconds)],
        )
        trainer.train()
    return seconds, time.process_time() - start


def measure_here(case: str, side: str) -> dict[str, float]:
    """Measure one side in this process: tokens per second by the median step, or by the whole of three epochs."""
    import torch

    torch.set_num_threads(1)
    seconds, whole = run_trl(case) if side == "trl" else run_head(case, side == "packed")
    if case == "frozen":
        tokens = EPOCHS * sum(len(chosen) + len(rejected) for chosen, rejected in draw_pairs(FROZEN_PAIRS))
        pace = tokens / whole
    else:
        pairs = draw_pairs(STEPS * BATCH)
        steps = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
        paces = [sum(len(a) + len(b) for a, b in step) / each for step, each in zip(steps, seconds, strict=True)]
        pace = statistics.median(paces[1:])
    return {"tokens_per_second": round(pace, 1), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def measure(case: str, side: str) -> dict[str, float]:
    """Measure one side in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--side", side]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} {side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, rounds: int) -> dict[str, Any]:
    """Compare the sides, which take turns, by their medians."""
    sides: dict[str, list[dict[str, float]]] = {side: [] for side in CASES[case]}
    for _ in range(rounds):
        for side, numbers in sides.items():
            numbers.append(measure(case, side))
            sys.stderr.write(f"{case} {side}: {numbers[-1]}\n")
    medians = {
        side: {name: statistics.median(each[name] for each in numbers) for name in numbers[0]}
        for side, numbers in sides.items()
    }
    paces = {side: numbers["tokens_per_second"] for side, numbers in medians.items()}
    return {
        **medians,
        "ratio_to_trl": {side: round(pace / paces["trl"], 2) for side, pace in paces.items() if side != "trl"},
        "rounds": {side: [each["tokens_per_second"] for each in numbers] for side, numbers in sides.items()},
    }


def main() -> None:
    """Measure all cases and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, nothing is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[*CASES], help="measure these, and keep the others"
    )
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("head", "packed", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_here(args.case, args.side)))
        return
    results = {case: compare(case, 1 if args.quick else args.rounds) for case in args.cases}
    print(json.dumps(results, indent=1))
    if not args.quick:
        save_results(results)


def save_results(results: dict[str, Any]) -> None:
    """Save the numbers as a result of the benchmark, beside those of cases that were not measured now."""
    from environment import save

    file = Path(__file__).parent / "results" / "head_speed.json"
    before = json.loads(file.read_text())["results"] if file.exists() else {}
    settings = {"pairs_a_batch": BATCH, "median_tokens": MEDIAN, "lora_rank": RANK, "window": WINDOW}
    save("head_speed", {**before, "settings": {**settings, "epochs_of_frozen": EPOCHS, "dtype": "float32"}, **results})


if __name__ == "__main__":
    main()
