"""How near the plain loops come to the optimum, on a language model that can be enumerated.

    python benchmarks/plain_loops.py             # both loops, three transforms, what biases each; 15 minutes
    python benchmarks/plain_loops.py --quick     # one case of each loop

The model has four prompts and completions of one or two of eight tokens, with its own logits in every context, so that
what is missed is the loop's fault. Beta is such that the optimum has a KL of 1. Distances are total variations from
pi_ref(y) e^{Phi(C)/beta} / Z, by enumeration in numpy; "worst" is that of the worst prompt. Each is of several seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from tqdm import tqdm

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training.online import GRPOSettings, PPOSettings, grpo, ppo

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import enumerable

LOOPS: dict[str, tuple[Any, Any]] = {"grpo_plain": (grpo, GRPOSettings), "ppo": (ppo, PPOSettings)}
# 256 completions a step for both.
FAITHFUL: dict[str, dict[str, Any]] = {
    "grpo_plain": {"completions": 64},
    "ppo": {"completions": 256, "value_lr": 0.03, "epochs": 1},
}
SHARED = {"prompts_a_step": 4, "lr": 0.1, "rows": 256}
# What is changed, one thing at a time, in the case of identity and two tokens.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "grpo_plain": [{}, {"baseline": "group-mean"}, {"epochs": 2}, {"epochs": 4}, {"completions": 8}],
    "ppo": [
        {},
        {"whiten": "centre"},
        {"whiten": "scale"},
        {"lam": 0.95},
        {"lam": 0.5},
        {"lam": 0.95, "value_lr": 1e-4},
        {"lam": 0.5, "value_lr": 1e-4},
        {"epochs": 2},
        {"epochs": 4},
        {"epochs": 4, "lr": 0.02},
        {"epochs": 2, "minibatches": 4},
        {"completions": 32},
    ],
}


def trained(name: str, phi: str, length: int, seed: int, steps: int, changes: dict[str, Any]) -> dict[str, float]:
    """One run: how far from the optimum it started and ended."""
    model = enumerable.Tabular(length)
    problem = enumerable.Problem.of(model, length, phi)
    beta = problem.beta()
    start = problem.distances(model, beta).max()
    reward = CalibratedReward(enumerable.TiedScorer(), problem.table(), problem.transform)
    policy = Policy(model, enumerable.tokenizer(), Decoding(length), Text())
    asked = [Asked(prompt) for prompt in enumerable.PROMPTS]
    settings = {"beta": beta, "steps": steps, "seed": seed, **SHARED, **FAITHFUL[name], **changes}
    began = time.perf_counter()
    loop, options = LOOPS[name]
    loop.train(policy, reward, asked, options(**settings))
    found = problem.distances(model, beta)
    return {
        "beta": beta,
        "start": float(start),
        "worst": float(found.max()),
        "mean": float(found.mean()),
        "kl": problem.mean_kl(np.array([enumerable.law(model, prompt, length) for prompt in enumerable.PROMPTS])),
        "seconds": time.perf_counter() - began,
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and the largest distance of all."""
    means = {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}
    return {**means, "worst_of_all": round(max(run["worst"] for run in runs), 4)}


def cases(quick: bool) -> list[tuple[str, str, int, dict[str, Any]]]:
    """What is run: each loop as it is meant, then each change."""
    if quick:
        return [("grpo_plain", "exp:10", 2, {}), ("ppo", "identity", 2, {})]
    meant = [(name, phi, length, {}) for name in LOOPS for phi in enumerable.PHI for length in (1, 2)]
    return meant + [(name, "identity", 2, change) for name in LOOPS for change in CHANGES[name] if change]


def main() -> None:
    """Run all, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case of each loop, nothing is kept")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name, phi, length, change in tqdm(cases(args.quick), delay=3, disable=None):
        runs = [trained(name, phi, length, seed, args.steps, change) for seed in range(args.seeds)]
        found.append({"loop": name, "transform": phi, "tokens": length, "changed": change, **summary(runs)})
        tqdm.write(str(found[-1]), file=sys.stderr)
    if not args.quick:
        settings = {name: {**SHARED, **own} for name, own in FAITHFUL.items()}
        save("plain_loops", {"settings": settings, "steps": args.steps, "seeds": args.seeds, "runs": found})


if __name__ == "__main__":
    main()
