"""The demo's numbers, times and figure for the documents.

    python benchmarks/demo.py              # runs `calibrated-rewards demo --identity`, or goes on with what is there
    python benchmarks/demo.py --again      # runs it a second time elsewhere: the same numbers?

Beside the comparison by weights on the reference's rollouts, completions are drawn from both policies: another way, of
which no weight can be wrong.

Seconds are of the processors, of the whole process, since the machine may be shared; those by the clock are kept too. A
step that went on where it was is counted as long as it was worked on. Writes benchmarks/results/demo.json and
docs/figures/demo.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import save
from matplotlib.figure import Figure

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.demo import pipeline
from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import difference
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies
from calibrated_rewards.evaluation.references import read_scores
from calibrated_rewards.evaluation.win_rate import win_rate
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "demo.png"
# Completions that are drawn for each held-out prompt.
FRESH = 64


def run(out: Path) -> None:
    """The command."""
    subprocess.run([sys.executable, "-m", "calibrated_rewards", "demo", "--identity", "--out", str(out)], check=True)


def compare_fresh(out: Path) -> dict[str, list[float]]:
    """Draw completions of both policies, and compare them by the judge under each procedure: gain, low, high."""
    demo = pipeline.Demo(pipeline.make_real_parts(CACHE.expanduser(), pipeline.FULL), pipeline.FULL, out)
    decoding = Decoding(demo.scale.tokens, demo.scale.temperature)
    drawn = {}
    for name in (pipeline.OPTIMUM, pipeline.RAW):
        at = out / "fresh" / name
        sampler = load_sampler(
            out / name / "model", decoding, dtype=demo.dtype, prompts_at_once=pipeline.PROMPTS_AT_ONCE
        )
        # Other seeds than those of the reference's rollouts.
        calibrate(demo.parts.held_out, sampler, demo.scorers, at, k=FRESH, seed=1, prompts_per_shard=pipeline.SHARD)
        drawn[name] = read_scores(at, "reward", "judge")
    gains = {}
    for procedure in pipeline.PROCEDURES:
        ours, theirs = (win_rate(own, demo.held_out, procedure) for own in drawn.values())
        gain = difference(ours, theirs)
        gains[repr(procedure)] = [gain.value, *gain.interval()]
    return gains


def figure(compared: HeldOutPolicies, path: Path = FIGURE) -> None:
    """Win rates of the policies by what they are served with, and the paired differences to the first."""
    drawn = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    plots.held_out(compared, ax=left)
    plots.held_out_gains(compared, ax=right)
    kls = sorted({f"{check.kl.value:.2f}" for check in compared.checks.values()})
    drawn.suptitle(f"Train for the way it is served: policies at KL {' to '.join(kls[:: max(1, len(kls) - 1)])} nats")
    drawn.savefig(path, dpi=130)


def main() -> None:
    """Run, or look at what is there; keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--again", action="store_true", help="run it a second time, and compare")
    args = parser.parse_args()
    if not (args.out / "held_out.json").exists():
        run(args.out)
    compared = HeldOutPolicies.load(args.out / "held_out.json")
    diary = json.loads((args.out / "demo.json").read_text())
    results: dict[str, Any] = {
        **diary,
        "seconds in all": sum(diary["seconds"].values()),
        "processor seconds in all": sum(diary["processor"].values()),
        "claims": [*compared.claims()],
        "held out": json.loads((args.out / "held_out.json").read_text()),
        "fresh draws": compare_fresh(args.out),
        "frontier": FrontierEstimate.load(args.out / "frontier.json").as_json(),
        "training": {
            name: json.loads((args.out / name / "model" / "training.json").read_text()) for name in compared.checks
        },
    }
    if args.again:
        with tempfile.TemporaryDirectory() as other:
            run(Path(other) / "demo")
            again = HeldOutPolicies.load(Path(other) / "demo" / "held_out.json")
            results["a second run has the same numbers"] = again == compared
    figure(compared)
    print(*compared.claims(), compared, save("demo", results), sep="\n")


if __name__ == "__main__":
    main()
