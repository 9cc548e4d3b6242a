"""Sections on training and on provenance: each run's reward, length, speed and curves; versions and settings."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from markupsafe import Markup

from calibrated_rewards.calibration.inspect_table import percent
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.report import page
from calibrated_rewards.evaluation.report.experiment import Experiment, TrainingRun
from calibrated_rewards.evaluation.wording import format_count, format_transform_repr

# Means over this share of the steps at either end are reported: single steps are noise.
END = 0.1
# Metrics of a check on held-out rollouts: the one that each has, and the end of the names of win rates.
CHECK, RATE = "held_out/kl", "/win_rate"
PACKAGES = ("calibrated-rewards", "numpy", "scipy", "torch", "transformers", "trl", "peft")


def write_training(experiment: Experiment) -> page.Section | None:
    """Write the section; None where no run has made a step."""
    runs = {name: run for name, run in experiment.runs.items() if run.rows}
    if not runs:
        return None
    steps = {name: format_count(len({row["step"] for row in run.rows}), "step") for name, run in runs.items()}
    policies = ", ".join(f"{name} ({_name_reward(run)}; {steps[name]})" for name, run in runs.items())
    summary = f"{'One policy was' if len(runs) == 1 else f'{len(runs)} policies were'} trained: {policies}."
    head = ["", "reward", "recipe", "steps", "beta", "u at first", "u at last", "KL at last", "seconds", "in scoring"]
    logs = {name: run.rows for name, run in runs.items()}
    drawings = [
        page.draw(plots.training(logs, column), caption, f"curve-{column}") for column, caption in _choose_curves(runs)
    ]
    blocks = (
        page.Paragraph(f"{summary} Values at first and at last are means over a tenth of the steps, one at least."),
        page.Table(head, [_list_run(name, run) for name, run in runs.items()]),
        page.Figures(drawings),
        *_write_checks(runs),
    )
    return page.Section("What was trained", blocks, (summary,))


def _write_checks(runs: Mapping[str, TrainingRun]) -> Iterator[page.Block]:
    """Write the last check on held-out rollouts of each run that has one: what it learned, by tenths of u."""
    last = {name: checked[-1] for name, run in runs.items() if (checked := [row for row in run.rows if CHECK in row])}
    if not last:
        return
    yield page.Heading("Checked on held-out rollouts")
    yield page.Paragraph(
        "The last check of each policy, by importance weights on rollouts of prompts that it was not trained on. The "
        "correlation is that of log-ratio and target within a prompt: near 0 at the start, 1 at the optimum. Win rates "
        "are over the reference, with their standard errors over prompts."
    )
    rates = sorted({key.removesuffix(RATE) for row in last.values() for key in row if key.endswith(RATE)})
    heads = [f"best of {n}" if kind == "best" else f"worst of {n}" for kind, n in map(_split_procedure, rates)]
    rows = [
        [
            name,
            str(row["step"] + 1),
            *(_format_number(row.get(f"held_out/{key}")) for key in ("kl", "correlation", "ess")),
            percent(row["held_out/share_by_u"]) if "held_out/share_by_u" in row else "not known",
            *(_format_rate(row, rate) for rate in rates),
        ]
        for name, row in last.items()
    ]
    head = ["", "after steps", "KL", "correlation with the target", "effective sample size", "KL that u explains"]
    yield page.Table([*head, *heads], rows)
    ratios = {
        name: (_read_ratios(row, "density_ratio"), _read_ratios(row, "target_ratio")) for name, row in last.items()
    }
    shown = {name: (policy, target) for name, (policy, target) in ratios.items() if policy is not None}
    if shown:
        caption = "The policy's share of each tenth of u over the reference's; dashed, that of the optimum."
        yield page.Figures([page.draw(plots.density_ratios(shown), caption, "density-ratios")])


def _split_procedure(name: str) -> tuple[str, str]:
    """Split the metric's name of a procedure, `held_out/best_of_4`, into best and 4."""
    kind, _, n = name.removeprefix("held_out/").partition("_of_")
    return kind, n


def _format_rate(row: Mapping[str, Any], rate: str) -> str:
    if f"{rate}{RATE}" not in row:
        return "not known"
    error = row.get(f"{rate}/standard_error")
    return f"{100 * row[f'{rate}{RATE}']:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def _read_ratios(row: Mapping[str, Any], name: str) -> list[float | None] | None:
    ratios = [row.get(f"held_out/{name}_{tenth}") for tenth in range(1, 11)]
    return None if all(each is None for each in ratios) else ratios


def _choose_curves(runs: Mapping[str, TrainingRun]) -> Iterator[tuple[str, str]]:
    """Choose the columns that have values, with captions; rewards of different kinds do not share an axis."""
    columns = {key for run in runs.values() for row in run.rows for key, value in row.items() if value is not None}
    captions = {
        "u": "The quantile among the references; 0.5 is the reference policy.",
        "kl": "KL from the reference policy, of a completion.",
        "reward": "The reward that is maximised.",
    }
    if len({_name_reward(run) for run in runs.values()}) > 1:
        del captions["reward"]
    for column, caption in captions.items():
        if column in columns:
            yield column, f"{caption} Faint: each step; strong: the mean over a tenth of the steps."


def _list_run(name: str, run: TrainingRun) -> list[str]:
    settings = {**run.settings, **_find_mapping(run.settings, "settings")}
    beta = settings.get("beta") or _find_mapping(settings, "reward").get("beta")
    columns = {each: _read_column(run.rows, each) for each in ("u", "kl", "seconds", "seconds_scoring")}
    ends = _mean_of_end(columns["u"], first=True), _mean_of_end(columns["u"]), _mean_of_end(columns["kl"])
    seconds, scoring = sum(columns["seconds"]), sum(columns["seconds_scoring"])
    duration = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"
    return [
        name,
        _name_reward(run),
        str(settings.get("recipe", "not said")),
        str(len({row["step"] for row in run.rows})),
        _format_number(beta),
        *map(_format_number, ends),
        duration if columns["seconds"] else "not known",
        percent(scoring / seconds) if seconds and columns["seconds_scoring"] else "not known",
    ]


def _name_reward(run: TrainingRun) -> str:
    reward: Any = run.settings.get("reward")
    if not isinstance(reward, Mapping):
        return "reward not said" if reward is None else str(reward)
    transform = reward.get("transform")
    if reward.get("kind") == "raw" or transform is None:
        return "raw score"
    return f"calibrated, {format_transform_repr(str(transform))}"


def _find_mapping(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}


def _format_number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not known"


def _read_column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _mean_of_end(values: Sequence[float], first: bool = False) -> float | None:
    count = max(1, round(END * len(values)))
    end = values[:count] if first else values[-count:]
    return sum(end) / len(end) if end else None


def write_provenance(experiment: Experiment) -> page.Section:
    """Write the section: the command, versions, and settings and fingerprints as the files have them."""
    command = Markup("This page was made by <code>calibrated-rewards report {}</code>, with:").format(experiment.at)
    versions = page.Table(("", ""), [("Python", platform.python_version()), *_list_versions()])
    return page.Section("How it was made", (page.Paragraph(command), versions, *_list_settings(experiment)))


def _list_versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _list_settings(experiment: Experiment) -> Iterator[page.Details]:
    if experiment.demo:
        yield page.Details("The demo: its sizes, and the seconds of its steps", page.Json(experiment.demo))
    for name, table in experiment.tables.items():
        probes = table.meta.get("probes")
        count = {"probes": f"{len(probes)} pairs"} if isinstance(probes, list) else {}
        yield page.Details(f"Calibration: {name}", page.Json({**table.meta, **count}))
    if experiment.reward is not None:
        yield page.Details("Calibrated reward", page.Json(experiment.reward))
    for name, run in experiment.runs.items():
        if run.settings:
            yield page.Details(f"Training: {name}", page.Json(run.settings))
