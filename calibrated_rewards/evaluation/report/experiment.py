"""Parts of an experiment that a directory holds: tables, frontier, reward, training runs, evaluation.

A file that is not what its name says is an error with its path and the fault.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrated_rewards.evaluation.expectations import TableRewards
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.evaluation.wording import choose_procedure
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.reward.saving import from_json
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.named import parse_procedure
from calibrated_rewards.theory.procedures import Procedure, Standard
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Identity, Transform

# Columns of a log that the page uses; a run may log anything else.
LOGGED = ("reward", "u", "kl", "seconds", "seconds_scoring")
# The beginning of the names of those of a check on held-out rollouts.
CHECKED = "held_out/"


@dataclass(frozen=True)
class TrainingRun:
    """The steps of a training run, and its settings where it saved them."""

    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """The parts that were found; a missing one is None or empty."""

    at: Path
    tables: Mapping[str, ReferenceTable]
    """Tables by the name of their reward model."""
    rollouts: Path | None
    frontier: FrontierEstimate | None
    reward: Mapping[str, Any] | None
    """Settings of the calibrated reward."""
    runs: Mapping[str, TrainingRun]
    evaluation: Evaluation | None
    evaluated: Path | None
    """Directory with the completions of the evaluation."""
    held_out: HeldOutPolicies | None = None
    """Policies that were compared on held-out rollouts."""
    demo: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of a demo, and the seconds of its steps."""

    @property
    def trained_for(self) -> str | None:
        """Name of the table whose reward the policies are trained for."""
        for part in (self.evaluation, self.frontier):
            if part is not None and part.selected_by in self.tables:
                return part.selected_by
        return "reward" if "reward" in self.tables else next(iter(self.tables), None)

    @property
    def transform(self) -> Transform:
        """The reward's transform if it is one of the library's, else the identity."""
        transform = self._read_setting("transform")
        return transform if isinstance(transform, Transform) else Identity()

    @property
    def procedure(self) -> Procedure:
        """The procedure that the experiment is about; one draw where no result names one that a rank decides."""
        names: Sequence[str] = ()
        if self.evaluation is not None and self.evaluation.policies:
            names = [*next(iter(self.evaluation.policies[0].win_rates.values()))]
        elif self.frontier is not None:
            names = self.frontier.procedures
        return (find_procedure(choose_procedure(names)) if names else None) or Standard()

    def table_rewards(self, procedure: Procedure) -> TableRewards | None:
        """Rewards of the table that policies are trained for; None where the saved reward is not one of ranks."""
        settings, transform = self.reward or {}, self._read_setting("transform")
        plain = settings.get("calibration") is None
        calibration = EmpiricalCDF() if plain else self._read_setting("calibration")
        if (
            self.trained_for is None
            or not isinstance(transform, Transform)
            or not isinstance(calibration, EmpiricalCDF)
        ):
            return None
        return TableRewards(
            self.tables[self.trained_for],
            scaled(transform, settings.get("scale", "unit")),
            procedure,
            settings.get("estimator", "empirical"),
            calibration.tolerance,
        )

    def _read_setting(self, name: str) -> object:
        try:
            return from_json((self.reward or {})[name])
        except (KeyError, ValueError, TypeError):
            return None


def read_experiment(at: Path) -> Experiment:
    """Read what a directory holds of a demo, a calibration, a table, training runs, or an evaluation."""
    tables = _find_tables(at)
    frontier, reward = _find(at, "frontier.json"), _find(at, "reward.json", "reward")
    evaluation, held_out = _find(at, "evaluation.json", "evaluation"), _find(at, "held_out.json")
    experiment = Experiment(
        at=at,
        tables={name: ReferenceTable.load(path) for name, path in tables.items()},
        rollouts=_find_rollouts(at, tables),
        frontier=None if frontier is None else FrontierEstimate.load(frontier),
        reward=None if reward is None else read_json_object(reward),
        runs={name: _read_run(path.parent) for name, path in _find_in_folders(at, "log.jsonl").items()},
        evaluation=None if evaluation is None else Evaluation.load(evaluation),
        evaluated=None if evaluation is None else evaluation.parent,
        held_out=None if held_out is None else HeldOutPolicies.load(held_out),
        demo=read_json_object(at / "demo.json") if (at / "demo.json").is_file() else {},
    )
    results = (experiment.frontier, experiment.evaluation, experiment.held_out)
    if not (experiment.tables or experiment.runs or any(results)):
        raise ValueError(
            f"{at} needs a table, a frontier.json, a log.jsonl of training, a held_out.json or an evaluation.json, got "
            "none of them"
        )
    return experiment


def find_name(fingerprint: Any) -> str | None:
    """Find the name in a fingerprint, or else its path, its function, or the class of its model; a text is a name.

    >>> find_name({"kind": "hf sampler", "path": "sft/"}), find_name("my policy"), find_name(["my policy"])
    ('sft/', 'my policy', None)
    """
    if not isinstance(fingerprint, Mapping):
        return fingerprint if isinstance(fingerprint, str) and fingerprint else None
    keys = ("name", "path", "function", "model")
    return next((fingerprint[key] for key in keys if isinstance(fingerprint.get(key), str)), None)


def find_procedure(name: str) -> Procedure | None:
    """Parse the repr of a procedure; None unless it is one that a rank decides.

    >>> find_procedure("BestOf(n=4)"), find_procedure("SoftBestOf(n=4, temperature=1.0)")
    (BestOf(n=4), None)
    """
    try:
        return parse_procedure(name)
    except ValueError:
        return None


def read_json_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} needs to be a JSON object, got something else, or a part of one: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} needs to be a JSON object, got {content!r:.80}.")
    return content


def read_log(path: Path) -> Iterator[Mapping[str, Any]]:
    """Read the steps of a log, without a line whose writing was broken off."""
    rule = f"{path} needs a JSON object of numbers with a step in each line, got"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} needs to be text, a JSON object a line, got {error}.") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if line.lstrip()[:1] in ("", "{"):
                continue
            row = line
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise ValueError(f"{rule} {row!r:.80} in line {number}.")
        for name in (*LOGGED, *(each for each in row if each.startswith(CHECKED))):
            if row.get(name) is not None and not _is_number(row[name]):
                raise ValueError(f"{rule} {name}={row[name]!r:.60} in line {number}.")
        yield row


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_run(at: Path) -> TrainingRun:
    settings = at / "settings.json"
    return TrainingRun([*read_log(at / "log.jsonl")], read_json_object(settings) if settings.is_file() else {})


def _find(at: Path, name: str, folder: str = ".") -> Path | None:
    return next((path for path in (at / folder / name, at / name) if path.is_file()), None)


def _find_in_folders(at: Path, name: str) -> dict[str, Path]:
    """Find the files of a name in a directory and in its folders, by the folder's name."""
    paths = (at / name, *sorted(at.glob(f"*/{name}")))
    return {path.parent.resolve().name: path for path in paths if path.is_file()}


def _find_tables(at: Path) -> dict[str, Path]:
    for home in (at / "table", at):
        if (home / "table.json").is_file():
            return {"reward": home}
        tables = {name: path.parent for name, path in _find_in_folders(home, "table.json").items()}
        if tables:
            return tables
    return {}


def _find_rollouts(at: Path, tables: Mapping[str, Path]) -> Path | None:
    homes = [at, *(home for path in tables.values() for home in (path, path.resolve().parent))]
    return next((home / "rollouts" for home in homes if any((home / "rollouts").glob("*.parquet"))), None)
