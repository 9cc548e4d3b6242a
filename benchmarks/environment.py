"""The machine and the versions that a benchmark ran on, to be kept beside its numbers."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("calibrated-rewards", "numpy", "scipy", "torch", "numba")


def environment() -> dict[str, str | float | None]:
    """Python, packages, processor, cores, how busy they are, and memory; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        **{package: _version(package) for package in PACKAGES},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(name: str, results: object) -> Path:
    """Write benchmarks/results/<name>.json: the command, the environment and the results."""
    script = Path(sys.argv[0]).resolve()
    here = Path(__file__).resolve().parent
    command = " ".join(["python", str(script.relative_to(here.parent)), *sys.argv[1:]])
    path = here / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"command": command, "environment": environment(), "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
