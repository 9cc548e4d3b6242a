"""Every framework's own loading and calling code with the shipped adapter: each number against the reward's own.

    make frameworks                                            # sets up .venv-frameworks first
    python benchmarks/frameworks/run.py [--sources FOLDER]     # with slime/, AReaL/ and NeMo-RL/ checked out in it

A framework that is not installed is an error, one whose source is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from environment import save  # noqa: E402

INSTALLED = ("verl", "openrlhf", "swift", "skyrl")
FROM_SOURCE = ("slime", "AReaL", "NeMo-RL")
BESIDE = ("transformers", "ray", "tensordict", "hydra-core")
# The reward is float64, and most frameworks hold rewards as float32.
TOLERANCE = 1e-6


def commit(folder: Path) -> str | None:
    """What a source says that it is: a git checkout's commit, or the file COMMIT that lies in it."""
    if (folder / "COMMIT").exists():
        return (folder / "COMMIT").read_text().strip()
    told = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def ran(script: str, *arguments: str) -> dict[str, Any]:
    """What a script reports."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{found['framework']:>9} {found['version']:<20} worst difference {max(found['worst'].values()):.1e}")
    assert max(found["worst"].values()) < TOLERANCE, found
    return {**found, "seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    """Compare, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=HERE.parents[1] / ".venv-frameworks" / "sources")
    sources = parser.parse_args().sources
    results = [ran(f"{name}_loading.py") for name in INSTALLED]
    for name in FROM_SOURCE:
        if (sources / name).is_dir():
            found = ran("source_loading.py", name, str(sources / name))
            results.append({**found, "version": f"source, {commit(sources / name)}"})
    sys.argv = [sys.argv[0]]  # where the sources lay is nobody's business
    save("frameworks", {"beside": {name: version(name) for name in BESIDE}, "frameworks": results})


if __name__ == "__main__":
    main()
