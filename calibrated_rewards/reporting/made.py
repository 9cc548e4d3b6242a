"""How it was made: versions, seeds, settings and fingerprints, as they are kept."""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from calibrated_rewards.reporting.experiment import Experiment
from calibrated_rewards.reporting.markup import Markup, Section, element, folded, table

PACKAGES = ("calibrated-rewards", "numpy", "scipy", "torch", "transformers", "trl", "peft")


def made(of: Experiment) -> Section:
    """The section."""
    blocks = [
        element(
            "p",
            "This page was made by ",
            element("code", f"calibrated-rewards report {of.at}"),
            ", with:",
        ),
        table(("", ""), _versions()),
        *_kept(of),
    ]
    return Section("How it was made", tuple(blocks))


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _kept(of: Experiment) -> Iterator[Markup]:
    if of.demo:
        yield folded("The demo: its sizes, and the seconds of its steps", _json(of.demo))
    for name, references in of.tables.items():
        meta = references.meta
        probes = meta.get("probes")
        shown = {**meta, "probes": f"{len(probes)} pairs"} if isinstance(probes, list) else meta
        yield folded(f"Calibration: {name}", _json(shown))
    if of.reward is not None:
        yield folded("Calibrated reward", _json(of.reward))
    for name, run in of.runs.items():
        if run.settings:
            yield folded(f"Training: {name}", _json(run.settings))


def _json(what: object) -> Markup:
    return element("pre", json.dumps(what, indent=2, ensure_ascii=False), tabindex="0")
