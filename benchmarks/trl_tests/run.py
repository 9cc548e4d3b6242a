"""TRL's own GRPO and RLOO tests with a CalibratedReward in place of their rewards, against the same tests as they are.

    make trl-tests TRL=path/to/a/checkout/of/trl
    python benchmarks/trl_tests/run.py CHECKOUT [-k EXPRESSION]

Both runs use the checkout's trainers and tests, and tiny models built here (`checkpoints.py`). A test that passes as it
is and fails with ours is our fault, and the exit status is 1, but for those that assert what their own reward gives.
Results: benchmarks/results/trl_tests.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from environment import save  # noqa: E402

FILES = ("tests/test_grpo_trainer.py", "tests/test_rloo_trainer.py")
# Tests that cannot pass with another reward than their own, and why.
OF_OWN_REWARD = {
    "test_reward_metric_reflects_reward_weights": "it asserts the numbers of two constant rewards; their rank is 1/2",
}


def main() -> int:
    """Run the tests twice, compare, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of TRL's repository, with its tests")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only these tests, as in pytest")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    if lacking := [name for name in FILES if not (checkout / name).exists()]:
        parser.error(f"{options.checkout} is no checkout of TRL: it has no {', '.join(lacking)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1"}
        build = [sys.executable, str(HERE / "checkpoints.py"), str(checkout), str(folder)]
        subprocess.run(build, check=True, env=environment, stdout=subprocess.DEVNULL)
        as_they_are = run_tests(checkout, folder, environment, options.k, replace=False)
        with_ours = run_tests(checkout, folder, environment, options.k, replace=True)
    results = compare(as_they_are, with_ours)
    results["trl"] = (checkout / "VERSION").read_text().strip()
    results["commit"] = commit_of(checkout)
    print(json.dumps(results, indent=2))
    if not options.k:
        save("trl_tests", results)
    return 1 if results["pass as they are, fail with ours"] else 0


def run_tests(
    checkout: Path, folder: Path, environment: dict[str, str], expression: str, *, replace: bool
) -> dict[str, Any]:
    """The outcome of each test by its id."""
    results = folder / f"outcomes_{replace}.json"
    ours = {
        "TRL_TESTS_FOLDER": str(folder),
        "TRL_TESTS_RESULTS": str(results),
        "TRL_TESTS_REPLACE": str(int(replace)),
    }
    select = ["-k", expression] if expression else []
    command = [sys.executable, "-m", "pytest", "-p", "calibrated_plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    files = [str(checkout / name) for name in FILES]
    subprocess.run(
        [*command, "-c", str(checkout / "pyproject.toml"), f"--rootdir={checkout}", *select, *files],
        env={**environment, **ours},
        check=False,  # failures are compared, not raised
    )
    outcomes: dict[str, Any] = json.loads(results.read_text())
    return outcomes


def compare(as_they_are: dict[str, Any], with_ours: dict[str, Any]) -> dict[str, Any]:
    """Counts, and every test on which the two runs differ."""
    if as_they_are.keys() != with_ours.keys():
        raise RuntimeError(f"the runs have different tests: {sorted(as_they_are.keys() ^ with_ours.keys())}")
    both = [(name, as_they_are[name]["outcome"], with_ours[name]["outcome"]) for name in sorted(with_ours)]
    rewards = [reward for each in with_ours.values() for reward in each["replaced"]]
    return {
        "as they are": dict(Counter(first for _, first, _ in both)),
        "with ours": dict(Counter(second for _, _, second in both)),
        "tests with a replaced reward": sum(bool(each["replaced"]) for each in with_ours.values()),
        "passed with a replaced reward": sum(
            bool(each["replaced"]) and each["outcome"] == "passed" for each in with_ours.values()
        ),
        "replaced rewards": dict(Counter(rewards)),
        "pass as they are, fail with ours": {
            name: with_ours[name]["why"]
            for name, first, second in both
            if (first, second) == ("passed", "failed") and reason_of(name) is None
        },
        "of the numbers of their own reward": {
            name: reason_of(name) for name, first, second in both if first != second and reason_of(name) is not None
        },
        "fail as they are, pass with ours": [n for n, first, second in both if (first, second) == ("failed", "passed")],
        "fail in both, for want of the real tokenizer or weights": {
            name: as_they_are[name]["why"] for name, first, second in both if first == second == "failed"
        },
        "skipped": dict(
            Counter(
                each["why"].split("Skipped: ")[-1].rstrip("')")
                for each in with_ours.values()
                if each["outcome"] == "skipped"
            )
        ),
    }


def reason_of(name: str) -> str | None:
    """Why a test is about its own reward; None for all others."""
    return OF_OWN_REWARD.get(name.rsplit("::", maxsplit=1)[-1].partition("[")[0])


def commit_of(checkout: Path) -> str | None:
    """The checkout's commit, if it is a git repository."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
