"""Why a policy does not learn the shape of a transform at first: the rewards' gradients are nearly one direction.

    python benchmarks/proof/gradients.py [--rollouts DIR]    # a minute of processor time

SmolLM2-135M-Instruct at its own rollouts (32 of each of some prompts), the weights of its last 10 layers: the cosine of
the policy gradients of the raw score and of other rewards, beside the correlation of the rewards, which is what is left
to learn. Two halves of the rollouts give the cosine without their noise. Writes benchmarks/results/gradients.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from environment import save
from rollouts import find_rollouts, parser

from calibrated_rewards.cli.demo.assets import fetch_language_model
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy, tokenize_completion
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, WorstOf
from calibrated_rewards.training.held_out import load_table
from calibrated_rewards.training.offline.gradients import GradientComparison, compare_gradients
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.rollouts import iterate_rollouts
from calibrated_rewards.training.offline.trained_weights import select_weights

LAYERS, KL, TEMPERATURE = 10, 0.5, 0.8
PROCEDURES = {
    "best of 4": BestOf(4),
    "best of 16": BestOf(16),
    "worst of 4": WorstOf(4),
    "worst of 16": WorstOf(16),
}


def compute_rewards(u: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Return the raw score, the identity, and the optimum for each procedure at the KL, of one prompt's rollouts."""
    return {
        "raw": scores,
        "identity": u,
        **{name: optimum(each, kl=KL).transform(u) for name, each in PROCEDURES.items()},
    }


def load(run: Path, policy: Policy, prompts: int, rollouts: int) -> tuple[list[Group], dict[str, list[Any]]]:
    """Read rollouts as tokens, and value them by each reward."""
    reward = CalibratedReward(None, load_table(run, "reward"), beta=1.0)
    groups: list[Group] = []
    rewards: dict[str, list[Any]] = {}
    for each in iterate_rollouts(run, reward, select="reward"):
        if len(groups) == prompts:
            break
        tokens = [tokenize_completion(policy, one, each.prompt)[0] for one in each.rollouts[:rollouts]]
        groups.append(Group(policy.check([each.prompt])[0], tokens))
        for name, values in compute_rewards(each.u, each.scores).items():
            rewards.setdefault(name, []).append(np.asarray(values, np.float64)[:rollouts])
    return groups, rewards


def describe(found: GradientComparison) -> dict[str, Any]:
    """Return the comparison as JSON holds it; nan as None."""
    parts = {name: getattr(found, name) for name in ("correlations", "cosines", "without_noise", "agreement")}
    return {"names": found.names, **{k: np.where(np.isnan(v), None, np.round(v, 4)).tolist() for k, v in parts.items()}}


def main() -> None:
    """Load, compare and save."""
    options = parser(__doc__)
    options.add_argument("--groups", type=int, default=32, help="prompts that are read")
    options.add_argument("--completions", type=int, default=32)
    args = options.parse_args()
    folder = fetch_language_model(args.cache)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = Policy(model, AutoTokenizer.from_pretrained(folder), Decoding(4, TEMPERATURE), Text())
    groups, rewards = load(find_rollouts(args)[0], policy, args.groups, args.completions)
    reader = GroupReader(select_weights(model, LAYERS, 0, 0).eval(), TEMPERATURE)
    found = compare_gradients(reader, groups, rewards)
    print(found)
    results = {"prompts": len(groups), "completions of a prompt": args.completions, "layers": LAYERS, "kl": KL}
    print(save("gradients", results | describe(found)))


if __name__ == "__main__":
    main()
