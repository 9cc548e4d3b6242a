"""What calibration costs as it grows: time per completion and peak memory, by prompts and K.

    python benchmarks/growth.py            # some minutes: 100, 1,000 and 10,000 prompts
    python benchmarks/growth.py --quick    # up to 1,000 prompts; writes nothing

A random Llama of two layers writes 4 tokens for each rollout, another one scores them: there is nothing to be fast at
but what is around the models. Each case is a process of its own, with one thread; seconds are of processor time.
Memory is the process's largest resident set, at the end and after a first shard. Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TOKENS, PER_SHARD, AT_ONCE = 4, 32, 8
CASES = [(prompts, k) for k in (10, 100) for prompts in (100, 1_000, 10_000)]


def texts(count: int) -> Iterator[str]:
    """Different prompts of one length, made as they are asked for."""
    return (f"What comes after {number:07d}?" for number in range(count))


def one(prompts: int, k: int) -> dict[str, float]:
    """A case, in this process."""
    import tiny
    import torch

    from calibrated_rewards.calibration.calibrate import calibrate
    from calibrated_rewards.samplers.hf import HfSampler
    from calibrated_rewards.samplers.protocol import Decoding
    from calibrated_rewards.scorers.classifiers import SequenceClassifier

    torch.set_num_threads(1)
    draw = HfSampler(
        tiny.causal(), tiny.tokenizer(), Decoding(max_tokens=TOKENS), prompts_at_once=AT_ONCE, show_progress=False
    )
    scorer = SequenceClassifier(tiny.classifier(), tiny.tokenizer(), show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"k": k, "prompts_per_shard": PER_SHARD, "show_progress": False}
        calibrate(texts(PER_SHARD), draw, scorer, Path(folder) / "first", **options)
        before = _peak_mib()
        start = time.process_time()
        table = calibrate(texts(prompts), draw, scorer, Path(folder) / "table", **options)
        seconds = time.process_time() - start
        assert len(table) == prompts
    return {"seconds": seconds, "peak_mib": _peak_mib(), "before_mib": before}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def apart(prompts: int, k: int) -> dict[str, Any]:
    """A case, in a process of its own."""
    command = [sys.executable, __file__, "--one", str(prompts), str(k)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    found["microseconds_per_completion"] = 1e6 * found["seconds"] / (prompts * k)
    row = {"prompts": prompts, "k": k, **{name: round(value, 1) for name, value in found.items()}}
    print("  ".join(f"{name} {value:,}" for name, value in row.items()), flush=True)
    return row


def growth(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For each K, the most prompts against the fewest: peak memory and time per completion."""
    found = []
    for k in sorted({row["k"] for row in rows}):
        of_k = [row for row in rows if row["k"] == k]
        ratios = {
            f"{name}_ratio": round(of_k[-1][name] / of_k[0][name], 3)
            for name in ("peak_mib", "microseconds_per_completion")
        }
        found.append({"k": k, "prompts": of_k[-1]["prompts"], "against": of_k[0]["prompts"], **ratios})
    return found


def main() -> None:
    """Run all cases, or the one that this process is for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", type=int, nargs=2, metavar=("PROMPTS", "K"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    from environment import save

    rows = [apart(*case) for case in CASES if not args.quick or case[0] <= 1_000]
    ratios = growth(rows)
    print(*ratios, sep="\n")
    if not args.quick:
        print(
            save(
                "growth",
                {
                    "tokens": TOKENS,
                    "prompts_per_shard": PER_SHARD,
                    "prompts_at_once": AT_ONCE,
                    "cases": rows,
                    "growth": ratios,
                },
            )
        )


if __name__ == "__main__":
    main()
