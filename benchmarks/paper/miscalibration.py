"""Figure 3 of the paper: raw scores are not comparable between prompts, in level and in spread; and what that costs.

    python benchmarks/paper/miscalibration.py [--rollouts DIR ...]

Left, the paper's plot: the scores of 10 prompts' rollouts against their rank, which is the calibrated reward; one that
needed no calibration would lie on the line. Middle: level and spread of all prompts. Right: the KL that the optimum of
the raw score spends on each prompt where the mean is 0.5. Nothing is trained. Writes
benchmarks/results/miscalibration.json and docs/figures/miscalibration.png.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import estimate_points
from environment import save
from rollouts import FIGURES, describe, load_samples, parser

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.objectives import parse_objective
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL
from calibrated_rewards.theory.procedures import Standard

SHOWN, KL, KLS = 10, 0.5, (0.1, 0.25, 0.5, 1.0, 2.0)


def measure_prompts(samples: Samples) -> dict[str, Any]:
    """Measure how prompts differ: mean and standard deviation of each, and the variance between them."""
    means = np.array([row.mean() for row in samples.select])
    spreads = np.array([row.std(ddof=1) for row in samples.select])
    pool = np.sort(np.concatenate(samples.select))
    # How far a prompt's law of ranks among all prompts' rollouts is from the diagonal of the paper's figure.
    distances = [
        np.abs(np.searchsorted(pool, np.sort(row), "right") / len(pool) - (np.arange(len(row)) + 1) / len(row)).max()
        for row in samples.select
    ]
    within = float(np.mean(spreads**2))
    between = float(means.var(ddof=1) - np.mean(spreads**2 / samples.sizes))
    return {
        "levels": means.tolist(),
        "spreads": spreads.tolist(),
        "share of the variance between prompts": between / (between + within),
        "standard deviation of the level": between**0.5,
        "mean spread": float(spreads.mean()),
        "5th and 95th percentile of the spread": np.quantile(spreads, [0.05, 0.95]).tolist(),
        "mean largest distance from the diagonal": float(np.mean(distances)),
    }


def spend(samples: Samples, arm: str) -> np.ndarray:
    """Return the KL that an arm's optimum spends on each prompt where the mean is `KL`."""
    rollouts = RolloutsAtKL(samples, (Standard(),))
    pools = rollouts.pools
    objective: Any = parse_objective(arm)
    rows = np.repeat(np.arange(len(samples)), samples.sizes)
    values = pools.filled(np.asarray(objective.at(KL)(rollouts.table, rows, np.concatenate(samples.select))), 0.0)
    return np.asarray(pools.tilted(values, pools.beta_for_kl(values, KL))[1])


def draw(samples: Samples, measured: dict[str, Any], spent: dict[str, np.ndarray]) -> None:
    """Draw the three panels."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    low, high = np.quantile(np.concatenate(samples.select), [0.001, 0.999])
    for row in samples.select[:SHOWN]:
        left.plot((np.arange(len(row)) + 0.5) / len(row), (np.sort(row) - low) / (high - low), lw=1)
    left.plot([0, 1], [0, 1], "k--", lw=1)
    left.set(
        xlabel="calibrated reward (rank within the prompt)",
        ylabel="raw reward, scaled to all prompts",
        title=f"{SHOWN} prompts; dashed: no calibration needed",
        ylim=(-0.02, 1.02),
    )
    middle.plot(measured["levels"], measured["spreads"], ".")
    middle.set(
        xlabel="mean raw reward of a prompt's rollouts",
        ylabel="their standard deviation",
        title=f"level and spread of {len(samples)} prompts",
        ylim=(0, None),
    )
    for arm, label, colour in (("raw", "raw", "#999999"), ("identity", "calibrated", "#56B4E9")):
        right.plot(measured["spreads"], spent[arm], ".", color=colour, label=label)
    right.set(
        xlabel="standard deviation of a prompt's raw reward",
        ylabel="KL spent on it, nats",
        title=f"the optimum at a mean KL of {KL}",
        ylim=(0, None),
    )
    right.legend()
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    figure.savefig(FIGURES / "miscalibration.png", dpi=130)


def main() -> None:
    """Measure, draw and save."""
    samples = load_samples(parser(__doc__).parse_args())
    measured = measure_prompts(samples)
    spent = {arm: spend(samples, arm) for arm in ("raw", "identity")}
    measured["KL by prompt, 5th and 95th percentile"] = {
        arm: np.quantile(kls, [0.05, 0.95]).tolist() for arm, kls in spent.items()
    }
    measured["identity over raw, one draw"] = [
        row for row in estimate_points(samples, ["raw", "identity"], KLS, [Standard()]) if row["arm"] == "identity"
    ]
    draw(samples, measured, spent)
    for name, value in measured.items():
        print(name, value if name not in ("levels", "spreads") else "...")
    print(save("miscalibration", {"rollouts": describe(samples), **measured}))


if __name__ == "__main__":
    main()
