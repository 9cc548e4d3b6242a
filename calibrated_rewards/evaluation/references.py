"""Read the scores of a calibration's rollouts, by the reward model to train for and by a judge.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> folder = getfixture("tmp_path")
>>> from calibrated_rewards.calibration.calibrate import calibrate
>>> table = calibrate(["one", "two"], NumberSampler(), NumberScorer(), folder, k=4, show_progress=False)
>>> references = read_references(folder)
>>> references.samples, references.selected_by, len(references.table)
(Samples(P=2, m=4), 'reward', 2)
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import SCORE, read_table
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.table.reference_table import ReferenceTable

CALIBRATE_FIRST = (
    "`calibrated-rewards calibrate` makes one, with --rollouts FILE --scores COLUMN of rollouts that are there already"
)


@dataclass(frozen=True)
class References:
    """Rollouts of the reference with their scores, and the table that a reward is made of."""

    samples: Samples
    table: ReferenceTable
    selected_by: str
    judged_by: str
    """The scorer that judges; the one that selects, where there is no other."""


def read_references(at: Path, select: str | None = None, judge: str | None = None) -> References:
    """Read the rollouts of a run by one scorer or two, or the scores of a bare table.

    `select` is the scorer to train for, by default the only one or "reward"; `judge` another one, by default the only
    other one or "judge".
    """
    if at.is_file():
        raise ValueError(
            f"{at} is a file, but a calibration is a folder: of rollouts with their scores one is made by "
            f"`calibrated-rewards calibrate --rollouts {shlex.quote(str(at))} --scores COLUMN --out table/`"
        )
    if not at.exists():
        raise ValueError(f"{at} needs to be the folder of a calibration, got none: {CALIBRATE_FIRST}")
    if not any((at / "rollouts").glob("*.parquet")):
        if (at / "reward.json").is_file():
            raise ValueError(
                f"{at} is a calibrated reward: name the directory of its calibration, or {at / 'table'}, its bare table"
            )
        if not (at / "table.json").is_file():
            raise ValueError(f"{at} needs rollouts/*.parquet or a table.json, got neither: {CALIBRATE_FIRST}")
        if select is not None or judge is not None:
            raise ValueError(f"{at} is a bare table: --select and --judge need a run with rollouts, got none.")
        table = ReferenceTable.load(at)
        return References(Samples([scores for _, scores in table.items()]), table, "reward", "reward")
    select = choose_scorer(at, select)
    others = [name for name in find_scorers(at) if name != select]
    judge = judge or (others[0] if len(others) == 1 else "judge" if "judge" in others else None)
    samples = read_scores(at, select, judge)
    folder = next((each for each in (at, at / select) if (each / "table.json").is_file()), None)
    if folder is not None:
        table = ReferenceTable.load(folder)
    else:
        table = ReferenceTable.build((i.to_bytes(16, "big"), row) for i, row in enumerate(samples.select))
    return References(samples, table, select, judge or select)


def choose_scorer(run: Path, select: str | None = None) -> str:
    """Choose the scorer to train for: the one that is named, or the only one, or "reward"; ValueError if unclear."""
    names = find_scorers(run)
    if select is None:
        if len(names) != 1 and "reward" not in names:
            raise ValueError(f"--select needs one of {', '.join(names) or 'no scorers'} of {run}, got none.")
        return names[0] if len(names) == 1 else "reward"
    if select not in names:
        raise ValueError(
            f"the rollouts of {run} have scores of {', '.join(names) or 'nobody'}, got {select!r}. Another scorer is "
            f"added by `calibrated-rewards calibrate --reward-model NAME=PATH --out {run}`, drawing nothing."
        )
    return select


def match_scorer(run: Path, table: ReferenceTable, select: str | None = None) -> str:
    """Choose the scorer whose scores a reward's table holds, by its fingerprint; ValueError if the run has another.

    Where a fingerprint is not recorded, it is the scorer of `choose_scorer`.
    """
    own, recorded = table.meta.get("scorer"), RunDirectory(run).settings().get("scorers", {})
    if own is None:
        return choose_scorer(run, select)
    names = find_scorers(run) if select is None else [choose_scorer(run, select)]
    matches = [name for name in names if name in recorded and not any(differences(recorded[name], own, name))]
    if matches:
        return "reward" if "reward" in matches else matches[0]
    if any(name not in recorded for name in names):
        return choose_scorer(run, select)
    raise ValueError(
        f"the rollouts of {run} are scored by {', '.join(names)}, another reward model than the reward's. Its scores "
        f"are added by `calibrated-rewards calibrate --reward-model NAME=PATH --out {run}`, drawing nothing"
    )


def find_scorers(run: Path) -> list[str]:
    """Name the reward models that scored a run's rollouts."""
    return [name.removeprefix(SCORE) for name in read_table(_files(run)[0]).column_names if name.startswith(SCORE)]


def read_scores(run: Path, select: str, judge: str | None = None) -> Samples:
    """Read the scores of all rollouts of a run, by the scorer that selects and by the judge, if one is named."""
    scorers = [select, *([judge] if judge is not None and judge != select else [])]
    for name in scorers:
        choose_scorer(run, name)
    parts: dict[bytes, list[Float64[np.ndarray, "scorers _"]]] = {}
    for path in _files(run):
        table = read_table(path, ["key", *(SCORE + name for name in scorers)])
        keys = table.column("key").to_pylist()
        scores = np.array([table.column(SCORE + name).to_numpy() for name in scorers], np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"{path} needs a score for each rollout, got some without: calibrate again.")
        starts = [row for row in range(len(keys)) if row == 0 or keys[row] != keys[row - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            parts.setdefault(keys[start], []).append(scores[:, start:end])
    rows = [np.hstack(part) for part in parts.values()]
    return Samples([row[0] for row in rows], [row[1] for row in rows] if len(scorers) > 1 else None)


def _files(run: Path) -> list[Path]:
    files = sorted((run / "rollouts").glob("*.parquet"))
    if not files:
        raise ValueError(f"{run} needs rollouts/*.parquet, got none: {CALIBRATE_FIRST}")
    return files
