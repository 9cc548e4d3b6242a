"""Every framework's own loading and calling code with the shipped adapter: each number against the reward's own.

    make frameworks                      # makes the environments, then this
    python benchmarks/frameworks/run.py [--environments FOLDER] [--only NAME ...]

Each script runs in its environment of `setup.sh`. What did not run is in the result too, and why; then, or if a number
differs, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from environment import save  # noqa: E402

# The reward is float64, and most frameworks hold rewards as float32.
TOLERANCE = 1e-6
BESIDE = (
    "torch",
    "transformers",
    "ray",
    "tensordict",
    "hydra-core",
    "tinker",
    "datasets",
    "numpy",
    "calibrated-rewards",
)
ASK = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Run:
    """A script, its environment, and the source that it needs."""

    name: str
    script: str
    environment: str
    source: str | None = None


RUNS = (
    Run("verl", "verl_loading.py", ".venv-frameworks"),
    Run("OpenRLHF", "openrlhf_loading.py", ".venv-frameworks"),
    Run("ms-swift", "swift_loading.py", ".venv-frameworks"),
    Run("SkyRL", "skyrl_loading.py", ".venv-frameworks"),
    Run("slime", "source_loading.py", ".venv-frameworks", "slime"),
    Run("AReaL", "source_loading.py", ".venv-frameworks", "AReaL"),
    Run("NeMo-RL", "source_loading.py", ".venv-frameworks", "NeMo-RL"),
    Run("TRL PPO", "trl_ppo.py", ".venv-frameworks-trl"),
    Run("tinker-cookbook", "tinker_cookbook_group.py", ".venv-frameworks-trl"),
    Run("verifiers", "verifiers_v1.py", ".venv-frameworks-verifiers"),
    Run("verifiers, Rubric", "verifiers_v0.py", ".venv-frameworks-rubric"),
)


class Lacking(Exception):
    """Why a framework did not run, without paths of this machine."""


def ran(run: Run, folder: Path) -> dict[str, Any]:
    """What its script reports; `Lacking` if there is no report, or if a number differs."""
    python, arguments = folder / run.environment / "bin" / "python", [str(HERE / run.script)]
    if not python.exists():
        raise Lacking(f"no {run.environment}: sh benchmarks/frameworks/setup.sh")
    if run.source:
        source = folder / ".venv-frameworks-sources" / run.source
        if not (source / "COMMIT").exists():
            raise Lacking(f"no .venv-frameworks-sources/{run.source}: sh benchmarks/frameworks/setup.sh sources")
        arguments += [run.source, str(source)]
    begun = time.monotonic()
    found = reported(run, said(run, python, arguments))
    if run.source:
        found["version"] = f"source, {(source / 'COMMIT').read_text().strip()}"
    print(f"{run.name:>17} {found['version']:<20} worst difference {max(found['worst'].values()):.1e}")
    # nan is not below anything
    if off := {name: difference for name, difference in found["worst"].items() if not difference < TOLERANCE}:
        raise Lacking(f"these differ from the reward's own: {off}")
    return {**found, "seconds": round(time.monotonic() - begun, 1), "environment": run.environment}


def said(run: Run, python: Path, arguments: list[str]) -> str:
    """What a script prints."""
    try:
        done = subprocess.run([python, *arguments], capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        raise Lacking(f"{run.script} took more than 600 seconds") from None
    if done.returncode or not done.stdout.strip():
        print(done.stderr[-4000:], file=sys.stderr)
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise Lacking(f"{run.script} ended with {done.returncode}: {re.sub(r'(/[^/ :]+)+/', '', last)[:300]}")
    return done.stdout


def reported(run: Run, printed: str) -> dict[str, Any]:
    """The last line of it."""
    try:
        found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    except ValueError:
        raise Lacking(f"{run.script} ends with no report") from None
    return found


def versions(folder: Path, environment: str) -> dict[str, str]:
    """What is beside the frameworks in an environment."""
    python = folder / environment / "bin" / "python"
    told = subprocess.run([python, "-c", ASK, *BESIDE], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(told)
    return found


def main() -> int:
    """Compare, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=HERE.parents[1], help="where setup.sh's folders lie")
    parser.add_argument(
        "--only", nargs="+", choices=[run.name for run in RUNS], help="the others keep the results that they have"
    )
    asked = parser.parse_args()
    frameworks, lacking = [], {}
    for run in RUNS:
        if asked.only and run.name not in asked.only:
            continue
        try:
            frameworks.append(ran(run, asked.environments.absolute()))
        except Lacking as error:
            print(f"{run.name:>17} {error}", file=sys.stderr)
            lacking[run.name] = str(error)
    used = sorted({found["environment"] for found in frameworks})
    beside = {name: versions(asked.environments.absolute(), name) for name in used}
    if asked.only:
        before = json.loads((HERE.parent / "results" / "frameworks.json").read_text())["results"]
        new = {each["framework"]: each for each in frameworks}
        frameworks = [new.get(each["framework"], each) for each in before["frameworks"]]
        beside, lacking = {**before["environments"], **beside}, {**before["did_not_run"], **lacking}
    if not (asked.only and lacking):
        sys.argv = [sys.argv[0]]  # where the environments lay is nobody's business
        save("frameworks", {"environments": beside, "frameworks": frameworks, "did_not_run": lacking})
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
