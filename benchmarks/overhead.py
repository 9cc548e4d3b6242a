"""What CalibratedReward costs beside its scorer, and where that goes.

    python benchmarks/overhead.py            # a Llama classifier of 4 layers, 256 wide, float32, one thread; minutes
    python benchmarks/overhead.py --quick    # without the classifier, nothing is kept

The table has 20,000 prompts of 100 references, memory-mapped. A batch is 64 pairs, of 8 prompts or of 64. Both sides,
the scorer alone and the reward that calls it, take turns in one run, and medians count. As the difference of two long
times says little of a short one, the reward is also timed with a scorer that knows its answers: what is left is its own
time, and its share of the scorer's. Texts are random letters, one token each; prompts are messages.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save

from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.lookup import Lookup
from calibrated_rewards.reward.monitoring import compute_metrics
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

PROMPTS, REFERENCES, BATCH = 20_000, 100, 64
# Tokens of the prompt and of the completion: a short exchange, and one as in training.
LENGTHS = {"short": (16, 16), "long": (128, 128)}
ROUNDS = 200


@dataclass(frozen=True)
class Known:
    """A scorer that has its answers already."""

    scores: Any

    def __call__(self, prompts: Any, completions: Any, /) -> Any:
        """As many as are asked for."""
        return self.scores[: len(completions)]


def text(rng: np.random.Generator, tokens: int) -> str:
    """Random letters."""
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), tokens))


def chat(words: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": words}]


def in_turns(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """The median seconds of each side, after one unmeasured round; without the garbage collector, as timeit does.

    It would run at the same place of every round, and be counted to one side.
    """
    times: list[list[float]] = [[] for _ in sides]
    gc.collect()
    gc.disable()
    for _ in range(rounds + 1):
        for side, column in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            column.append(time.perf_counter() - began)
    gc.enable()
    return [statistics.median(column[1:]) for column in times]


def calls(table: ReferenceTable, words: list[str], rounds: int) -> list[dict[str, Any]]:
    """Scorer and reward in turns, for batches of few and of many prompts, short and long."""
    model = tiny.classifier(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    scorer = SequenceClassifier(model, tiny.tokenizer(), show_progress=False)
    rng = np.random.default_rng(1)
    found = []
    for name, (opening, length) in LENGTHS.items():
        for distinct in (8, BATCH):
            prompts = [chat(each) for each in words[:distinct]] * (BATCH // distinct)
            prompts = prompts if name == "long" else [chat(p[0]["content"][:opening]) for p in prompts]
            completions = [text(rng, length) for _ in prompts]
            found.append({"texts": name, "prompts": distinct, **call(scorer, table, prompts, completions, rounds)})
    return found


def call(scorer: Any, table: ReferenceTable, prompts: Any, completions: list[str], rounds: int) -> dict[str, float]:
    """One batch: the scorer, the reward, and the reward's own time."""
    reward = CalibratedReward(scorer, table, Exponential(10.0))
    answers = scorer(prompts, completions)
    own = CalibratedReward(Known(answers), table, Exponential(10.0))
    logged: dict[str, float] = {}
    # The scorer twice: what it differs by from itself is what this comparison is good for.
    alone, whole, again = in_turns(
        rounds,
        lambda: scorer(prompts, completions),
        lambda: reward(prompts, completions, log_metric=logged.__setitem__),
        lambda: scorer(prompts, completions),
    )
    (ours,) = in_turns(ROUNDS, lambda: own(prompts, completions, log_metric=logged.__setitem__))
    return {
        "scorer_s": alone,
        "reward_s": whole,
        "own_s": ours,
        "overhead": ours / alone,
        "direct": whole / alone - 1,
        "scorer_against_itself": again / alone - 1,
    }


def raw_scores(table: ReferenceTable, words: list[str]) -> list[dict[str, Any]]:
    """4096 scores that a loop has already: by prompt or by row, of few prompts and of many, numpy and torch."""
    reward = CalibratedReward(None, table, Exponential(10.0))
    rng = np.random.default_rng(2)
    found = []
    for count in (64, 4096):
        prompts: Any = [chat(each) for each in words[:count]]
        rows = reward.rows(prompts)
        raw = rng.standard_normal((count, 4096 // count), dtype=np.float32)
        tensor, tensor_rows = torch.from_numpy(raw), torch.from_numpy(rows)
        times = in_turns(
            ROUNDS,
            lambda asked=prompts, given=raw: reward.from_scores(asked, given),
            lambda asked=rows, given=raw: reward.from_scores(asked, given),
            lambda asked=prompts, given=tensor: reward.from_scores(asked, given),
            lambda asked=tensor_rows, given=tensor: reward.from_scores(asked, given),
        )
        names = ("numpy_by_prompt_ms", "numpy_by_row_ms", "torch_by_prompt_ms", "torch_by_row_ms")
        found.append({"prompts": count, **{n: round(1000 * t, 3) for n, t in zip(names, times, strict=True)}})
    return found


def shares(table: ReferenceTable, words: list[str]) -> list[dict[str, Any]]:
    """Where the time goes, in a call for 64 pairs and in from_scores for 4096: each part by itself, in milliseconds."""
    rng = np.random.default_rng(3)
    lookup = Lookup(table, scaled(Exponential(10.0), "unit"), "empirical", 0.0)
    found = []
    for count, each in ((8, 8), (64, 1), (64, 64), (4096, 1)):
        prompts = [chat(word) for word in words[:count]]
        keys = [prompt_key(prompt) for prompt in prompts]
        rows = table.find(keys)
        raw = rng.standard_normal((count, each), dtype=np.float32)
        index = lookup.index(rows, raw)
        scores = CalibratedReward(Known(raw.ravel()), table).score(prompts, ["a"] * count)
        parts: dict[str, Callable[[], Any]] = {
            "hash": lambda p=prompts: [prompt_key(prompt) for prompt in p],
            "find": lambda k=keys: table.find(k),
            "rank": lambda r=rows, s=raw: lookup.index(r, s),
            "gather": lambda r=rows, i=index: lookup.values(r, i),
            "metrics": lambda s=scores: compute_metrics(s),
        }
        times = in_turns(ROUNDS, *parts.values())
        named = {f"{name}_ms": round(1000 * t, 4) for name, t in zip(parts, times, strict=True)}
        found.append({"prompts": count, "scores_each": each, **named})
    return found


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the classifier, nothing is kept")
    parser.add_argument("--rounds", type=int, default=5, help="of the classifier")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    words = [f"{i:06d}" + text(rng, LENGTHS["long"][0] - 6) for i in range(PROMPTS)]
    short = [word[: LENGTHS["short"][0]] for word in words[:BATCH]]
    with tempfile.TemporaryDirectory() as place:
        references = ((chat(word), rng.standard_normal(REFERENCES, dtype=np.float32)) for word in [*words, *short])
        table = ReferenceTable.build(references, path=Path(place) / "table")
        results: dict[str, Any] = {"from_scores_of_4096": raw_scores(table, words), "parts": shares(table, words)}
        if not args.quick:
            results["call_of_64"] = calls(table, words, args.rounds)
    for name, rows in results.items():
        for row in rows:
            sys.stdout.write(f"{name}: {row}\n")
    if not args.quick:
        save("overhead", {"prompts": PROMPTS, "references": REFERENCES, "rounds": args.rounds, **results})


if __name__ == "__main__":
    main()
