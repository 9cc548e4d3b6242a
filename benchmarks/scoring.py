"""What scoring costs: prefix sharing, the library around a bare forward, and the check that padding does no harm.

    python benchmarks/scoring.py             # a Llama classifier of 4 layers, 256 wide, float32, one thread; minutes
    python benchmarks/scoring.py --quick     # a look at the two cases with a bar
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --layers 16 --width 2048

Both sides of a ratio take turns in one run, and the median of the rounds counts. The model is random, built from its
config; texts are random letters, one token each. Differences are in standard deviations of the scores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from calibrated_rewards.models.batches import Budget, Comparison
from calibrated_rewards.models.parts import default_budget, pad_right
from calibrated_rewards.scorers.classifiers import SequenceClassifier

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tokenizer

# Tokens of the prompt, of each response, and responses a prompt. The first two have a bar.
CASES = [(512, 64, 100), (64, 64, 16), (512, 64, 16), (512, 256, 32), (1024, 64, 16), (128, 128, 16)]


def model_of(args: argparse.Namespace) -> Any:
    """A Llama classifier whose scores spread."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=4096,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).to(args.device, getattr(torch, args.dtype)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def text(rng: np.random.Generator, tokens: int) -> str:
    """Random letters: as many tokens."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), tokens))


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, with the GPU's queue empty at both ends."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def in_turns(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """The median seconds of each side, after one unmeasured round."""
    times = [[seconds(side) for side in sides] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def sharing(model: Any, case: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """One prompt's responses, with its cache shared and without."""
    prompt_tokens, response_tokens, k = case
    rng = np.random.default_rng(0)
    prompts = [text(rng, prompt_tokens - 1)] * k  # and BOS
    completions = [text(rng, response_tokens) for _ in range(k)]
    plain = SequenceClassifier(model, tokenizer(), share_prefixes=False)
    shared = SequenceClassifier(model, tokenizer())
    seconds_plain, seconds_shared = in_turns(
        rounds, lambda: plain(prompts, completions), lambda: shared(prompts, completions)
    )
    a, b = plain(prompts, completions), shared(prompts, completions)
    bound = (prompt_tokens + response_tokens) * k / (prompt_tokens + response_tokens * k)
    return {
        "prompt": prompt_tokens,
        "response": response_tokens,
        "k": k,
        "plain_s": seconds_plain,
        "shared_s": seconds_shared,
        "times_faster": seconds_plain / seconds_shared,
        "token_ratio": bound,
        "of_the_bound": seconds_plain / seconds_shared / bound,
        "largest_difference_sd": float(np.abs(a - b).max() / a.std()),
    }


def overhead(model: Any, rounds: int, inputs: int = 128) -> dict[str, Any]:
    """Scoring texts of many lengths, tokenisation and all, against the model's forward on the same padded batches."""
    rng = np.random.default_rng(1)
    prompts = [text(rng, int(rng.integers(64, 256))) for _ in range(inputs)]
    completions = [text(rng, int(rng.integers(16, 256))) for _ in range(inputs)]
    scorer = SequenceClassifier(model, tokenizer(), share_prefixes=False)
    rows = scorer.text.encode(scorer.tokenizer, prompts, completions)
    batches = [
        pad_right([rows[i] for i in batch], 0, model.device)
        for batch in Budget(default_budget(model)).batches([len(row) for row in rows])
    ]
    found: dict[str, Any] = {}

    def bare() -> None:
        with torch.inference_mode():
            found["bare"] = [
                model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().cpu() for ids, mask in batches
            ]

    def ours() -> None:
        found["ours"] = scorer(prompts, completions)

    seconds_bare, seconds_ours = in_turns(rounds, bare, ours)
    order = [i for batch in Budget(default_budget(model)).batches([len(row) for row in rows]) for i in batch]
    expected = torch.cat(found["bare"])[:, 0].numpy()
    return {
        "inputs": inputs,
        "tokens": sum(map(len, rows)),
        "bare_s": seconds_bare,
        "ours_s": seconds_ours,
        "overhead": seconds_ours / seconds_bare - 1,
        "largest_difference_sd": float(np.abs(found["ours"][order] - expected).max() / expected.std()),
    }


def padding_check(args: argparse.Namespace, inputs: int, batch_tokens: int | None) -> dict[str, Any]:
    """The first call of an encoder, which compares padded rows with rows alone: that, against the rest of the call."""
    rng = np.random.default_rng(2)
    sizes = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    config = BertConfig(
        **sizes, vocab_size=32_000, num_attention_heads=args.width // 64, num_labels=1, pad_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).to(args.device, getattr(torch, args.dtype)).eval()
    lengths = [480, *rng.integers(30, 481, inputs - 1).tolist()]
    completions = [text(rng, n - 1) for n in lengths]  # and BOS
    SequenceClassifier(model, tokenizer())(["", ""], completions[:2])  # the first call of torch itself
    spent, counted = [], []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: counted.append(given[0].numel()))
    scorer = SequenceClassifier(model, tokenizer(), batch_tokens=batch_tokens)
    scorer(["a"], ["b"])  # whether the model can be read as a decoder is found out by other means
    counted.clear()
    parts = {"prepare": Comparison.prepare, "_rounded": Comparison._rounded}
    try:
        for name, part in parts.items():
            setattr(Comparison, name, partialmethod(timed, part, spent))
        whole = seconds(lambda: scorer([""] * inputs, completions))
    finally:
        for name, part in parts.items():
            setattr(Comparison, name, part)
        hook.remove()
    read = sum(counted)
    counted.clear()
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: counted.append(given[0].numel()))
    scorer([""] * inputs, completions)
    hook.remove()
    return {
        "inputs": inputs,
        "batch_tokens": batch_tokens or default_budget(model),
        "dtype": args.dtype,
        "padded": scorer._access.padding.allowed,
        "call_s": whole,
        "check_s": sum(spent),
        "share_of_time": sum(spent) / (whole - sum(spent)),
        "share_of_tokens": read / sum(counted) - 1,
    }


def timed(comparison: Comparison, part: Callable[..., Any], spent: list[float], *args: Any) -> Any:
    """A part of the check, and how long it took."""
    answers: list[Any] = []
    spent.append(seconds(lambda: answers.append(part(comparison, *args))))
    return answers[0]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two cases with a bar, three rounds, nothing saved")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, rounds = model_of(args), 3 if args.quick else args.rounds

    print("prompt response   K    plain   shared  faster  token ratio  of it   difference")
    shared = []
    for case in CASES[:2] if args.quick else CASES:
        shared.append(row := sharing(model, case, rounds))
        tokens = f"{row['prompt']:6d} {row['response']:8d} {row['k']:3d}"
        times = f"{row['plain_s']:7.3f}s {row['shared_s']:7.3f}s {row['times_faster']:6.2f}x"
        bound = f"{row['token_ratio']:11.2f}x {row['of_the_bound']:6.0%}"
        print(f"{tokens} {times} {bound} {row['largest_difference_sd']:9.1e} sd")
    cost = overhead(model, 2 * rounds + 1)
    print(f"the library around a bare forward: {cost['overhead']:+.1%}, {cost['largest_difference_sd']:.1e} sd apart")
    print("the padding check of an encoder's first call")
    checks = []
    for inputs, tokens in [(136, 65_536), (512, None)]:
        checks.append(found := padding_check(args, inputs, tokens))
        shares = f"{found['share_of_time']:.1%} of its time, {found['share_of_tokens']:.1%} of its tokens"
        print(f"{inputs} texts, {found['batch_tokens']:,} tokens a batch: {shares}; padded: {found['padded']}")
    if not args.quick:
        result = {**vars(args), "sharing": shared, "overhead": cost, "padding_check": checks}
        size = "" if (args.layers, args.width) == (4, 256) else f"_{args.layers}x{args.width}"
        print(save(f"scoring_{args.device}_{args.dtype}{size}", result))


if __name__ == "__main__":
    main()
