"""What it saves to read once what several completions of a prompt begin with: in sampling, and in offline training.

    python benchmarks/shared_beginnings.py                 # a Llama of 4 layers, 256 wide, random weights; minutes
    python benchmarks/shared_beginnings.py --model FOLDER  # a checkpoint; it goes on from the demo's movie reviews

`HfSampler` draws completions that have begun alike as one row until they part. `GroupReader` reads the completions of a
prompt as a tree. Each is compared with itself without that: a sampler in which drafts part behind the prompt, and
`Route(trees=False)`. The sides take turns in one run; what counts is the median over the rounds of the ratio of
processor seconds. Both sides must give the same: tokens in sampling, log-probabilities but for rounding in reading.

How much is shared depends on the model: one that hardly knows how to go on has completions that soon differ. The share
of tokens that are read is given beside each ratio. Nothing ends a completion early.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from sampling import prompts_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from calibrated_rewards.cli.demo import reward_models
from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.samplers import generation
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import PromptGroup
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.losses import parse_loss
from calibrated_rewards.training.offline.routes import Route
from calibrated_rewards.training.offline.token_trees import grow_tree
from calibrated_rewards.training.offline.train import OfflineSettings, take_step
from calibrated_rewards.training.offline.trained_weights import TrainedWeights, build_optimizer, select_weights

from tiny import tokenizer  # isort: skip (`sampling` puts tests/ on the path)

# Prompts, completions of each, and tokens of each completion.
READING, SAMPLING = ["12,32,4"], ["12,32,4", "2,32,32"]
SIDES = ("merged", "apart")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model and its tokenizer, neither of which ends a completion."""
    if args.model:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        words: Any = AutoTokenizer.from_pretrained(args.model)
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
        config = LlamaConfig(vocab_size=8000, num_attention_heads=max(1, args.width // 64), **shape)
        model, words = LlamaForCausalLM(config).to(getattr(torch, args.dtype)), tokenizer()
        with torch.no_grad():
            model.lm_head.weight.normal_(std=4 / args.width**0.5)  # it prefers some tokens, as a trained model does
    words.eos_token = None
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval(), words


def choose_prompts(words: Any, args: argparse.Namespace, count: int) -> list[str]:
    """Choose the demo's prompts for a checkpoint, or else random letters of 12 tokens."""
    return reward_models.make_prompts(CACHE, count) if args.model else prompts_of(words, 12, count)


@contextmanager
def parted_at_once() -> Iterator[None]:
    """Let each draft have a row of its own from its first token on; the prompt is still read once for all."""
    merge = generation.Writer._part_ways

    def part(self: Any, rows: Any, places: Sequence[int], tokens: Sequence[int]) -> tuple[Any, list[int], Any]:
        if list(places) != list(range(len(rows.ids))):
            rows = self.reader.select(rows, list(places))
        return rows, list(range(len(places))), torch.tensor(tokens, device=rows.ids.device)

    generation.Writer._part_ways = part  # type: ignore[method-assign]
    try:
        yield
    finally:
        generation.Writer._part_ways = merge  # type: ignore[method-assign]


def time_in_turns(rounds: int, sides: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Measure the processor seconds of each side in each round; both have run before."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, do in sides.items():
            start = time.process_time()
            do()
            seconds[name].append(time.process_time() - start)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Give the medians of both sides, and that of their ratio."""
    ratios = [apart / merged for merged, apart in zip(*(seconds[side] for side in SIDES), strict=True)]
    medians = {side: round(statistics.median(own), 3) for side, own in seconds.items()}
    return {
        "seconds": medians,
        "times_faster": round(statistics.median(ratios), 3),
        "by_round": [round(each, 3) for each in ratios],
    }


def share_read(completions: Sequence[Sequence[list[int]]]) -> float:
    """Compute the share of tokens that are read where a beginning is read once: the last ones are not read."""
    nodes = sum(len(grow_tree(own).tokens) for own in completions)
    return nodes / max(1, sum(len(row) - 1 for own in completions for row in own))


def compare_sampling(model: Any, words: Any, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compare drawing completions as one row until they part with a row for each from the first token on."""
    count, k, tokens = map(int, case.split(","))
    prompts = choose_prompts(words, args, count)
    seeds = [list(range(k)) for _ in prompts]
    sampler = HfSampler(model, words, Decoding(tokens, temperature=args.temperature), show_progress=False)

    def draw_apart() -> Any:
        with parted_at_once():
            return sampler(prompts, seeds)

    drawn = {"merged": sampler(prompts, seeds), "apart": draw_apart()}
    texts = {side: [rollout.completion for own in rollouts for rollout in own] for side, rollouts in drawn.items()}
    alike = np.mean([one == other for one, other in zip(*texts.values(), strict=True)])
    assert alike > 0.9, f"the sides draw other completions, {alike:.2f} alike"  # rounding may change a draw
    sides = {"merged": lambda: sampler(prompts, seeds), "apart": draw_apart}
    return {"case": case, "alike": float(alike), **summarise(time_in_turns(args.rounds, sides))}


def draw_groups(model: Any, words: Any, case: str, args: argparse.Namespace) -> list[Group]:
    """Draw completions as tokens, by transformers."""
    count, k, tokens = map(int, case.split(","))
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "temperature": args.temperature, "max_new_tokens": tokens}
    groups = []
    for prompt in choose_prompts(words, args, count):
        ids = torch.tensor([words(prompt)["input_ids"]])
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=k, **options)
        groups.append(Group(ids[0].tolist(), rows[:, ids.shape[1] :].tolist()))
    return groups


def compare_reading(model: Any, words: Any, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compare trees with rows: reading all layers with the reference, and a training step on the last ones."""
    groups = draw_groups(model, words, case, args)
    model = select_weights(model, args.trained_layers, 0, 0).eval()
    readers = {
        side: GroupReader(model, args.temperature, route=Route(trees=side == "merged"), rows=len(groups[0].completions))
        for side in SIDES
    }
    known = {side: [*reader.record(groups)] for side, reader in readers.items()}
    assert readers["merged"].route.trees, "this model is not read as trees"
    apart = max(float((a - b).abs().max()) for (a, _), (b, _) in zip(known["merged"], known["apart"], strict=True))
    rewards = np.linspace(0, 1, len(groups[0].completions))
    pairs = [
        (
            PromptGroup(bytes([i]), str(i), group._replace(states=states), rewards, rewards, 0.1, 0.0, None),
            logprobs,
        )
        for i, (group, (logprobs, states)) in enumerate(zip(groups, known["apart"], strict=True))
    ]
    settings = OfflineSettings(loss="weighted", lr=1e-12)  # the weights stay, so that all rounds do the same
    weights = TrainedWeights.of(model)
    optimizer = build_optimizer(weights, settings.optimizer, settings.lr, 0.0)

    def step(side: str) -> None:
        take_step(readers[side], pairs, parse_loss(settings.loss), weights, optimizer, settings)

    for side in SIDES:
        step(side)
    record = {side: lambda side=side: [*readers[side].record(groups)] for side in SIDES}
    steps = {side: lambda side=side: step(side) for side in SIDES}
    return {
        "case": case,
        "share_of_tokens": round(share_read([group.completions for group in groups]), 3),
        "largest_difference_of_log_probabilities": apart,
        "record": summarise(time_in_turns(args.rounds, record)),
        "step": summarise(time_in_turns(args.rounds, steps)),
    }


def main() -> None:
    """Measure both ways on all cases, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder; without, a small Llama of random weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--layers", type=int, default=4, help="of the small Llama")
    parser.add_argument("--width", type=int, default=256, help="of the small Llama")
    parser.add_argument("--trained-layers", type=int, help="the last layers, which a step trains (a third)")
    parser.add_argument("--reading", nargs="*", default=READING, metavar="PROMPTS,K,TOKENS")
    parser.add_argument("--sampling", nargs="*", default=SAMPLING, metavar="PROMPTS,K,TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of small sizes, nothing is saved")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.reading, args.sampling = 1, ["2,8,3"], ["2,8,3"]
        args.layers, args.width = 2, 64
    torch.set_num_threads(1)
    model, words = load(args)
    args.trained_layers = args.trained_layers or max(1, model.config.num_hidden_layers // 3)
    found: dict[str, list[dict[str, Any]]] = {"reading": [], "sampling": []}
    for case in args.sampling:
        found["sampling"].append(row := compare_sampling(model, words, case, args))
        print(f"sampling {case}: {row['times_faster']:.2f}x", flush=True)
    for case in args.reading:
        found["reading"].append(row := compare_reading(model, words, case, args))
        ratios = ", ".join(f"{name} {row[name]['times_faster']:.2f}x" for name in ("record", "step"))
        print(f"reading {case}: {ratios}; {100 * row['share_of_tokens']:.0f} % of tokens are read", flush=True)
    if not args.quick:
        kind = Path(args.model).name if args.model else "small_llama"
        settings = {**vars(args), "model": kind, "trained_layers": args.trained_layers}
        print(save(f"shared_beginnings_{kind}", {**settings, **found}))


if __name__ == "__main__":
    main()
