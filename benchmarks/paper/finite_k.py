"""What K references cost: the bias of the plug-in e^{10u}, and the win rate of a policy trained on K fixed references.

    python benchmarks/paper/finite_k.py

Writes benchmarks/results/finite_k_cost.json and docs/figures/finite_k.png. The left panel is exact; the right one is a
mean over 4000 draws of references.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.theory.finite_k import bias
from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.optimum import tune
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "finite_k.png"
SIZES = (4, 8, 16, 32, 64, 100)
ESTIMATORS = ("empirical", "posterior", "unbiased")
PROCEDURE, KL = BestOf(4), 0.5


def biases():
    """Relative bias at C = 1/2 of e^{10u}."""
    return {
        estimator: [float(bias(Exponential(10.0), k, estimator, 0.5)) / float(np.exp(5.0)) for k in SIZES]
        for estimator in ESTIMATORS
    }


def costs():
    """Win rate of best-of-4 at KL 0.5, for the identity and for the best exponential."""
    tuned = tune(PROCEDURE, kl=KL).transform
    arms = {
        "identity": (Identity(), "empirical"),
        "best t, empirical": (tuned, "empirical"),
        "best t, posterior": (tuned, "posterior"),
    }
    rows = {}
    for name, (transform, estimator) in arms.items():
        points = [win_rate_at_kl(transform, KL, PROCEDURE, k, estimator, draws=4000) for k in SIZES]
        rows[name] = {
            "win rate": [point.win_rate for point in points],
            "standard error": [point.win_rate_error for point in points],
            "infinite K": win_rate(transform, beta_for_kl(transform, KL), PROCEDURE),
        }
        print(f"{name:20}", "  ".join(f"K={k}: {point.win_rate:.3f}" for k, point in zip(SIZES, points, strict=True)))
    return rows


def draw(bias_rows, cost_rows):
    """The two panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for estimator, row in bias_rows.items():
        left.plot(SIZES, 100 * np.array(row), "o-", label=estimator)
    left.set(
        xlabel="K", ylabel="bias at C = 1/2, %", title=r"$e^{10u}$ from K references", yscale="symlog", xscale="log"
    )
    for name, row in cost_rows.items():
        (line,) = right.plot(SIZES, row["win rate"], "o-", label=name)
        right.axhline(row["infinite K"], color=line.get_color(), linestyle=":", linewidth=1)
    right.set(xlabel="K", ylabel="win rate", title="Best of 4 at KL 0.5 (dotted: infinite K)", xscale="log")
    for ax in (left, right):
        ax.set_xticks(SIZES, [str(k) for k in SIZES], minor=False)
        ax.minorticks_off()
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main():
    """Both panels, and the JSON."""
    bias_rows, cost_rows = biases(), costs()
    draw(bias_rows, cost_rows)
    print(save("finite_k_cost", {"K": SIZES, "bias": bias_rows, "best of 4 at KL 0.5": cost_rows}))


if __name__ == "__main__":
    main()
