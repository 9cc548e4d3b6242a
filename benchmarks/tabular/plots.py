"""The figures and the table of the exact world, from what trainers.py and options.py wrote.

python benchmarks/tabular/plots.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from trainers import TRAINERS, known
from world import KLS, TRANSFORMS

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
COLOURS = dict(zip(TRAINERS, ("#0072B2", "#D55E00", "#009E73", "#999999"), strict=True))
MARKS = ("o", "s", "^", "D")
# What a transform is for.
PROCEDURES = {
    "identity": "Standard()",
    **dict.fromkeys(("log", "e^{5u}", "e^{10u}", "best of 4"), "BestOf(n=4)"),
    **dict.fromkeys(("-e^{-10u}", "worst of 4"), "WorstOf(n=4)"),
}
SPOKEN = {"Standard()": "one draw", "BestOf(n=4)": "best of 4", "WorstOf(n=4)": "worst of 4"}
BAR = 0.5


def shown(name: str) -> str:
    """A transform's name, set as a formula where it is one."""
    return f"${name}$" if "{" in name else name


def trainers(rows: list[dict[str, Any]]) -> Any:
    """Total variation, and what is missed of the win rate under the transform's own procedure, by transform."""
    rows = [row for row in rows if row["steps"] == max(r["steps"] for r in rows if alike(r, row))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for shift, (trainer, colour) in enumerate(COLOURS.items()):
        own = [row for row in rows if row["trainer"] == trainer]
        at = [[*TRANSFORMS].index(row["transform"]) + 0.18 * (shift - 1.5) for row in own]
        style = {"color": colour, "marker": MARKS[shift], "linestyle": "", "label": trainer}
        if own:
            left.plot(at, [row["tv"] for row in own], **style)
            right.plot(at, [100 * row["missed"][PROCEDURES[row["transform"]]] for row in own], **style)
    started = {row["transform"]: row["tv_before"] for row in rows}
    for at, name in enumerate(TRANSFORMS):
        if name in started:
            left.hlines(
                started[name], at - 0.4, at + 0.4, color="black", linewidth=1, label="untrained" if not at else None
            )
    right.axhline(BAR, color="black", linestyle=":", label=f"{BAR} points")
    right.axhline(0, color="black", linewidth=0.6)
    left.set(ylabel="total variation from the optimum", yscale="log", title="Distance to the enumerated optimum")
    right.set(ylabel="points of win rate", title="Win rate missed, at the KL that was reached")
    names = [shown(name) for name in TRANSFORMS]
    for ax in (left, right):
        ax.set_xticks(range(len(names)), names, rotation=20)
        ax.grid(alpha=0.3, axis="y")
        ax.set_xlim(-0.6, len(names) - 0.4)
    left.legend(fontsize=8, loc=(0.2, 0.41), ncol=2)  # where there are no marks
    right.legend(fontsize=8)
    return figure


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether only the number of steps may differ."""
    return all(one[key] == other[key] for key in ("trainer", "transform", "seed"))


def options(rows: list[dict[str, Any]]) -> Any:
    """What is missed with K references, by estimator; and for combined rewards."""
    names = [name for name in TRANSFORMS if any(row["case"].startswith(f"finite | {name} |") for row in rows)]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(15.5, 3.8), layout="constrained")
    for ax, name in zip(axes[:-1], names, strict=True):
        lines(ax, [row for row in rows if row["case"].startswith(f"finite | {name} |")], "missed", 100)
        ax.set(title=f"{shown(name)}: {SPOKEN[PROCEDURES[name]]} at KL {KLS[name]}", ylim=(0.02, 10))
        ax.set_yticks((0.03, 0.1, 0.3, 1, 3, 10), ("0.03", "0.1", "0.3", "1", "3", "10"))
    lines(axes[-1], [row for row in rows if row["case"].startswith("combined")], "tv", 1)
    axes[-1].set(title="two scorers, combined", ylabel="total variation from the optimum")
    axes[-1].set_yticks((0.02, 0.05, 0.1, 0.2), ("0.02", "0.05", "0.1", "0.2"))
    axes[0].set(ylabel="points of win rate missed at one KL")
    return figure


def lines(ax: Any, rows: list[dict[str, Any]], what: str, times: float) -> None:
    """One line for each estimator, or way to combine, against K."""
    kinds = list(dict.fromkeys(row["case"].split(" | ")[1 if "combined" in row["case"] else 2] for row in rows))
    for mark, kind in zip(MARKS, kinds, strict=False):
        own = [row for row in rows if f"| {kind} |" in row["case"]]
        sizes = [int(row["case"].split(" | ")[-1]) for row in own]
        values, errors = ([times * row[key] for row in own] for key in (what, f"{what} ±"))
        ax.errorbar(sizes, values, 1.96 * np.array(errors), marker=mark, label=kind, linewidth=1, markersize=4)
    ax.set(xscale="log", yscale="log", xlabel="K")
    ax.set_xticks((4, 16, 64, 256), ("4", "16", "64", "256"))
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def table(rows: list[dict[str, Any]]) -> str:
    """The trainers' table, as the document has it."""
    named = "transform | KL | trainer | steps | reached | TV | untrained | one draw | best of 4 | worst of 4 | rewind"
    lines = [f"| {named} |", "|" + "---|" * 11]
    for row in sorted(rows, key=lambda row: [*TRANSFORMS].index(row["transform"])):
        missed = " | ".join(f"{100 * value:.2f}" for value in row["missed"].values())
        numbers = f"{row['kl']:.3f} | {row['tv']:.4f} | {row['tv_before']:.2f} | {missed}"
        lines.append(
            f"| {row['transform']} | {KLS[row['transform']]} | {row['trainer']} | {row['steps']} | {numbers} |"
        )
    return "\n".join(lines)


def gaps(worlds: dict[str, Any]) -> str:
    """By how much the optimum beats the other rewards under its procedure, enumerated and as theory says, in points."""
    shape = "| procedure | KL | the optimum's win rate over that of | the world | fine-grained | theory |"
    lines = [shape, "|" + "---|" * 6]
    for best, key in (("best of 4", "BestOf(n=4)"), ("worst of 4", "WorstOf(n=4)")):
        for kl in (0.25, 0.5, 1.0):
            rows = {label: rated(each["optima"], kl, key) for label, each in worlds.items()}
            for other in ("identity", "log", "raw"):
                told = [rows[label][best][0] - rows[label][other][0] for label in worlds]
                told.append(rows["fine"][best][1] - rows["fine"][other][1])
                lines.append(f"| {best} | {kl} | {other} | " + " | ".join(f"{100 * gap:.2f}" for gap in told) + " |")
    return "\n".join(lines)


def rated(rows: list[dict[str, Any]], kl: float, key: str) -> dict[str, tuple[float, float]]:
    """The win rate of each reward's optimum under a procedure: enumerated, and as theory says."""
    return {row["reward"]: (row["exact"][key], row["theory"][key]) for row in rows if row["kl"] == kl}


def main() -> None:
    """Both figures and the tables."""
    rows = known("tabular")
    trainers(rows).savefig(FIGURES / "tabular.png", dpi=130)
    options(known("tabular_options")).savefig(FIGURES / "tabular_options.png", dpi=130)
    sys.stdout.write(f"{table(rows)}\n\n{gaps(known('tabular_world'))}\n")


if __name__ == "__main__":
    main()
