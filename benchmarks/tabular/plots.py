"""The figures and the tables of the exact world, from what trainers.py, options.py and offline.py wrote.

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
from trainers import TRAINERS
from world import KLS, TRANSFORMS, known

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


# The losses of offline.py that are drawn, in the order of the legend.
OFFLINE = {
    "weighted": ("#D55E00", "s-"),
    "control-variate": ("#E69F00", "v-"),
    "regression": ("#0072B2", "o-"),
    "regression:exact": ("#56B4E9", "^-"),
    "centred": ("#009E73", "D-"),
    "fixed references": ("black", "--"),
}
FOREVER = 8000  # where K = infinity is drawn


def offline(rows: list[dict[str, Any]]) -> Any:
    """What offline losses miss against K for two transforms, and against epochs for one."""
    figure, axes = plt.subplots(1, 3, figsize=(15.5, 4.2), layout="constrained")
    for ax, name in zip(axes[:2], ("identity", "best of 4"), strict=True):
        for loss, (colour, style) in OFFLINE.items():
            own = converged(rows, "no ties", name, loss)
            at = [size or FOREVER for size in own]
            # Numerical zeros have no logarithm.
            missed = [max(row["missed"], 0.003) for row in own.values()]
            ax.plot(at, missed, style, color=colour, label=loss, markersize=4, linewidth=1)
        theory = {size: row["predicted"] for size, row in own.items() if size}
        ax.plot([*theory], [*theory.values()], ":", color="black", label="fixed references, theory")
        ax.axhline(BAR, color="grey", linewidth=0.6)
        ax.set(xscale="log", yscale="log", xlabel="K", ylim=(0.002, 50), ylabel="points of win rate missed at one KL")
        ax.set(title=f"{name}: {SPOKEN[PROCEDURES[name]]} at KL {KLS[name]}")
        ax.set_xticks((8, 32, 100, 1000, FOREVER), ("8", "32", "100", "1000", "$\\infty$"))
        ax.set_yticks((0.003, 0.01, 0.1, BAR, 1, 10), ("0", "0.01", "0.1", f"{BAR}", "1", "10"))
        ax.minorticks_off()
    for loss, (colour, style) in OFFLINE.items():
        for row in rows:
            if row["case"] == {"part": "epochs", "world": "no ties", "transform": "best of 4", "K": 100, "loss": loss}:
                epochs = row["epochs"]
                values = [each["missed"] for each in epochs.values()]
                axes[2].plot([*map(int, epochs)], values, style, color=colour, markersize=4, linewidth=1)
    axes[2].set(xscale="log", yscale="log", xlabel="epochs", title="best of 4, K = 100, by epoch")
    axes[2].set_xticks((1, 3, 10, 30), ("1", "3", "10", "30"))
    axes[2].set_yticks((1, 2, 5, 10), ("1", "2", "5", "10"))
    axes[2].minorticks_off()
    axes[1].legend(fontsize=8)
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def converged(rows: list[dict[str, Any]], world: str, name: str, loss: str) -> dict[int | None, dict[str, Any]]:
    """The minimisers of an offline loss, by K."""
    own = {"part": "converged", "world": world, "transform": name, "loss": loss}
    return {row["case"]["K"]: row for row in rows if {**row["case"], **own} == row["case"]}


def offline_tables(rows: list[dict[str, Any]]) -> str:
    """By loss and transform, what is missed at three K; the optima of the rivals; distances by epoch."""
    names = [name for name in TRANSFORMS if converged(rows, "no ties", name, "centred")]
    sizes = (32, 100, 1000)
    lines = ["| | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for loss in (
        "fixed references",
        "fixed references, drawn completions",
        *(each for each in OFFLINE if "fixed" not in each),
    ):
        cells = [converged(rows, "no ties", name, loss) for name in names]
        told = (" / ".join(f"{each[size]['missed']:.2f}" for size in sizes) for each in cells)
        lines.append(f"| {loss} | " + " | ".join(told) + " |")
    own = [converged(rows, "no ties", name, "fixed references") for name in names]
    told = (" / ".join(f"{each[size]['predicted']:.2f}" for size in sizes) for each in own)
    lines.append("| fixed references, theory | " + " | ".join(told) + " |")
    lines += ["", "| loss | n | KL | TV to the best of n | one draw | best of 4 | worst of 4 |", "|" + "---|" * 7]
    for row in rows:
        case = row["case"]
        if case["part"] == "rivals" and case["world"] == "no ties":
            points = " | ".join(f"{each['points']:.2f}" for each in row["missed"].values())
            lines.append(
                f"| {case['loss']} | {case['n']} | {row['kl']:.2f} | {row['tv to the best of n']:.3f} | {points} |"
            )
    lines += [
        "",
        "| K | loss | " + " | ".join(f"after epoch {n}" for n in (1, 3, 10, 30)) + " |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        case = row["case"]
        if case["part"] == "epochs":
            told = (f"{row['epochs'][n]['kl']:.2f}, {row['epochs'][n]['missed']:.1f}" for n in ("1", "3", "10", "30"))
            lines.append(f"| {case['K']} | {case['loss']} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def main() -> None:
    """All figures and tables."""
    rows = known("tabular")
    trainers(rows).savefig(FIGURES / "tabular.png", dpi=130)
    options(known("tabular_options")).savefig(FIGURES / "tabular_options.png", dpi=130)
    offline(known("tabular_offline")).savefig(FIGURES / "tabular_offline.png", dpi=130)
    tables = table(rows), gaps(known("tabular_world")), offline_tables(known("tabular_offline"))
    sys.stdout.write("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
