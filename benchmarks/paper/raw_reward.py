"""Figure 9 of the paper: the expected raw score, by the judge and by the reward itself, against KL.

    python benchmarks/paper/raw_reward.py [--rollouts DIR ...]

What training would reach if it found the optimum: the rollouts of a real model with weights. By the reward that is
maximised the raw objective is the best at every KL by definition (it is E[r] - beta KL itself), so the paper's gain
over it can only come from another judge or from training. What K rollouts fall short of is taken off by halves, as the
frontier does. Writes benchmarks/results/raw_reward.json and docs/figures/raw_reward.png.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import SHOWN
from environment import save
from rollouts import FIGURES, describe, load_samples, parser

from calibrated_rewards.evaluation.estimates import Samples, estimate_columns
from calibrated_rewards.evaluation.objectives import parse_objective
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL
from calibrated_rewards.theory.procedures import Standard

KLS, ARMS = (0.1, 0.25, 0.5, 1.0), ("raw", "z-score", "par", "identity", "log", "exp:5", "exp:10")


def weigh(rollouts: RolloutsAtKL, arm: str, kl: float) -> np.ndarray:
    """Return each prompt's expected score, by the reward and by the judge, of an arm's optimum at a KL."""
    pools, samples = rollouts.pools, rollouts.references
    objective: Any = parse_objective(arm)
    rows = np.repeat(np.arange(len(samples)), samples.sizes)
    values = objective.at(kl)(rollouts.table, rows, np.concatenate(pools.samples.select))
    filled = pools.filled(np.asarray(values, np.float64), 0.0)
    weights, kls = pools.tilted(filled, pools.beta_for_kl(filled, kl))
    scores = [pools.filled(np.concatenate(each), 0.0) for each in (samples.select, samples.judge)]
    return np.stack([*((weights * each).sum(1) for each in scores), kls], axis=1)


def estimate_scores(samples: Samples) -> list[dict[str, Any]]:
    """Estimate each arm's expected scores, and the differences to raw, in standard deviations within a prompt."""
    whole = RolloutsAtKL(samples, (Standard(),))
    halves = whole.halves()
    units = [float(np.mean([row.std(ddof=1) for row in each])) for each in (samples.select, samples.judge)]
    bases = np.stack([[row.mean() for row in each] for each in (samples.select, samples.judge)], axis=1)
    rows = []
    for kl in KLS:
        columns = {}
        for arm in ARMS:
            all_of_them = weigh(whole, arm, kl)
            half = np.mean([weigh(each, arm, kl) for each in halves], axis=0)
            columns[arm] = (2 * all_of_them[:, :2] - half[:, :2] - bases) / units
        differences = [columns[arm] - columns["raw"] for arm in ARMS]
        intervals = iter(estimate_columns(np.hstack([*columns.values(), *differences])))
        levels = [[next(intervals) for _ in units] for _ in ARMS]
        gains = [[next(intervals) for _ in units] for _ in ARMS]
        for arm, level, gain in zip(ARMS, levels, gains, strict=True):
            for judge, own, over_raw in zip(("reward", "judge"), level, gain, strict=True):
                row = {"arm": arm, "kl": kl, "judge": judge, "score": own.value, "interval": [own.low, own.high]}
                rows.append(row | {"over raw": over_raw.value, "its interval": [over_raw.low, over_raw.high]})
    return rows


def main() -> None:
    """Estimate, draw and save."""
    samples = load_samples(parser(__doc__).parse_args())
    rows = estimate_scores(samples)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for ax, judge in zip(axes, ("judge", "reward"), strict=True):
        for arm in ARMS:
            line = [row for row in rows if row["arm"] == arm and row["judge"] == judge]
            label, colour, style = SHOWN[arm]
            ax.plot([row["kl"] for row in line], [row["score"] for row in line], style, color=colour, label=label)
        by = "an independent judge" if judge == "judge" else "the reward that is maximised"
        ax.set(title=f"expected raw score, by {by}", xlabel="KL from the reference, nats")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("above the reference, in standard deviations")
    axes[0].legend(fontsize=8)
    figure.savefig(FIGURES / "raw_reward.png", dpi=130)
    for row in rows:
        low, high = row["its interval"]
        start = f"KL {row['kl']:<4} {row['judge']:<6} {row['arm']:<8} {row['score']:.3f}"
        print(f"{start}, over raw {row['over raw']:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(save("raw_reward", {"rollouts": describe(samples), "rows": rows}))


if __name__ == "__main__":
    main()
