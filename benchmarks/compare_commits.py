"""Is this commit slower than another? The same benchmarks on both, in turn, and the ratio of every time they measure.

    python benchmarks/compare_commits.py 8f949c2

Each side runs from its own checkout, in rounds (other, this, other, this, ...), so that a busy machine slows both. A
ratio is this commit's time over the other's; per benchmark the median over all its times, and the times furthest off.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import save

ROOT = Path(__file__).resolve().parents[1]
# Each with the file that it leaves in benchmarks/results.
COMMANDS = {
    "overhead": ("overhead.py --rounds 2", "overhead"),
    "lookup": ("lookup.py --prompts 100000", "lookup"),
    "scoring": ("scoring.py --layers 2 --width 128 --rounds 2", "scoring_cpu_float32_2x128"),
    "sampling": ("sampling.py --layers 2 --width 128 --rounds 2 --cases 256,16,16", "sampling_small_llama_cpu_float32"),
    "server": ("server.py --layers 2 --width 128 --pairs 256 --rounds 2", "server"),
}
TIMES = ("_ms", "_us", "_s", "seconds", "milliseconds", "us_per", "ns_per")
RATES = ("per_second",)


def find_times(results: Any, name: str = "", timed: float = 0.0) -> Iterator[tuple[str, float]]:
    """Every time in a benchmark's results by its place; rates are turned into times, settings are left out."""
    if isinstance(results, dict):
        for key, value in results.items():
            kind = 1.0 if str(key).endswith(TIMES) or "ns_per" in str(key) or "_us" in str(key) else timed
            kind = -1.0 if any(rate in str(key) for rate in RATES) else kind
            yield from find_times(value, f"{name}/{key}", kind)
    elif isinstance(results, list):
        for at, value in enumerate(results):
            yield from find_times(value, f"{name}/{at}", timed)
    elif timed and isinstance(results, int | float) and results > 0:
        yield name, float(results) ** timed


def check_out(commit: str, folder: Path) -> Path:
    """Make a checkout of a commit in a folder of its own."""
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], cwd=ROOT, check=True)
    return folder


def run(checkout: Path, command: str, result: str) -> dict[str, float]:
    """Run a benchmark on a checkout's code and read the times that it saved."""
    script, *options = command.split()
    path = checkout / "benchmarks" / "results" / f"{result}.json"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    path.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not path.exists():
        raise SystemExit(f"{command} of {checkout} saved nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(find_times(json.loads(path.read_text())["results"]))


def compare(other: Path, this: Path, name: str, rounds: int) -> dict[str, Any]:
    """Ratios of one benchmark, each the median over the rounds."""
    ratios: dict[str, list[float]] = {}
    for _ in range(rounds):
        before, after = run(other, *COMMANDS[name]), run(this, *COMMANDS[name])
        for key in before.keys() & after.keys():
            ratios.setdefault(key, []).append(after[key] / before[key])
    medians = {key: statistics.median(values) for key, values in ratios.items()}
    ranked = sorted(medians, key=lambda key: medians[key])
    return {
        "command": COMMANDS[name][0],
        "times": len(medians),
        "median_ratio": round(statistics.median(medians.values()), 3),
        "fastest": {key: round(medians[key], 3) for key in ranked[:3]},
        "slowest": {key: round(medians[key], 3) for key in ranked[-3:]},
    }


def main() -> None:
    """Compare, print a line for each benchmark, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the other side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    results: dict[str, Any] = {"other": options.commit, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        other, this = check_out(options.commit, Path(folder, "other")), check_out("HEAD", Path(folder, "this"))
        try:
            for name in options.only:
                results[name] = compare(other, this, name, options.rounds)
                print(f"{name:9} {results[name]['median_ratio']:.3f} of the time   slowest {results[name]['slowest']}")
        finally:
            for checkout in (other, this):
                subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=False)
    save("compare_commits", results)


if __name__ == "__main__":
    main()
