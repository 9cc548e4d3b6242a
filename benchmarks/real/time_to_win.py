"""What it costs to reach a win rate: offline, online, and offline then online, against TRL's RLOO, on SmolLM2.

    python benchmarks/real/time_to_win.py --out runs    # an hour or two of one core; goes on where it stopped

SmolLM2-135M-Instruct goes on from the first three words of movie reviews, 4 tokens at temperature 0.8; the demo's
reward model pays, by the exact optimum for best-of-4 at KL 0.5, and its judge, trained on other texts, says who wins.
384 prompts are calibrated with 32 rollouts each, which every arm needs: offline training learns from them, online
training ranks among them. Each arm is run with several numbers of steps, each a run of its own, because the learning
rate falls to the end. All are commands of the library:

- `rloo`: TRL's RLOOTrainer as it is, with the calibrated reward, and LoRA on the last ten layers;
- `offline`: `train offline --kl 0.25`, the last ten layers, from the rollouts of the calibration alone: a short run
  goes a short way, and a factor on the weights' difference brings it to that KL on 24 prompts that it holds out;
- `offline, online`: `train grpo --plain --start` from an offline run, with adapters, rate and completions of `rloo`.

Each model then writes 16 completions for each of 200 prompts that nothing was trained or chosen on. Seconds are of the
processor, by the child processes, loading included; how many a win rate costs is read from the line between the points
of an arm. Writes benchmarks/results/time_to_win.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.cli.demo.assets import CACHE, fetch_language_model
from calibrated_rewards.cli.demo.reward_models import make_prompts, train_judge, train_reward_model
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.theory.procedures import BestOf, Standard

TEXTS, K, TOKENS, TEMPERATURE = 1_500, 32, 4, 0.8
# The prompts between them are those on which settings were chosen.
TRAINED, HELD_OUT, M = slice(0, 384), slice(504, 704), 16
TRANSFORM = "best-of:4:0.5"
PROCEDURES = Standard(), BestOf(4)
WINS = "BestOf(n=4)"
LORA = ("--lora-rank", "16", "--lora-layers", "10", "--lr", "1e-3", "--dtype", "float32")
ONLINE = (*LORA, "--prompts-a-step", "32", "--completions", "8", "--rows", "64")
TRL = ("--save-steps", "1000")
ONWARDS = ("train", "grpo", "--plain", *ONLINE)
OFFLINE = ("--dtype", "float32", "--cache-states", "--kl", "0.25", "--held-out", "0.0625", "--save-steps", "1000")
TARGETS = 0.60, 0.62, 0.64, 0.66, 0.68, 0.70


@dataclass(frozen=True)
class Run:
    """A training run by one command, which may begin with the model of another run."""

    arm: str
    steps: int
    command: tuple[str, ...]
    start: str | None = None

    @property
    def name(self) -> str:
        """Name the run's folder by its arm, its steps and the run that it goes on from."""
        return f"{self.start}_online_{self.steps}" if self.start else f"{self.arm}_{self.steps}"


RUNS = (
    *(Run("offline", steps, ("train", "offline", *OFFLINE)) for steps in (8, 16, 32)),
    Run("offline, online", 2, ONWARDS, "offline_8"),
    Run("offline, online", 4, ONWARDS, "offline_8"),
    Run("offline, online", 2, ONWARDS, "offline_16"),
    *(Run("rloo", steps, ("train", "rloo", *ONLINE, *TRL)) for steps in (8, 16)),
)


@dataclass(frozen=True)
class Experiment:
    """A folder of runs, each of which is made once; what it cost is in costs.json."""

    out: Path
    cache: Path

    def prepare(self) -> None:
        """Write the prompts, calibrate, and save the reward."""
        self.out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": prompt}) for prompt in make_prompts(self.cache, HELD_OUT.stop)]
        (self.out / "prompts.jsonl").write_text("\n".join(lines[TRAINED]) + "\n")
        model, kind = train_reward_model(self.cache, TEXTS), ("--kind", "sequence-classifier")
        decoding = ["--max-tokens", str(TOKENS), "--temperature", str(TEMPERATURE)]
        policy = ["--policy", str(fetch_language_model(self.cache)), "--policy-dtype", "float32"]
        prompts = ["--prompts", str(self.out / "prompts.jsonl"), "-k", str(K)]
        self.call("table", "calibrate", *prompts, *policy, *decoding, "--reward-model", f"reward={model}", *kind)
        table = str(self.out / "table" / "reward")
        self.call("reward", "reward", table, "--transform", TRANSFORM, "--reward-model", str(model), *kind)

    def train(self, run: Run) -> None:
        """Do the run, unless it is done."""
        arguments = ["--policy", str(fetch_language_model(self.cache)), "--reward", str(self.out / "reward")]
        if run.command[1] == "offline":
            arguments += ["--rollouts", str(self.out / "table")]
        else:
            arguments += ["--prompts", str(self.out / "prompts.jsonl")]
        if run.start:
            arguments += ["--start", str(self.out / run.start / "model")]
        self.call(run.name, *run.command, *arguments, "--steps", str(run.steps))

    def call(self, name: str, *arguments: str) -> None:
        """Call the command line; what a stopped call left is removed first, so that costs are whole."""
        costs = self.costs()
        if name in costs:
            return
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        print(f"== {name}: {' '.join(arguments)}", flush=True)
        start = time.perf_counter()
        with (self.out / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "calibrated_rewards", *arguments, "--out", str(folder)]
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{name} failed: see {self.out / name}.log")
        costs[name] = {"processor_seconds": usage.ru_utime + usage.ru_stime, "seconds": time.perf_counter() - start}
        (self.out / "costs.json").write_text(json.dumps(costs, indent=2))
        print(f"   {costs[name]['processor_seconds']:.0f} s of the processor", flush=True)

    def costs(self) -> dict[str, dict[str, float]]:
        """The seconds of all commands that came to their end."""
        path = self.out / "costs.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def evaluate(self) -> Evaluation:
        """Let the judge compare what the models write for prompts that nothing was trained on."""
        decoding = Decoding(TOKENS, TEMPERATURE)
        models = {"reward": train_reward_model(self.cache, TEXTS), "judge": train_judge(self.cache, TEXTS)}
        scorers = {
            name: load_scorer(at, kind="sequence-classifier", show_progress=False) for name, at in models.items()
        }
        prompts = make_prompts(self.cache, HELD_OUT.stop)[HELD_OUT]
        reference = load_sampler(fetch_language_model(self.cache), decoding, dtype="float32", prompts_at_once=8)
        policies = Trained({run.name: self.out / run.name / "model" for run in RUNS}, decoding)
        at = self.out / "evaluation"
        options: dict[str, Any] = {"select": "reward", "procedures": PROCEDURES, "divergence": {}}  # no KL: win rates
        return evaluate(policies, reference, prompts, scorers, at, m=M, **options)


@dataclass(frozen=True)
class Trained(Mapping[str, Any]):
    """The trained policies, each loaded when it is asked for."""

    folders: Mapping[str, Path]
    decoding: Decoding

    def __getitem__(self, name: str) -> Any:
        return load_sampler(self.folders[name], self.decoding, dtype="float32", prompts_at_once=8)

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


def collect(evaluation: Evaluation, costs: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """What each run cost, with those that it began with, and what it reached."""
    results = {result.name: result for result in evaluation.policies}
    rows = []
    for run in RUNS:
        result = results[run.name]
        parts = [run.name, *([run.start] if run.start else [])]
        rate = result.win_rates["judge"][WINS]
        rows.append(
            {
                "arm": run.arm,
                "steps": run.steps,
                "start": run.start,
                "processor_seconds": sum(costs[part]["processor_seconds"] for part in parts),
                "seconds": sum(costs[part]["seconds"] for part in parts),
                "best_of_4": rate.value,
                "interval": [rate.low, rate.high],
                "one_draw": result.win_rates["judge"]["Standard()"].value,
            }
        )
    return rows


def find_cost(rows: list[dict[str, Any]], arm: str, target: float, unit: str) -> float | None:
    """Find where the line through an arm's points, from nothing at .5, first reaches the target."""
    points = [(0.0, 0.5), *sorted((row[unit], row["best_of_4"]) for row in rows if row["arm"] == arm)]
    for (before, low), (after, high) in pairwise(points):
        if low < target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return None


def main() -> None:
    """Make all runs, evaluate them, and say what each win rate cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("time_to_win"), help="the folder of the runs (%(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    experiment = Experiment(args.out.resolve(), args.cache)
    experiment.prepare()
    for run in RUNS:
        experiment.train(run)
    costs = experiment.costs()
    rows = collect(experiment.evaluate(), costs)
    arms = list(dict.fromkeys(run.arm for run in RUNS))
    needed = {
        unit: {str(target): {arm: find_cost(rows, arm, target, unit) for arm in arms} for target in TARGETS}
        for unit in ("processor_seconds", "seconds")
    }
    for row in rows:
        print(row)
    print(json.dumps(needed["processor_seconds"], indent=1))
    print(save("time_to_win", {"calibration": costs["table"], "runs": rows, "needed": needed}))


if __name__ == "__main__":
    main()
