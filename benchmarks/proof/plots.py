"""The figures and tables of docs/evidence/proof.md, from what small_model.py and same_prompts.py wrote.

python benchmarks/proof/plots.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parents[1]
FIGURES = HERE.parent / "docs" / "figures"
WORLDS = {"proof_small_model": "own small model", "proof_same_prompts": "SmolLM2-135M"}
COLOURS = {"worst-of:16": "#0072B2", "best-of:16": "#D55E00"}
PROCEDURES = {"worst-of:16": "worst of 16", "best-of:16": "best of 16"}
KL = 0.5


def read(name: str) -> dict[str, Any] | None:
    """Read a world's results, if they are there."""
    path = HERE / "results" / f"{name}.json"
    content: dict[str, Any] | None = json.loads(path.read_text())["results"] if path.exists() else None
    return content


def select_shares(results: dict[str, Any], kl: float = KL, **wanted: Any) -> list[dict[str, Any]]:
    """Select shares, by rising K with infinity last."""
    rows = [row for row in results["shares"] if row["kl"] == kl and all(row[k] == v for k, v in wanted.items())]
    return sorted(rows, key=lambda row: row["k"] or np.inf)


def draw_shares(worlds: dict[str, dict[str, Any]]) -> Any:
    """Draw the realised share against completions, a panel a world, by reward and by judge."""
    figure, axes = plt.subplots(1, len(worlds), figsize=(5.2 * len(worlds), 3.8), sharey=True, squeeze=False)
    for axis, (label, results) in zip(axes[0], worlds.items(), strict=True):
        prompts = results["world"]["prompts"]
        for arm, procedure in PROCEDURES.items():
            for judge, style in (("judge", "-"), ("reward", ":")):
                rows = select_shares(results, arm=arm, procedure=procedure, judge=judge, against="best other")
                finite = [row for row in rows if row["k"]]
                at = [row["k"] * prompts for row in finite]
                values = np.array([row["share"]["value"] for row in finite])
                ends = [row["share"]["interval"] or [value] * 2 for row, value in zip(finite, values, strict=True)]
                low, high = np.array(ends).T if ends else (values, values)
                axis.errorbar(
                    at,
                    values,
                    [values - low, high - values],
                    color=COLOURS[arm],
                    linestyle=style,
                    marker="o" if judge == "judge" else None,
                    capsize=2,
                    label=f"trained for {procedure}, by the {judge}",
                )
                for row in rows:
                    if not row["k"]:
                        axis.axhline(row["share"]["value"], color=COLOURS[arm], linestyle=style, alpha=0.35, lw=1)
        axis.set(xscale="log", title=label, xlabel="completions trained on", ylim=(-0.6, 1.4))
        axis.axhline(0, color="black", lw=0.5)
        axis.axhline(1, color="black", lw=0.5)
    axes[0][0].set_ylabel("realised share of the tabular gap")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def draw_deciles(worlds: dict[str, dict[str, Any]]) -> Any:
    """Draw the density ratio by tenth of u: the optimum's, and what was learned at each K."""
    figure, axes = plt.subplots(len(worlds), 3, figsize=(11, 3 * len(worlds)), squeeze=False)
    for row, (label, results) in zip(axes, worlds.items(), strict=True):
        for axis, arm in zip(row, ("raw", *PROCEDURES), strict=True):
            sizes = sorted({each["k"] for each in results["arms"]}, key=lambda k: k or np.inf)
            for shade, k in zip(np.linspace(0.8, 0.2, len(sizes)), sizes, strict=True):
                found = [
                    each for each in results["arms"] if (each["arm"], each["k"]) == (arm, k) and f"at {KL}" in each
                ]
                for each in found:
                    name = f"K = {k}" if k else "whole law"
                    axis.plot(range(1, 11), each[f"at {KL}"]["deciles"], color=str(shade), label=name)
            axis.plot(range(1, 11), results["optimum_deciles"][arm], "--", color="#D55E00", label="optimum")
            axis.set(title=f"{label}: {arm}", xlabel="tenth of u", yscale="log", ylim=(0.03, 12))
        row[0].set_ylabel("density ratio")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def format_average(value: dict[str, Any], factor: float = 1.0, digits: int = 2) -> str:
    """Format a mean over seeds with its interval."""
    text = f"{factor * value['value']:.{digits}f}"
    if value["interval"]:
        low, high = (f"{factor * end:.{digits}f}" for end in value["interval"])
        text += f" [{low}, {high}]"
    return text


def list_tables(results: dict[str, Any]) -> Iterator[str]:
    """List the page's tables of a world as Markdown."""
    prompts = results["world"]["prompts"]
    for kl in (0.5, 0.25):
        yield f"\nKL {kl}, by the judge, against the best other arm (points of win rate):\n"
        yield "| trained for | K | completions | seeds | share, judge | share, reward | gain, judge | gap, judge |"
        yield "|---|---|---|---|---|---|---|---|"
        for arm, procedure in PROCEDURES.items():
            pairs = zip(
                *(
                    select_shares(results, kl, arm=arm, procedure=procedure, judge=judge, against="best other")
                    for judge in ("judge", "reward")
                ),
                strict=True,
            )
            for ours, theirs in pairs:
                size = (str(ours["k"]), f"{ours['k'] * prompts:,}") if ours["k"] else ("∞", "the law")
                cells = [procedure, *size, str(ours["seeds"]), format_average(ours["share"])]
                cells += [
                    format_average(theirs["share"]),
                    format_average(ours["gain"], 100, 1),
                    f"{100 * ours['gap']:.1f}",
                ]
                yield f"| {' | '.join(cells)} |"
    yield from list_longer(results.get("longer", {}))
    yield "\n| arm | K | mass of the law seen | step kept | KL reached | corr with the target | density ratio |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(results["arms"], key=lambda row: (row["arm"], row["k"] or np.inf)):
        if row["seeds"]:
            deciles = " ".join(f"{x:.2f}" for x in row["deciles"])
            cells = [row["arm"], str(row["k"] or "∞"), f"{row['seen']:.2f}", f"{row['kept']:.0f}", f"{row['kl']:.3f}"]
            cells += [f"{row['correlation']:.2f}", deciles]
            yield f"| {' | '.join(cells)} |"
    for arm, deciles in results["optimum_deciles"].items():
        yield f"optimum {arm}: {' '.join(f'{x:.2f}' for x in deciles)}"
    yield from list_gradients(results["gradients"])


def list_longer(longer: dict[str, Any]) -> Iterator[str]:
    """List what more steps gave: shares at a KL, gains as trained, and the density ratio by tenth of u."""
    for row in longer.get("shares", ()):
        if row["judge"] == "judge" and row["against"] == "best other" and row["procedure"] in PROCEDURES.values():
            share, gain = format_average(row["share"]), format_average(row["gain"], 100, 1)
            yield f"\nmore steps, K = {row['k']}, KL {row['kl']}: {row['procedure']}, {share}, {gain} points"
    for row in longer.get("as_trained", ()):
        if row["judge"] == "judge" and row["procedure"] in PROCEDURES.values():
            gain, kl = format_average(row["gain"], 100, 1), ", ".join(f"{each:.3f}" for each in row["kl"])
            yield f"\nmore steps, as trained, KL {kl}: {row['procedure']}, {gain} of {100 * row['gap']:.1f} points"
    for row in longer.get("arms", ()):
        told = f"step {row['kept']:.0f}, KL {row['kl']:.3f}, correlation {row['correlation']:.2f}"
        yield f"{row['arm']}: {told}, {_numbers(row['deciles'])}"


def list_gradients(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """List what is known of the arms' gradients."""
    for row in rows:
        yield f"\narms: {', '.join(row['arms'])}"
        yield f"correlation of the targets with raw's: {_numbers(row['target_correlations'][0])}"
        for each in row["along_raw"]:
            yield f"cosine with raw's gradient at {each['factor']:g} of the way: {_numbers(each['cosines'][0])}"
        for each in row["few"]:
            yield (
                f"K = {each['k']}: cosine with the law's gradient {_numbers(each['with_exact'])}, of the difference to "
                f"raw {_numbers(each['less_raw'])}"
            )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def main() -> None:
    """Draw the figures and print the tables."""
    worlds = {label: results for name, label in WORLDS.items() if (results := read(name)) is not None}
    for name, figure in (("proof", draw_shares(worlds)), ("proof_deciles", draw_deciles(worlds))):
        figure.savefig(FIGURES / f"{name}.png", dpi=130)
    for label, results in worlds.items():
        print(f"\n## {label}")
        print("\n".join(list_tables(results)))


if __name__ == "__main__":
    main()
