"""Whether `calibrated-rewards demo --quick`, stopped at random and called again, has the numbers of one go.

    python benchmarks/demo_kills.py --runs 20    # a minute each at most

Ctrl-C and SIGKILL in turns, at a moment between the start and the time that a whole demo took. The stopped ones run
their parts side by side, in two processes; the whole one and those that go on do not. What is compared are the bytes of
the tables, the trained weights, the frontier and the evaluation. Writes benchmarks/results/demo_kills.json.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import save
from tqdm import tqdm

COMPARED = (
    "table/reward/table.safetensors",
    "held-out/judge/table.safetensors",
    "frontier.json",
    "raw/model/model.safetensors",
    "worst-of-16/model/model.safetensors",
    "held_out.json",
)


def start_demo(out: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start a miniature demo in a process of its own, which starts others for its parts."""
    options = ["--quick", "--out", str(out), "--processes", str(processes)]
    command = [sys.executable, "-m", "calibrated_rewards", "demo", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """One in one go, the others stopped once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    draw, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        start = time.perf_counter()
        assert start_demo(whole).wait() == 0
        took = time.perf_counter() - start
        for run in tqdm(range(args.runs), unit="run"):
            out, how = Path(folder) / str(run), (signal.SIGINT, signal.SIGKILL)[run % 2]
            process, after = start_demo(out, processes=2), draw.uniform(0, took)
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.send_signal(how)
            code = process.wait()
            again = start_demo(out).wait()
            differ = [name for name in COMPARED if (out / name).read_bytes() != (whole / name).read_bytes()]
            found.append({"signal": how.name, "after": round(after, 1), "exit": code, "again": again, "differ": differ})
    right = sum(not each["differ"] and each["again"] == 0 for each in found)
    print(f"{right} of {len(found)} ended with the numbers of a run that was not stopped")
    print(save("demo_kills", {"seconds of a whole demo": round(took, 1), "right": right, "runs": found}))


if __name__ == "__main__":
    main()
