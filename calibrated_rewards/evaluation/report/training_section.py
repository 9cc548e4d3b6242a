"""What was trained: each run's reward, length and speed, and its curves.

How it was made: versions, seeds, settings and fingerprints, as they are kept."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from calibrated_rewards.calibration.inspect_table import percent
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.report.experiment import Experiment, TrainingRun
from calibrated_rewards.evaluation.report.markup import (
    Markup,
    Piece,
    Section,
    element,
    figure,
    figures,
    folded,
    raised,
    table,
)
from calibrated_rewards.evaluation.wording import counted, formula_in

# The share of the steps at either end whose mean is stated: single steps are noise.
END = 0.1


def trained(of: Experiment) -> Section | None:
    """The section; None where no run has made a step."""
    runs = {name: run for name, run in of.runs.items() if run.rows}
    if not runs:
        return None
    head = ["", "reward", "recipe", "steps", "beta", "u at first", "u at last", "KL at last", "seconds", "in scoring"]
    drawn = [
        figure(plots.training({name: run.rows for name, run in runs.items()}, what), said, f"curve-{what}")
        for what, said in _captions(runs).items()
    ]
    told = _told(runs)
    blocks = (
        element("p", raised(f"{told} Values at first and at last are means over a tenth of the steps, one at least.")),
        table(head, [_row(name, run) for name, run in runs.items()]),
        figures(*drawn),
    )
    return Section("What was trained", blocks, (told,))


def _captions(runs: Mapping[str, TrainingRun]) -> dict[str, str]:
    """The curves that there are rows for; rewards of different kinds are no curves of one axis."""
    kinds = {_reward(run) for run in runs.values()}
    wanted = {
        "u": "The quantile among the references; 0.5 is the reference policy.",
        "kl": "KL from the reference policy, of a completion.",
        **({"reward": "The reward that is maximised."} if len(kinds) == 1 else {}),
    }
    some = {key for run in runs.values() for row in run.rows for key, value in row.items() if value is not None}
    faint = " Faint: each step; strong: the mean over a tenth of the steps."
    return {what: said + faint for what, said in wanted.items() if what in some}


def _told(runs: Mapping[str, TrainingRun]) -> str:
    each = [f"{name} ({_reward(run)}; {counted(_steps(run), 'step')})" for name, run in runs.items()]
    many = "One policy was trained" if len(each) == 1 else f"{len(each)} policies were trained"
    return f"{many}: {', '.join(each)}."


def _steps(run: TrainingRun) -> int:
    return len({row["step"] for row in run.rows})


def _row(name: str, run: TrainingRun) -> list[Piece]:
    settings = {**run.settings, **_inside(run.settings, "settings")}
    seconds, scoring = (_total(run.rows, column) for column in ("seconds", "seconds_scoring"))
    share = "not known" if not seconds or scoring is None else percent(scoring / seconds)
    numbers = [_at_end(run.rows, "u", first=True), _at_end(run.rows, "u"), _at_end(run.rows, "kl")]
    beta = settings.get("beta") or _inside(settings, "reward").get("beta")
    shown = [_number(beta), *map(_number, numbers), "not known" if seconds is None else _time(seconds), share]
    return [name, raised(_reward(run)), str(settings.get("recipe", "not said")), str(_steps(run)), *shown]


def _reward(run: TrainingRun) -> str:
    said: Any = run.settings.get("reward")
    if not isinstance(said, Mapping):
        return "reward not said" if said is None else str(said)
    transform = said.get("transform")
    return (
        "raw score" if said.get("kind") == "raw" or transform is None else f"calibrated, {formula_in(str(transform))}"
    )


def _inside(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def _time(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not known"


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [float(row[name]) for row in rows if row.get(name) is not None]
    return sum(known) if known else None


def _at_end(rows: Sequence[Mapping[str, Any]], name: str, first: bool = False) -> float | None:
    known = [float(row[name]) for row in rows if row.get(name) is not None]
    few = max(1, round(END * len(known)))
    end = known[:few] if first else known[-few:]
    return sum(end) / len(end) if end else None


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
