"""What worlds 2 and 3 share: score all completions, train and measure every arm, compare gradients, keep the lines.

One JSON line an arm in the folder of the world, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laws import Laws, Rollouts
from learn import Batch, Policy, Settings, at_weights, compute_gradient, measure, train
from shares import gather
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score

SCORERS = {"reward": "reward-model-1500", "judge": "judge-1500"}
# In the order in which they are run. 0 stands for infinitely many: the law itself.
SIZES = (8192, 1024, 128, 0, 65536)
MAIN = ("raw", "identity", "worst-of:16", "best-of:16", "z-score")
FURTHER = ("worst-of:4", "best-of:4", "exp:10", "log")
TRAINED_KL = 0.5
# Steps of the runs that show what more steps would give.
LONGEST = 400
# Sizes at which gradients are compared with those of infinitely many rollouts.
GRADIENT_SIZES = (128, 1024, 8192)


def score_all(folder: Path, cache: Path, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Score all completions by reward and judge, prompt after prompt; what is there is read."""
    found = {}
    for name, model in SCORERS.items():
        place, scorer = cache / model, None
        rows = []
        for at, (prompt, own) in enumerate(tqdm([*zip(prompts, texts, strict=True)], desc=name, disable=None)):
            file = folder / f"{name}-{at}.npy"
            if not file.exists():
                scorer = scorer or load_scorer(place, kind="sequence-classifier", show_progress=False)
                np.save(file.with_suffix(".part.npy"), score(scorer, [prompt] * len(own), own))
                file.with_suffix(".part.npy").rename(file)
            rows.append(np.load(file))
        found[name] = np.array(rows, np.float64)
    return found


def describe(laws: Laws) -> dict[str, Any]:
    """Describe the laws: how many completions count, how much of a prompt's law is its scores' spread."""
    entropy = -(laws.reference * laws.log_reference).sum(axis=1)
    centred = [each - (laws.reference * each).sum(1, keepdims=True) for each in (laws.reward, laws.judge)]
    spreads = [np.sqrt((laws.reference * each**2).sum(1)) for each in centred]
    both = (laws.reference * centred[0] * centred[1]).sum(1) / (spreads[0] * spreads[1])
    return {
        "perplexity": np.exp(entropy).round(1).tolist(),
        "reward_sd": spreads[0].round(3).tolist(),
        "judge_correlation": both.round(3).tolist(),
    }


def list_cases(seeds: int, sizes: Sequence[int], further: bool) -> Iterator[dict[str, Any]]:
    """List what is trained: a seed of the main arms at every size, then the gradients, the other seeds and arms."""

    def list_seed(k: int, seed: int) -> list[dict[str, Any]]:
        return [{"arm": arm, "k": k, "seed": seed} for arm in MAIN]

    for k in sizes:
        yield from list_seed(k, 0)
        if k == sizes[0] and seeds > 1:
            yield from list_seed(k, 1)
    yield {"part": "gradients"}
    for k in filter(None, sizes):  # of the law itself there is one
        for seed in range(2 if k == sizes[0] else 1, seeds):
            yield from list_seed(k, seed)
    # How much of what is missing is a matter of steps.
    for seed in range(seeds):
        yield from ({"arm": arm, "k": sizes[0], "seed": seed, "longest": LONGEST} for arm in MAIN)
    if further:
        yield from ({"arm": arm, "k": k, "seed": 0} for k in sizes for arm in FURTHER)


def run(policy: Policy, case: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Train an arm on K rollouts of each prompt, or on the law itself, and measure exactly what came of it."""
    arm, k, seed = case["arm"], case["k"], case["seed"]
    settings = replace(settings, steps=case.get("longest", settings.steps))
    if k:
        rollouts = Rollouts.draw(policy.laws, k, seed)
        batch = Batch.from_rollouts(policy, rollouts, arm, TRAINED_KL)
        seen = float(policy.laws.reference.ravel()[rollouts.drawn].sum() / len(policy.laws.reference))
    else:
        batch, seen = Batch.from_law(policy, arm, TRAINED_KL), 1.0
    trained, about = train(policy, batch, settings, seed)
    return {**case, "settings": asdict(settings), "seen": seen, **about, **measure(policy, trained, arm)}


def compare_gradients(policy: Policy, settings: Settings) -> dict[str, Any]:
    """Compare the arms' gradients: with each other, along the training of raw, and with those of few rollouts."""
    whole = {arm: Batch.from_law(policy, arm, TRAINED_KL) for arm in MAIN}
    trained, _ = train(policy, whole["raw"], settings)
    along = []
    for factor in (0.0, 0.25, 0.5, 0.75, 1.0):
        with at_weights(policy, trained, factor):
            vectors = [compute_gradient(policy, batch) for batch in whole.values()]
            along.append({"factor": factor, "norms": [float(v.norm()) for v in vectors], "cosines": _cosines(vectors)})
    exact, few = [compute_gradient(policy, batch) for batch in whole.values()], []
    for k in GRADIENT_SIZES:
        rows = []
        for seed in range(4):
            rollouts = Rollouts.draw(policy.laws, k, 100 + seed)
            own = [compute_gradient(policy, Batch.from_rollouts(policy, rollouts, arm, TRAINED_KL)) for arm in MAIN]
            # What tells an arm from raw, beside the noise of that difference.
            apart = [float(_cosine(a - own[0], b - exact[0])) for a, b in zip(own[1:], exact[1:], strict=True)]
            rows.append([*(float(_cosine(a, b)) for a, b in zip(own, exact, strict=True)), *apart])
        few.append(
            {
                "k": k,
                "with_exact": np.mean(rows, 0)[: len(MAIN)].tolist(),
                "less_raw": np.mean(rows, 0)[len(MAIN) :].tolist(),
            }
        )
    targets = [policy.laws.targets(arm, TRAINED_KL).log_ratios for arm in MAIN]
    agree = [[float(policy.laws.correlate(a, b).mean()) for b in targets] for a in targets]
    return {"part": "gradients", "arms": MAIN, "along_raw": along, "few": few, "target_correlations": agree}


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=0)


def _cosines(vectors: Sequence[torch.Tensor]) -> list[list[float]]:
    return [[float(_cosine(a, b)) for b in vectors] for a in vectors]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the results that are there; a line that was cut off does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def run_all(policy: Policy, lines: Path, cases: Sequence[dict[str, Any]], settings: Settings) -> Iterator[list[Any]]:
    """Run the cases that have no line yet, and yield all rows after each, or once if there is none."""
    rows = read_lines(lines)
    done = [{name: row[name] for name in ("part", "arm", "k", "seed", "longest") if name in row} for row in rows]
    left = [case for case in cases if case not in done]
    for case in left:
        rows.append(compare_gradients(policy, settings) if "part" in case else run(policy, case, settings))
        with lines.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(*(f"{name}={value}" for name, value in case.items()), _tell(rows[-1]), flush=True)
        yield rows
    if not left:
        yield rows


def _tell(row: dict[str, Any]) -> str:
    if "own" not in row:
        return ""
    own, kl = row["own"], np.mean(row["own"]["kl"])
    told = f"steps={row['kept']}/{row['steps']} {row['seconds']}s kl={kl:.3f} corr={own['correlation']:.3f}"
    for at, each in row["at"].items():
        rates = {name: np.mean(each["rates"]["judge"][name]) for name in ("best of 16", "worst of 16")}
        told += f" | {at}: x{each['factor']:.2f} " + " ".join(f"{rate:.4f}" for rate in rates.values())
    return told


def add_options(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Add the options that the scripts of both worlds have."""
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="K, rollouts of each prompt; 0: the law")
    parser.add_argument("--further", action="store_true", help="also the arms that nothing is claimed of")
    for name in ("rate", "steps"):
        parser.add_argument(f"--{name}", type=type(getattr(settings, name)), default=getattr(settings, name))
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default=settings.optimizer)
    parser.add_argument("--quick", type=Path, metavar="OUT", help="a tiny random world, results in this folder")


def run_world(policy: Policy, about: dict[str, Any], folder: Path, args: argparse.Namespace, name: str | None) -> None:
    """Run all that is not there yet, and write the results after each arm; without a name, to the folder.

    Another optimizer has arms and results of its own.
    """
    other = "" if args.optimizer == Settings.optimizer else f"_{args.optimizer}"
    settings = Settings(args.optimizer, args.rate, steps=args.steps)
    cases = list_cases(args.seeds, args.sizes, args.further)
    if name is None:
        settings, cases = (
            Settings(steps=20, rate=0.01),
            (each for each in list_cases(2, (64, 512, 0), False) if "longest" not in each),
        )
    print(json.dumps(about, indent=1), flush=True)
    for rows in run_all(policy, folder / f"arms{other}.jsonl", [*cases], settings):
        results = {"world": about, **gather(rows, policy.laws)}
        if name is None:
            (folder / "results.json").write_text(json.dumps(results))
        else:
            save(name + other, results)
