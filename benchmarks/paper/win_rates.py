"""Figure 4 of the paper: standard, best-of-4 and worst-of-4 win rate against KL, for all baselines.

    python benchmarks/paper/win_rates.py [--rollouts DIR ...]

What training would reach if it found the optimum, not what a trained policy reached. Top: the rollouts of a real model
with weights, won by an independent judge. Bottom: the exact world, enumerated, where the reward is the judge too. A
method stands for the reward that it maximises: IPO for the identity, BOND, vBoN and BoNBoN for the log, GRPO for the
z-score. Diamonds: the best of 2, 4 and 8 as a policy. Writes benchmarks/results/win_rates.json and
docs/figures/win_rates.png.
"""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import (
    best_of_n_marks,
    choose_arms,
    compare_with_best,
    describe_gain,
    draw_panel,
    enumerate_points,
    estimate_points,
    speak,
)
from environment import save
from rollouts import FIGURES, describe, load_samples, parser

from calibrated_rewards.theory.named import format_name
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

KLS = (0.1, 0.25, 0.5, 1.0)
PROCEDURES = (Standard(), BestOf(4), WorstOf(4))
RIVALS = ["iama:4", "tailrl:4", "rs-grpo:2"]


def main() -> None:
    """Estimate, enumerate, draw and save."""
    samples = load_samples(parser(__doc__).parse_args())
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.5), sharex=True, layout="constrained")
    arms = {procedure: choose_arms(procedure) for procedure in PROCEDURES}
    real = estimate_points(samples, dict.fromkeys(arm for names in arms.values() for arm in names), KLS, PROCEDURES)
    real += estimate_points(samples, RIVALS, KLS, [BestOf(4)])
    exact, gains = [], []
    for column, (procedure, names) in enumerate(arms.items()):
        exact += enumerate_points(names, KLS, [procedure])
        shown = [*names, *RIVALS] if isinstance(procedure, BestOf) else names
        own = [row for row in real if row["arm"] in shown]
        draw_panel(axes[0, column], own, procedure, "judge", f"SmolLM2 rollouts: {speak(procedure)}, by the judge")
        draw_panel(axes[1, column], exact, procedure, "exact", f"exact world: {speak(procedure)}")
        for n, kl, rate in best_of_n_marks(procedure):
            if kl <= KLS[-1]:
                axes[1, column].plot(kl, rate, "D", color="#009E73", markersize=4)
                axes[1, column].annotate(f"{n}", (kl, rate), fontsize=7, xytext=(4, -8), textcoords="offset points")
        axes[0, column].legend(fontsize=7, loc="lower right")
        ours = "identity" if isinstance(procedure, Standard) else format_name(procedure)
        others = [arm for arm in shown if arm != ours and not arm.startswith("exp")]
        tilts = [arm for arm in names if arm in ("exp:10", "exp:-10") and ours != "identity"]
        for level in KLS[1:]:
            gains += [compare_with_best(samples, real, arm, others, level, procedure) for arm in [*tilts, ours]]
    for ax in axes[:, 0]:
        ax.set_ylabel("win rate over the reference")
    figure.savefig(FIGURES / "win_rates.png", dpi=130)
    print(*map(describe_gain, gains), sep="\n")
    results = {"rollouts": describe(samples), "real": real, "exact": exact, "gains over the best other": gains}
    print(save("win_rates", results))


if __name__ == "__main__":
    main()
