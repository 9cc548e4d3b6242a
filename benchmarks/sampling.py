"""What sampling costs: K completions of a prompt by `HfSampler`, against `generate(num_return_sequences=K)`.

    python benchmarks/sampling.py                        # a Llama of 4 layers, 256 wide, float32, one thread; minutes
    python benchmarks/sampling.py --model SmolLM2-135M   # a checkpoint: its folder, in its own precision
    python benchmarks/sampling.py --device cuda --dtype bfloat16 --layers 16 --width 2048 --cases 512,256,128

The sides take turns in one run. What counts is the median over the rounds of the ratio within a round; the same is
given for the processor's time, which is less disturbed by what else a machine does. All write as many tokens: nothing
ends a completion early. `generate` is also given the one repair that is easily made from outside, an output layer that
reads from one piece of memory, to show what of the difference that is. On a GPU there is transformers' continuous
batching too, and several prompts at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from scoring import seconds, text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from calibrated_rewards.samplers.continuous import ContinuousSampler
from calibrated_rewards.samplers.generation import contiguous_input
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tokenizer

# Tokens of the prompt, completions, and tokens of each.
OF_A_CHECKPOINT = ["40,100,20", "10,100,20"]
OF_A_SMALL_LLAMA = ["512,32,32", "64,32,32", "64,100,32"]


def small_llama(args: argparse.Namespace) -> Any:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer, neither of which ends a completion."""
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device).eval()
        words = AutoTokenizer.from_pretrained(args.model)
    else:
        model, words = small_llama(args), tokenizer()
    words.eos_token = None
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model, words


def prompts_of(words: Any, tokens: int, number: int) -> list[str]:
    """Prompts of so many tokens, by this tokenizer."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        # Text of random letters, cut where the tokens suffice.
        letters = text(rng, 4 * tokens)
        ids = words(letters, add_special_tokens=False)["input_ids"]
        room = tokens - (len(words("a")["input_ids"]) - len(words("a", add_special_tokens=False)["input_ids"]))
        found.append(words.decode(ids[:room]))
    return found


def in_rounds(rounds: int, sides: dict[str, Callable[[], Any]]) -> dict[str, list[tuple[float, float]]]:
    """The seconds of each side in each round, after one unmeasured: by the clock, and of the processor."""

    def both(side: Callable[[], Any]) -> tuple[float, float]:
        start = time.process_time()
        return seconds(side), time.process_time() - start

    times = [{name: both(side) for name, side in sides.items()} for _ in range(rounds + 1)][1:]
    return {name: [row[name] for row in times] for name in sides}


def faster(times: dict[str, list[tuple[float, float]]], which: int) -> dict[str, list[float]]:
    """How many times faster than plain `generate` each side is, round by round."""
    base = [row[which] for row in times["generate"]]
    return {name: [a / row[which] for a, row in zip(base, own, strict=True)] for name, own in times.items()}


def compared(model: Any, words: Any, case: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """One case: seconds of each side, and how much faster than plain `generate` it is."""
    length, k, new = case
    prompts = prompts_of(words, length, args.prompts)
    seeds = [list(range(k)) for _ in prompts]
    sampler = HfSampler(model, words, Decoding(new), show_progress=False)
    assert {rollout.tokens for own in sampler(prompts, seeds) for rollout in own} == {new}

    def plain() -> None:
        for prompt in prompts:
            ids = torch.tensor([words(prompt)["input_ids"]], device=model.device)
            mask = torch.ones_like(ids)
            options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "num_return_sequences": k}
            words.batch_decode(model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :])

    def repaired() -> None:
        with contiguous_input(model):
            plain()

    sides = {"generate": plain, "generate_repaired": repaired, "sampler": lambda: sampler(prompts, seeds)}
    if args.device != "cpu":
        engine = ContinuousSampler(model, words, Decoding(new), batching={"max_memory_percent": 0.5})
        alone = HfSampler(model, words, Decoding(new), prompts_at_once=1, show_progress=False)
        sides |= {
            "sampler_prompt_by_prompt": lambda: alone(prompts, seeds),
            "continuous": lambda: engine(prompts, seeds),
        }
    times = in_rounds(args.rounds, sides)
    clock = {name: statistics.median(row[0] for row in own) for name, own in times.items()}
    return {
        "prompt": len(words(prompts[0])["input_ids"]),
        "k": k,
        "new": new,
        "prompts": len(prompts),
        "seconds": clock,
        "tokens_per_second": {name: len(prompts) * k * new / own for name, own in clock.items()},
        "times_faster": {name: statistics.median(own) for name, own in faster(times, 0).items()},
        "times_faster_by_round": faster(times, 0)["sampler"],
        "times_faster_by_processor_time": {name: statistics.median(own) for name, own in faster(times, 1).items()},
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder; without, a small Llama of random weights")
    parser.add_argument("--cases", nargs="*", help="PROMPT,K,NEW ... (tokens of a prompt, completions, their tokens)")
    parser.add_argument("--prompts", type=int, default=1, help="prompts in a call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the small Llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the first case, two rounds, nothing saved")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, words = loaded(args)
    named = args.cases or (OF_A_CHECKPOINT if args.model else OF_A_SMALL_LLAMA)
    if args.quick:
        named, args.rounds = named[:1], 2
    found = []
    print("prompt    K  new  " + "times faster than generate (tokens/s)")
    for name in named:
        length, k, new = map(int, name.split(","))
        found.append(row := compared(model, words, (length, k, new), args))
        speeds = [f"{n} {row['times_faster'][n]:.2f}x ({v:.0f})" for n, v in row["tokens_per_second"].items()]
        cpu = row["times_faster_by_processor_time"]["sampler"]
        print(f"{row['prompt']:6d} {k:4d} {new:4d}  " + "  ".join(speeds) + f"  (processor: {cpu:.2f}x)", flush=True)
    if not args.quick:
        kind = Path(args.model).name if args.model else "small_llama"
        told = {**vars(args), "model": kind, "dtype": str(model.dtype).removeprefix("torch.")}
        print(save(f"sampling_{kind}_{args.device}_{told['dtype']}", {**told, "cases": found}))


if __name__ == "__main__":
    main()
