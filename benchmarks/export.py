"""Measure the time and memory of `calibrated-rewards export`, on a generated run of 10,000 prompts x 100 rollouts.

Each export is a process of its own; seconds by the clock depend on what else the machine does, those of the processor
hardly. Writes benchmarks/results/export.json.

    python benchmarks/export.py                                     # ten minutes, 400 MB of disk
    python benchmarks/export.py --prompts 200 --name export_small   # seconds
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from environment import save

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, Shard
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.table.reference_table import ReferenceTable

PER_SHARD = 32  # as `calibrate` makes them
WORDS = np.array([f"word{i}" for i in range(2000)])
EXPORTS = {
    "best": ["--as", "sft"],
    "drawn": ["--as", "sft", "--draws", "4", "--transform", "best-of:4:0.5"],
    "pairs": ["--as", "pairs", "--of", "8", "--layout", "openrlhf", "--format", "jsonl"],
    "scored": ["--as", "scored", "--transform", "exp:10", "--beta", "0.1"],
    "scored, jsonl": ["--as", "scored", "--transform", "exp:10", "--beta", "0.1", "--format", "jsonl"],
    "weighted, llama-factory": ["--as", "weighted", "--beta", "0.1", "--layout", "llama-factory"],
    "scored, datasets": ["--as", "scored", "--transform", "exp:10", "--beta", "0.1", "--format", "datasets"],
}
# Runs the command, and prints what it took.
MEASURE = """
import json, resource, sys, time
from calibrated_rewards.cli.main import main
began = time.perf_counter()
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "code": code,
    "seconds": round(time.perf_counter() - began, 1),
    "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
    "peak_mib": round(used.ru_maxrss / 1024),
}))
"""


def generate(folder: Path, prompts: int, rollouts: int) -> None:
    """Write the run directory of a calibration: chats of 30 words, completions of 40, normal scores."""
    rng, rows, directory = np.random.default_rng(0), [], RunDirectory(folder)
    directory.write_settings(
        {"seed": 0, "sampler": {"kind": "generated"}, "scorers": {"reward": {"kind": "generated"}}}
    )
    for number, at in enumerate(range(0, prompts, PER_SHARD)):
        planned, drawn, scores = [], [], []
        for prompt in range(at, min(prompts, at + PER_SHARD)):
            chat = [{"role": "user", "content": f"{prompt}: {' '.join(WORDS[rng.integers(0, 2000, 30)])}"}]
            planned.append(Planned(prompt_key(chat), chat))
            words = WORDS[rng.integers(0, 2000, (rollouts, 40))]
            drawn.append(tuple(Rollout(" ".join(each), 40, "stop", -80.0) for each in words))
            scores.append(rng.normal(size=rollouts).astype(np.float32))
            rows.append((planned[-1].key, scores[-1]))
        seeds = tuple(tuple(range(rollouts)) for _ in planned)
        directory.write_prompts(f"{number:05d}", planned)
        directory.save(f"{number:05d}", Shard(tuple(planned), tuple(drawn), seeds, {"reward": tuple(scores)}))
    ReferenceTable.build(rows).save(folder)


def main() -> None:
    """Generate a run, export it in each way, and save what that took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--name", default="export", help="of the file in benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=EXPORTS, default=[*EXPORTS])
    options = parser.parse_args()
    results = {"prompts": options.prompts, "rollouts": options.rollouts, "exports": {}}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        generate(run, options.prompts, options.rollouts)
        results["run_mib"] = round(sum(each.stat().st_size for each in run.rglob("*") if each.is_file()) / 2**20)
        for name, words in ((name, EXPORTS[name]) for name in options.only):
            out = Path(folder) / name
            command = [sys.executable, "-c", MEASURE, "export", str(run), "--out", str(out), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            size = round(sum(each.stat().st_size for each in out.rglob("*") if each.is_file()) / 2**20, 1)
            rows = json.loads((out / "export.json").read_text())["result"]["rows"]
            results["exports"][name] = {"options": " ".join(words), "rows": rows, "mib": size, **measured}
            print(name, results["exports"][name], flush=True)
    print(save(options.name, results).name)


if __name__ == "__main__":
    main()
