"""The exponent tuned for N against the paper's t = 5 and t = 10, in theory and on real rollouts.

    python benchmarks/paper/exponents.py [--rollouts DIR ...]

What training would reach if it found the optimum, at KL 0.5. Lines: theory, which is exact. Marks: the rollouts of a
real model with weights, by an independent judge, for N up to a third of the rollouts of a prompt. Writes
benchmarks/results/exponents.json and docs/figures/exponents.png.
"""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import estimate_points
from environment import save
from rollouts import FIGURES, describe, load_samples, parser

from calibrated_rewards.theory.named import format_name
from calibrated_rewards.theory.optimum import optimum, tune
from calibrated_rewards.theory.procedures import BestOf, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity

KL, SIZES = 0.5, (2, 4, 8, 16, 32)
COLOURS = {"identity": "#56B4E9", "t = 5": "#E69F00", "t = 10": "#D55E00", "t tuned": "#009E73"}


def compute(procedure):
    """Compute theory's win rates of the paper's exponents, of the tuned one and of the optimum."""
    sign = 1 if isinstance(procedure, BestOf) else -1
    tuned = tune(procedure, kl=KL)
    transforms = {"identity": Identity(), **{f"t = {t}": Exponential(float(sign * t)) for t in (5, 10)}}
    rates = {name: win_rate(each, beta_for_kl(each, KL), procedure) for name, each in transforms.items()}
    row = {"procedure": repr(procedure), "tuned t": tuned.transform.t}
    return row | {**rates, "t tuned": tuned.win_rate, "optimum": optimum(procedure, kl=KL).win_rate}


def estimate(samples, procedure, tuned):
    """Estimate the same by the judge, as differences to the optimum."""
    sign = 1 if isinstance(procedure, BestOf) else -1
    names = {"identity": "identity", **{f"t = {t}": f"exp:{sign * t}" for t in (5, 10)}, "t tuned": f"exp:{tuned:.4g}"}
    arms = [format_name(procedure), *names.values()]
    rows = estimate_points(samples, arms, [KL], [procedure])
    own = {row["arm"]: row for row in rows if row["judge"] == "judge"}
    return {name: {"gain": own[arm]["gain"], "interval": own[arm]["interval of gain"]} for name, arm in names.items()}


def main():
    """Compute, estimate, draw and save."""
    samples = load_samples(parser(__doc__).parse_args())
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    rows = []
    for ax, kind in zip(axes, (BestOf, WorstOf), strict=True):
        own = []
        for n in SIZES:
            row = {"n": n, **compute(kind(n))}
            if 3 * n <= samples.sizes.min():
                row["by the judge, less the optimum"] = estimate(samples, kind(n), row["tuned t"])
            own.append(row)
            print(row, flush=True)
        for name, colour in COLOURS.items():
            ax.plot(SIZES, [100 * (row[name] - row["optimum"]) for row in own], "-", color=colour, label=name)
            real = [row for row in own if "by the judge, less the optimum" in row]
            points = [row["by the judge, less the optimum"][name] for row in real]
            gains = [100 * each["gain"] for each in points]
            ends = [[100 * each["interval"][i] for each in points] for i in (0, 1)]
            errors = [[abs(end - gain) for end, gain in zip(each, gains, strict=True)] for each in ends]
            ax.errorbar([row["n"] for row in real], gains, errors, fmt="o", color=colour, markersize=4, capsize=2)
        ax.set(title=f"{'best' if kind is BestOf else 'worst'} of N at KL {KL}", xlabel="N", xscale="log")
        ax.set_xticks(SIZES, [str(n) for n in SIZES])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        rows += own
    axes[0].set_ylabel("points of win rate below the optimum")
    axes[0].legend(fontsize=8)
    figure.savefig(FIGURES / "exponents.png", dpi=130)
    print(save("exponents", {"rollouts": describe(samples), "kl": KL, "rows": rows}))


if __name__ == "__main__":
    main()
