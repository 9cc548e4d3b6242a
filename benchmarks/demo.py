"""The demo's numbers, times and figure for the documents.

    python benchmarks/demo.py              # runs `calibrated-rewards demo --out demo`, or takes what is there
    python benchmarks/demo.py --again      # runs it a second time elsewhere: the same numbers?

Seconds are on the wall, of a run that nothing else disturbed; a step that went on where it was is counted as long as it
was worked on. Writes benchmarks/results/demo.json and docs/figures/demo.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from environment import save
from matplotlib.figure import Figure

from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.results import Evaluation

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "demo.png"
PARTS = ("seconds_drawing", "seconds_scoring", "seconds_lookup")


def run(out: Path) -> None:
    """The command."""
    subprocess.run([sys.executable, "-m", "calibrated_rewards", "demo", "--out", str(out)], check=True)


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    """The log of a training run."""
    return [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]


def shares(logged: list[dict[str, Any]]) -> dict[str, float]:
    """Of the seconds of a step, but for the first one: drawing, scoring without look-up, look-up, and the rest."""
    seconds = {name: np.array([row[name] for row in logged[1:]]).sum() for name in ("seconds", *PARTS)}
    whole = seconds["seconds"]
    told = {
        "drawing": seconds["seconds_drawing"] / whole,
        "reward model": (seconds["seconds_scoring"] - seconds["seconds_lookup"]) / whole,
        "rank, look-up and all else of the reward": seconds["seconds_lookup"] / whole,
    }
    return {**told, "the rest": 1 - sum(told.values()), "seconds a step": whole / (len(logged) - 1)}


def figure(out: Path, found: Evaluation, foreseen: FrontierEstimate) -> None:
    """What the reweighted rollouts promise, how training went, what came out."""
    drawn = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = drawn.subplots(1, 3, width_ratios=[1.5, 1, 1])
    plots.reweighted(foreseen, "BestOf(n=4)", "judge", ax=left)
    plots.training({each.name: rows(out, each.name) for each in found.policies}, "u", ax=middle)
    plots.outcomes(found, "judge", ax=right)
    for ax, title in ((left, "before training: rollouts, reweighted"), (middle, "training"), (right, "after")):
        ax.set_title(title, fontsize=11)
    drawn.savefig(FIGURE, dpi=130)


def main() -> None:
    """Run, or look at what is there; keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--again", action="store_true", help="run it a second time, and compare")
    args = parser.parse_args()
    if not (args.out / "report.html").exists():
        run(args.out)
    found = Evaluation.load(args.out / "evaluation" / "evaluation.json")
    foreseen = FrontierEstimate.load(args.out / "frontier.json")
    results: dict[str, Any] = {
        **json.loads((args.out / "demo.json").read_text()),
        "shares of a training step": {each.name: shares(rows(args.out, each.name)) for each in found.policies},
        "evaluation": found.as_json(),
        "frontier": foreseen.as_json(),
    }
    results["seconds in all"] = sum(results["seconds"].values())
    if args.again:
        with tempfile.TemporaryDirectory() as other:
            run(Path(other) / "demo")
            again = Evaluation.load(Path(other) / "demo" / "evaluation" / "evaluation.json")
            results["a second run has the same numbers"] = again.as_json() == found.as_json()
    figure(args.out, found, foreseen)
    print(found, foreseen, save("demo", results), sep="\n")


if __name__ == "__main__":
    main()
