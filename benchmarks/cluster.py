"""Many processes, and a Ray cluster, on one calibration: one table, nothing drawn twice, nobody waits for the dead.

    python benchmarks/cluster.py              all of it, some minutes
    python benchmarks/cluster.py --quick      3 races, and no launchers

- 1, 2 and 3 processes of a shell, two of `accelerate launch`, two of `torchrun`, with the same command each;
- three, of which one is killed with SIGKILL in the middle of a shard;
- 20 pairs that begin at the same instant on an empty directory;
- the scenes of tests/crowds.py: stopped and continued, late, other k, other prompts, a child that outlives its parent;
- Ray, two nodes of one processor each: three workers killed at random times; then a node removed as both are at work.

The sampler is one that waits, so that a table costs 4 s of waiting in one process, and two cores do for all.
Each row says whether the bytes of the table and the names of all files are those of one process, how many prompts were
drawn more than once, and how many processes had a part in it.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import crowds
import deaths
from deaths import Noted, NotedScorer, notes, sampled
from environment import save

from calibrated_rewards.calibration import run as run_module
from calibrated_rewards.calibration.calibrate import calibrate

PROMPTS = [f"prompt {i}" for i in range(80)]
PER_SHARD, PAUSE = 2, 0.1
MEMORY = 100 * 2**20
LAUNCHERS = {
    "accelerate launch": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
}


def work(folder: Path, **options: Any) -> None:
    """What each process is told to do."""
    log = f"{folder}.log"
    options |= {"prompts_per_shard": PER_SHARD, "show_progress": False}
    calibrate(PROMPTS, Noted(log, PAUSE), NotedScorer(log), folder, k=4, **options)


def shell(folder: Path, launcher: list[str] | None = None) -> subprocess.Popen[bytes]:
    """This script, by a command of its own."""
    # What a launcher says of the settings that it was not given is not of interest.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if launcher else {}
    command = [sys.executable, *(launcher or []), __file__, "--work", str(folder)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)  # type: ignore[call-overload]


def launched(folder: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """Processes as people start them."""
    for count in (1, 2, 3):
        began = time.monotonic()
        codes = [process.wait() for process in [shell(folder / str(count)) for _ in range(count)]]
        yield {"processes": count, "seconds": round(time.monotonic() - began, 1), **_came_of(folder, str(count), codes)}
    processes = [shell(folder / "killed") for _ in range(3)]
    victim = _at_work(folder / "killed", 3)
    os.kill(victim, signal.SIGKILL)
    yield {"processes": "3, one killed", **_came_of(folder, "killed", [process.wait() for process in processes])}
    for name, launcher in ({} if quick else LAUNCHERS).items():
        yield {"processes": f"2 by {name}", **_came_of(folder, name, [shell(folder / name, launcher).wait()])}


def _at_work(folder: Path, count: int) -> int:
    """Wait until so many processes sample; one that does so now."""
    while True:
        lines = notes(f"{folder}.log")
        if len({line["pid"] for line in lines}) >= count and "sampling" in lines[-1]:
            return int(lines[-1]["pid"])
        time.sleep(0.005)


def _came_of(folder: Path, name: str, codes: list[int]) -> dict[str, Any]:
    drawn = sampled(f"{folder / name}.log")
    return {
        "exit_codes": codes,
        "identical": deaths.files(folder / name) == deaths.files(folder / "1"),
        "prompts": len(drawn),
        "drawn_again": drawn.total() - len(drawn),
        "at_work": len({line["pid"] for line in notes(f"{folder / name}.log") if "sampling" in line}),
    }


def scenes(folder: Path, races: int) -> dict[str, Any]:
    """Those of the tests, in short."""
    run_module.PAUSE = 0.05
    found = crowds.scenes(folder, races)
    alone = found["1 together"]["files"]
    rows = {}
    for name, scene in found.items():
        again = sum(count - 1 for count in scene["sampled"].values())
        rows[name] = {"exit_codes": scene["codes"], "identical": scene["files"] == alone, "drawn_again": again}
        rows[name]["at_work"] = scene["at_work"]
    raced = [rows.pop(name) for name in [*rows] if name.startswith("race")]
    return {
        **rows,
        "races": {
            "pairs": len(raced),
            "identical": sum(row["identical"] for row in raced),
            "drawn_again": sum(row["drawn_again"] for row in raced),
        },
    }


def on_ray(folder: Path) -> Iterator[dict[str, Any]]:
    """Two nodes, and what may happen to them."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(Path(crowds.__file__).parent)
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = nodes.add_node(num_cpus=1, object_store_memory=MEMORY)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield _by_ray(folder, "ray", {})
        rng = random.Random(0)
        at = {rng.randrange(4, 36): "kill" for _ in range(3)}
        yield _by_ray(folder, "ray, workers killed", at)
        yield _by_ray(folder, "ray, a node removed", {8: lambda: nodes.remove_node(second)})
    finally:
        ray.shutdown()
        nodes.shutdown()


def _by_ray(folder: Path, name: str, at: dict[int, Any]) -> dict[str, Any]:
    from calibrated_rewards.calibration.cluster import RayCluster

    log = f"{folder / name}.log"

    def cluster(function: Any, tasks: Any) -> Iterator[Any]:
        for number, task in enumerate(RayCluster(2)(function, tasks)):
            if at.get(number) == "kill":
                os.kill(_at_work(folder / name, 1), signal.SIGKILL)
            elif number in at:
                while len({line["pid"] for line in notes(log)[-4:]}) < 2:
                    time.sleep(0.05)
                at[number]()
            yield task

    began = time.monotonic()
    work(folder / name, cluster=cluster)
    return {"processes": name, "seconds": round(time.monotonic() - began, 1), **_came_of(folder, name, [0])}


def main() -> None:
    """Run it, and say what came of it; or do what one of the processes does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    deaths.warm()
    results: dict[str, Any] = {"processes": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "scenes").mkdir()
        results["scenes"] = scenes(folder / "scenes", 3 if args.quick else 20)
        print(*results["scenes"].items(), sep="\n", flush=True)
        for rows in (launched(folder, args.quick), on_ray(folder)):
            for row in rows:
                results["processes"].append(row)
                print(row, flush=True)
    if not args.quick:
        print(save("cluster", results))


if __name__ == "__main__":
    main()
