"""What the scores of a preference head cost: from the pass that writes, against a forward of their own.

    python benchmarks/head_scoring.py                              # a Llama of 4 layers, 256 wide, float32, one thread
    python benchmarks/head_scoring.py --model SmolLM2-135M-Instruct    # a checkpoint: its folder, in its own precision
    python benchmarks/head_scoring.py --model SmolLM2-135M-Instruct --dtype float32    # for CPUs without bfloat16
    python benchmarks/head_scoring.py --device cuda --dtype bfloat16 --layers 16 --width 2048 --cases 16,64,256

Three sides take turns in one run, on the same prompts and seeds: completions alone; completions by a sampler that has
the head's scorer, and then their scores; completions alone, and then their scores by a forward of their own. What
counts is the median over the rounds of the ratio to the completions alone within a round, by the clock and by the
processor's time. On a busy machine rounds differ by more than what is measured: `extra_work` is measured within each
run of the second side, as the processor's time of all that is done for the scores over that of the rest.

`share_free` is the share of completions that had their score from the pass: for others a forward is run, and that is in
the time. `share_as_drawn` is the share whose text makes the tokens that were drawn: of others some tokens are read
again. `farthest` is the largest difference of the two ways, in standard deviations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from environment import save
from sampling import in_rounds, small_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from calibrated_rewards.heads import HeadedModel
from calibrated_rewards.samplers.generation import Reader
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.samplers.turn_ends import TurnEnds, Turns
from calibrated_rewards.scorers.preference_head import PreferenceHeadScorer

# What is done for scores: steps to the end of a turn, tokens that are read again, and what belongs to it.
TIMED = (
    (Reader, "next"),
    (Reader, "read_others"),
    (Turns, "begin"),
    (TurnEnds, "keep"),
    (PreferenceHeadScorer, "_scores"),
)
# Prompts, completions of each, tokens of each.
CASES = ["1,16,64", "1,16,128"]
QUESTIONS = [
    "Why is the sky blue?", "Name three rivers of Europe.", "How do I boil an egg?", "Write a line about autumn.",
    "What is a prime number?", "Who wrote Hamlet?", "Give me a tip for sleeping well.", "Explain rain to a child.",
]  # fmt: skip


def words_of_32000() -> Any:
    """A tokenizer of 32,000 words: any tokens, joined by spaces, make the same tokens again."""
    names = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(31_995))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(names[:5])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=names[3:5],
    )
    made.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return made


def loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype or "auto").to(args.device).eval()
        return model, AutoTokenizer.from_pretrained(args.model)
    args.dtype = args.dtype or "float32"
    return small_llama(args), words_of_32000()


def prompts_of(args: argparse.Namespace, number: int) -> list[Any]:
    """Chats of one message: questions, or words."""
    rng = np.random.default_rng(0)
    texts = QUESTIONS if args.model else [" ".join(f"w{i}" for i in rng.integers(0, 31_995, 32)) for _ in range(number)]
    return [[{"role": "user", "content": texts[i % len(texts)]}] for i in range(number)]


def find_as_drawn(words: Any, rollouts: list[list[Any]]) -> list[list[bool]]:
    """Find the completions whose text makes as many tokens as were drawn."""
    made = [[words(each.completion, add_special_tokens=False)["input_ids"] for each in own] for own in rollouts]
    return [
        [len(ids) + (each.finish == "stop") == each.tokens for ids, each in zip(*both, strict=True)]
        for both in zip(made, rollouts, strict=True)
    ]


@dataclass
class ExtraWork:
    """Processor's time of what is done for scores alone; of a step that others need too, the share of its rows."""

    end: int
    seconds: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], Any]) -> float:
        """Run a sampler and its scorer; return the time of the extra work over that of the rest."""
        self.seconds.clear()
        start = time.process_time()
        with ExitStack() as patched:
            for owner, name in TIMED:
                patched.enter_context(mock.patch.object(owner, name, self.time(getattr(owner, name))))
            work()
        whole, extra = time.process_time() - start, sum(self.seconds)
        return extra / (whole - extra)

    def time(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Make a method that is timed."""

        def timed(*given: Any) -> Any:
            start = time.process_time()
            answer = call(*given)
            part = self.share(*given) if call.__name__ == "next" else 1.0
            self.seconds.append(part * (time.process_time() - start))
            return answer

        return timed

    def share(self, _reader: Any, _rows: Any, tokens: torch.Tensor, states: int = 0, going_on: bool = True) -> float:
        """The share of a step's rows that are read for their scores."""
        if not states:
            return 0.0
        return float((tokens[:, 0] == self.end).float().mean()) if going_on else 1.0


def compared(model: Any, words: Any, case: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """One case: seconds of each side, and its ratio to the completions alone."""
    number, k, new = case
    prompts, decoding, options = prompts_of(args, number), Decoding(new, args.temperature), {"show_progress": False}
    plain = HfSampler(model, words, decoding, **options)
    seeds = [list(range(k))] * number
    if args.as_drawn:
        more = [list(range(2 * k))] * number
        seeds = [[i for i, own in enumerate(each) if own][:k] for each in find_as_drawn(words, plain(prompts, more))]
    headed = HeadedModel.build(model, words, pooler=args.pooler)
    free, apart = (PreferenceHeadScorer(headed, show_progress=False) for _ in range(2))
    with_head = HfSampler(model, words, decoding, scorer=free, **options)
    pairs = [prompt for prompt, own in zip(prompts, seeds, strict=True) for _ in own]

    def score(sampler: Any, scorer: Any) -> np.ndarray:
        return scorer(pairs, [rollout.completion for own in sampler(prompts, seeds) for rollout in own])

    sides = {
        "completions": lambda: plain(prompts, seeds),
        "scored_in_the_pass": lambda: score(with_head, free),
        "scored_apart": lambda: score(plain, apart),
    }
    times = in_rounds(args.rounds, sides)
    extra = ExtraWork(int(headed.turn_end.id))
    extra_work = [extra.run(sides["scored_in_the_pass"]) for _ in range(args.rounds)]
    used = free.memory.used
    scores, expected = score(with_head, free), score(plain, apart)
    as_drawn = [each for own in find_as_drawn(words, plain(prompts, seeds)) for each in own]
    ratios = {
        name: [[row[at] / alone[at] for row, alone in zip(own, times["completions"], strict=True)] for at in (0, 1)]
        for name, own in times.items()
    }
    return {
        "prompts": number,
        "k": k,
        "new": new,
        "seconds": {name: statistics.median(row[0] for row in own) for name, own in times.items()},
        "cost_by_clock": {name: statistics.median(own[0]) - 1 for name, own in ratios.items()},
        "cost_by_processor_time": {name: statistics.median(own[1]) - 1 for name, own in ratios.items()},
        "cost_by_round": {name: [x - 1 for x in own[1]] for name, own in ratios.items()},
        "extra_work": statistics.median(extra_work),
        "extra_work_by_round": extra_work,
        "share_as_drawn": float(np.mean(as_drawn)),
        "share_free": (free.memory.used - used) / len(pairs),
        "farthest": float(np.abs(scores - expected).max() / expected.std()),
    }


def main() -> None:
    """Measure what scoring costs, print it, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder; without, a small Llama of random weights")
    parser.add_argument("--cases", nargs="*", default=CASES, help="PROMPTS,K,NEW ...")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--as-drawn", action="store_true", help="only completions whose text makes the tokens drawn")
    parser.add_argument("--pooler", default="tanh")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="by default the checkpoint's own, and float32 for the small Llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small case, two rounds, nothing saved")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, words = loaded(args)
    cases, args.rounds = (["2,4,16"], 2) if args.quick else (args.cases, args.rounds)
    found = []
    print("prompts   K  new  cost over completions alone, by the clock (processor's time)")
    for name in cases:
        number, k, new = map(int, name.split(","))
        found.append(row := compared(model, words, (number, k, new), args))
        costs = [
            f"{side} {row['cost_by_clock'][side]:+.1%} ({row['cost_by_processor_time'][side]:+.1%})"
            for side in ("scored_in_the_pass", "scored_apart")
        ]
        print(
            f"{number:7d} {k:3d} {new:4d}  {'  '.join(costs)}  free {row['share_free']:.0%}, "
            f"as drawn {row['share_as_drawn']:.0%}, extra work {row['extra_work']:.1%}, "
            f"apart by {row['farthest']:.0e} sd",
            flush=True,
        )
    if not args.quick:
        kind = Path(args.model).name if args.model else "small_llama"
        told = {**vars(args), "model": kind, "dtype": str(model.dtype).removeprefix("torch.")}
        name = f"head_scoring_{kind}_{args.device}_{told['dtype']}"
        name += ("_as_drawn" if args.as_drawn else "") + (f"_{args.temperature}" if args.temperature != 1 else "")
        print(save(name, {**told, "cases": found}))


if __name__ == "__main__":
    sys.exit(main())
