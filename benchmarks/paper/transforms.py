"""Figures 2 and 11 of the paper, and the comparison of transforms at matched KL behind them.

    python benchmarks/paper/transforms.py               # keeps its JSON in benchmarks/results and its figure in docs
    python benchmarks/paper/transforms.py --out demo    # only demo/transforms.png

Prints win rates at matched KL. Everything is exact; nothing is trained. In parentheses: what another program found for
the same question when this library was designed.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.theory.optimum import optimum, tune
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity, Log

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
COLUMNS = {
    "identity": Identity(),
    "log": Log(),
    "e^5u": Exponential(5.0),
    "e^10u": Exponential(10.0),
    "-e^-5u": Exponential(-5.0),
    "-e^-10u": Exponential(-10.0),
}
# (procedure, KL), then the win rates in the order of the columns; - where nothing was published.
_ROWS = """
best of 2   .5   .7917 .7682 .8154 .8031 - - .8155 .8156
best of 2   1    .8733 .8631 .8964 .8905 - - .8967 .8969
best of 4   .25  .7304 .6902 .7856 .7966 - - .7967 .7969
best of 4   .5   .7998 .7682 .8566 .8715 - - .8727 .8733
best of 4   1    .8770 .8631 .9192 .9351 - - .9399 .9411
best of 4   2    .9520 .9501 .9635 .9731 - - .9822 .9839
best of 8   .5   .8036 -     .8747 .9037 - - .9285 .9299
best of 8   1    .8787 -     .9268 .9482 - - .9741 .9761
best of 32  .5   .8063 -     .8854 .9196 - - -     -
worst of 4  .25  .7847 .8364 - - .8539 .8563 -     .8583
worst of 4  .5   .8860 .9270 - - .9439 .9476 -     .9479
"""
ALL = [*COLUMNS, "best t", "optimum"]
PUBLISHED = {
    (" ".join(row.split()[:3]), float(row.split()[3])): {
        name: float(cell) for name, cell in zip(ALL, row.split()[4:], strict=True) if cell != "-"
    }
    for row in _ROWS.strip().splitlines()
}
PROCEDURES = {
    "standard": Standard(),
    **{f"best of {n}": BestOf(n) for n in (2, 4, 8, 32)},
    **{f"worst of {n}": WorstOf(n) for n in (2, 4)},
}


@cache
def rate(column, procedure, kl):
    """Win rate at a KL of a named transform, of the best exponential, or of the optimum."""
    if column == "optimum":
        return optimum(procedure, kl=kl).win_rate
    if column == "best t":
        return tune(procedure, kl=kl).win_rate
    transform = COLUMNS[column]
    return win_rate(transform, beta_for_kl(transform, kl), procedure)


def compare():
    """Every published entry: ours, theirs, and the difference."""
    rows = []
    print("win rate over the reference, and in parentheses the same by another program")
    print(f"{'':12}{'KL':>5}  " + "".join(f"{name:>18}" for name in ALL))
    for (name, kl), published in PUBLISHED.items():
        ours = {column: rate(column, PROCEDURES[name], kl) for column in ALL}
        cells = [f"{ours[c]:.4f}" + (f" ({published[c]:.4f})" if c in published else "") for c in ours]
        print(f"{name:12}{kl:5.2f}  " + "".join(f"{cell:>18}" for cell in cells))
        rows.append({"procedure": name, "kl": kl, "ours": ours, "published": published})
    worst = max(
        (abs(row["ours"][c] - value), row["procedure"], row["kl"], c)
        for row in rows
        for c, value in row["published"].items()
    )
    print(f"largest difference: {worst[0]:.5f} at {worst[1]}, KL {worst[2]}, {worst[3]}")
    return {"rows": rows, "largest difference": worst}


def draw(folder):
    """Win rate against KL for the procedures of the paper's figures, with the optimum and a larger N."""
    names = ["standard", "best of 2", "best of 4", "best of 32", "worst of 2", "worst of 4"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, layout="constrained")
    budgets = np.concatenate([[0.02, 0.05], np.arange(0.1, 1.51, 0.1)])
    for ax, name in zip(axes.flat, names, strict=True):
        worst = name.startswith("worst")
        shown = ["identity", "log", *(["-e^-5u", "-e^-10u"] if worst else ["e^5u", "e^10u"]), "optimum"]
        for column in shown:
            style = {"color": "black", "linestyle": "--"} if column == "optimum" else {}
            ax.plot(budgets, [rate(column, PROCEDURES[name], float(kl)) for kl in budgets], label=column, **style)
        ax.set_title(name)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="lower right")
    for ax in axes[1]:
        ax.set_xlabel("KL from the reference, nats")
    for ax in axes[:, 0]:
        ax.set_ylabel("win rate over the reference")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "transforms.png", dpi=130)


def main():
    """The table, the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the figure; nothing of the checkout is then written to")
    folder = parser.parse_args().out
    results = compare()
    draw(folder or FIGURES)
    print((folder or FIGURES) / "transforms.png")
    if folder is None:
        print(save("transforms", results))


if __name__ == "__main__":
    main()
