"""Figures 5 and 8 of the paper: other N than 4, from best of 2 to best and worst of 32.

    python benchmarks/paper/other_n.py [--rollouts DIR ...]

What training would reach if it found the optimum. Top: the exact world, enumerated, N = 2, 4, 32. Bottom: the rollouts
of a real model with weights, by an independent judge, for N up to a third of the rollouts of a prompt: best or worst
of N comes down to one rollout otherwise. Writes benchmarks/results/other_n.json and docs/figures/other_n.png.
"""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import choose_arms, compare_with_best, describe_gain, draw_panel, enumerate_points, estimate_points, speak
from environment import save
from rollouts import FIGURES, describe, load_samples, parser

from calibrated_rewards.theory.named import format_name
from calibrated_rewards.theory.procedures import BestOf, WorstOf

KLS = (0.1, 0.25, 0.5, 1.0)
EXACT = (BestOf(2), BestOf(4), BestOf(32), WorstOf(4), WorstOf(32))
REAL = (BestOf(2), BestOf(8), BestOf(16), WorstOf(8), WorstOf(16))


def main() -> None:
    """Estimate, enumerate, draw and save."""
    samples = load_samples(parser(__doc__).parse_args())
    figure, axes = plt.subplots(2, len(EXACT), figsize=(20, 8), sharex=True, layout="constrained")
    arms = {procedure: [arm for arm in choose_arms(procedure) if arm != "par"] for procedure in {*EXACT, *REAL}}
    exact, real, gains = [], [], []
    for best in (True, False):
        some = [each for each in REAL if isinstance(each, BestOf) == best and 3 * each.n <= samples.sizes.min()]
        real += estimate_points(samples, dict.fromkeys(arm for each in some for arm in arms[each]), KLS, some)
    for column, procedure in enumerate(EXACT):
        exact += enumerate_points(arms[procedure], KLS, [procedure])
        draw_panel(axes[0, column], exact, procedure, "exact", f"exact world: {speak(procedure)}")
        axes[0, column].legend(fontsize=7, loc="lower right")
    for column, procedure in enumerate(REAL):
        own = [row for row in real if row["arm"] in arms[procedure]]
        draw_panel(axes[1, column], own, procedure, "judge", f"SmolLM2 rollouts: {speak(procedure)}, by the judge")
        ours = format_name(procedure)
        others = [arm for arm in arms[procedure] if arm != ours and not arm.startswith("exp")]
        tilts = [arm for arm in arms[procedure] if arm.startswith("exp")]
        if own:
            gains += [compare_with_best(samples, real, arm, others, 0.5, procedure) for arm in [*tilts, ours]]
    for ax in axes[:, 0]:
        ax.set_ylabel("win rate over the reference")
    figure.savefig(FIGURES / "other_n.png", dpi=110)
    print(*map(describe_gain, gains), sep="\n")
    results = {"rollouts": describe(samples), "real": real, "exact": exact, "gains over the best other": gains}
    print(save("other_n", results))


if __name__ == "__main__":
    main()
