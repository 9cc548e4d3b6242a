"""Files of an experiment as they were kept; of one that is something else, its name and what is wrong with it.

What there is of an experiment in its directory: each part, if it is there, and nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrated_rewards.evaluation.outcomes import Evaluation
from calibrated_rewards.evaluation.prospects import Reweighted
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import BestOf, Procedure, Standard, WorstOf
from calibrated_rewards.theory.transforms import Identity, Transform

# What the page draws or adds up; a run may keep whatever else it likes.
DRAWN = ("reward", "u", "kl", "seconds", "seconds_scoring")


def json_object(path: Path) -> Mapping[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} needs to be a JSON object, got something else, or a part of one: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} needs to be a JSON object, got {found!r:.80}.")
    return found


def logged(path: Path) -> list[Mapping[str, Any]]:
    """The steps of a log, without a line whose writing was broken off."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} needs to be text, a JSON object a line, got {error}.") from error
    return [*_rows(path, lines)]


def _rows(path: Path, lines: list[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if line.lstrip()[:1] in ("", "{"):
                continue
            row = line
        rule = f"{path} needs a JSON object of numbers with a step in each line, got"
        if not isinstance(row, dict) or not _number(row.get("step")):
            raise ValueError(f"{rule} {row!r:.80} in line {number}.")
        wrong = [name for name in DRAWN if row.get(name) is not None and not _number(row[name])]
        if wrong:
            raise ValueError(f"{rule} {wrong[0]}={row[wrong[0]]!r:.60} in line {number}.")
        yield row


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class TrainingRun:
    """A run: its steps, and what it was asked for, if it kept that."""

    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """The parts that were found; what is missing is None or empty."""

    at: Path
    tables: Mapping[str, ReferenceTable]
    """By reward model."""
    rollouts: Path | None
    frontier: Reweighted | None
    reward: Mapping[str, Any] | None
    """The settings of the calibrated reward."""
    runs: Mapping[str, TrainingRun]
    evaluation: Evaluation | None
    evaluated: Path | None
    """Where the completions of the evaluation are."""
    demo: Mapping[str, Any] = field(default_factory=dict)
    """How large a demo is, and how long it took."""

    @property
    def trained_for(self) -> str | None:
        """The table of the reward that policies are trained for, by name."""
        if self.evaluation is not None and self.evaluation.selected_by in self.tables:
            return self.evaluation.selected_by
        if self.frontier is not None and self.frontier.selected_by in self.tables:
            return self.frontier.selected_by
        return "reward" if "reward" in self.tables else next(iter(self.tables), None)

    @property
    def transform(self) -> Transform:
        """That of the reward, as far as it is one of the library's; else none at all."""
        from calibrated_rewards.reward.saving import from_json

        try:
            found = from_json((self.reward or {})["transform"])
        except (KeyError, ValueError, TypeError):
            return Identity()
        return found if isinstance(found, Transform) else Identity()


def experiment(at: Path) -> Experiment:
    """Look at a directory: of a demo, of a calibration, of a table, of training, or of an evaluation."""
    tables = _tables(at)
    runs = {name: _run(path.parent) for name, path in _inside(at, "log.jsonl").items()}
    frontier, reward = _first(at, "frontier.json"), _first(at, "reward.json", "reward")
    evaluation = _first(at, "evaluation.json", "evaluation")
    found = Experiment(
        at=at,
        tables={name: ReferenceTable.load(path) for name, path in tables.items()},
        rollouts=_rollouts(at, tables),
        frontier=None if frontier is None else Reweighted.load(frontier),
        reward=None if reward is None else json_object(reward),
        runs=runs,
        evaluation=None if evaluation is None else Evaluation.load(evaluation),
        evaluated=None if evaluation is None else evaluation.parent,
        demo=json_object(at / "demo.json") if (at / "demo.json").is_file() else {},
    )
    if not (found.tables or found.frontier or found.runs or found.evaluation):
        raise ValueError(
            f"{at} needs a table, a frontier.json, a log.jsonl of training or an evaluation.json, got none of them"
        )
    return found


def titled(found: Experiment) -> str:
    """What there is, and of which policy, as far as it is said."""
    parts = {
        "calibration": bool(found.tables),
        "comparison of rewards": found.frontier is not None and not found.tables,
        "training": bool(found.runs),
        "evaluation": found.evaluation is not None,
    }
    *first, last = (name for name, there in parts.items() if there)
    what = f"{', '.join(first)} and {last}" if first else last
    meta = found.tables[found.trained_for].meta if found.trained_for is not None else {}
    name = named(meta.get("sampler") or {})
    return f"Calibrated rewards{', a demo' if found.demo else ''}: {what}{f' of {name}' if name else ''}"


def named(said: Mapping[str, Any]) -> str | None:
    """The name in a fingerprint, or else its path, its function, the class of its model."""
    return next((said[key] for key in ("name", "path", "function", "model") if isinstance(said.get(key), str)), None)


def procedure_of(name: str) -> Procedure | None:
    """A procedure from its repr, if it is one that a rank decides.

    >>> procedure_of("BestOf(n=4)"), procedure_of("SoftBestOf(n=4, temperature=1.0)")
    (BestOf(n=4), None)
    """
    kind, _, number = name.removesuffix(")").partition("(")
    if kind == "Standard":
        return Standard()
    n = number.removeprefix("n=")
    if kind == "BestOf" and n.isdecimal():
        return BestOf(int(n))
    return WorstOf(int(n)) if kind == "WorstOf" and n.isdecimal() else None


def main_procedure(names: Sequence[str]) -> str:
    """The one that a summary is about: best-of-N, if it is among them."""
    return next((name for name in names if name.startswith("BestOf")), names[0])


def main_judge(names: Sequence[str], selected_by: str) -> str:
    """The one that a summary believes: a scorer that did not select."""
    return next((name for name in names if name != selected_by), selected_by)


def _first(at: Path, name: str, folder: str = ".") -> Path | None:
    return next((path for path in (at / folder / name, at / name) if path.is_file()), None)


def _inside(at: Path, name: str) -> dict[str, Path]:
    """The files of that name in the directory and in its folders, by the folder's name."""
    paths = (at / name, *sorted(at.glob(f"*/{name}")))
    return {path.parent.resolve().name: path for path in paths if path.is_file()}


def _tables(at: Path) -> dict[str, Path]:
    for home in (at / "table", at):
        if (home / "table.json").is_file():
            return {"reward": home}
        found = {name: path.parent for name, path in _inside(home, "table.json").items()}
        if found:
            return found
    return {}


def _rollouts(at: Path, tables: Mapping[str, Path]) -> Path | None:
    homes = [at, *(home for path in tables.values() for home in (path, path.resolve().parent))]
    return next((home / "rollouts" for home in homes if any((home / "rollouts").glob("*.parquet"))), None)


def _run(at: Path) -> TrainingRun:
    settings = at / "settings.json"
    return TrainingRun(logged(at / "log.jsonl"), json_object(settings) if settings.is_file() else {})
