"""Whether the references hold for completions that no table has seen: those have uniform quantiles, if they do."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from calibrated_rewards.estimates import Estimate, Stated
from calibrated_rewards.evaluate import REFERENCE
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.wording import counted, measured

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fresh:
    """Where fresh completions of the reference stand among the references of their prompts."""

    rollouts: int
    mean: Stated
    """Of their quantiles; 1/2, if both are of one policy."""
    square: Stated
    """The mean square of how far they are from 1/2."""
    expected: float
    """That of K references and no ties, (1 + 2/K) / 12."""

    @property
    def uniform(self) -> bool:
        """Whether both intervals hold what is expected; it is a test, and fails one time in ten where all is well."""
        return _holds(self.mean, 0.5) and _holds(self.square, self.expected)

    def __str__(self) -> str:
        verdict = "as it should be" if self.uniform else "not as it should be: other settings, ties, or bad luck"
        return (
            f"Fresh completions: {self.rollouts:,} new ones of the reference, for "
            f"{counted(self.mean.prompts, 'prompt')}, have a mean u of {measured(self.mean)} (0.5 expected) "
            f"and a mean square from 1/2 of {self.square.value:.4f} ({self.expected:.4f} expected): {verdict}."
        )


def fresh(table: ReferenceTable, evaluated: Path, scorer: str) -> Fresh | None:
    """By the evaluation's completions of the reference; None if their prompts are not in the table."""
    files = sorted((evaluated / REFERENCE / "rollouts").glob("*.parquet"))
    own: list[Array] = []
    sizes: list[int] = []
    for keys, scores in (_scored(path, scorer) for path in files):
        rows = table.find(keys)
        known = np.isfinite(scores) & (rows >= 0)
        u = table.cdf(rows[known], scores[known])
        places = rows[known]
        own += [u[places == row] for row in np.unique(places)]
        sizes += table.counts(np.unique(places)).tolist()
    if len(own) < 2:
        return None
    return Fresh(
        rollouts=sum(map(len, own)),
        mean=Stated.of(Estimate(np.array([u.mean() for u in own]))),
        square=Stated.of(Estimate(np.array([((u - 0.5) ** 2).mean() for u in own]))),
        expected=float(np.mean([(1 + 2 / K) / 12 for K in sizes])),
    )


def _scored(path: Path, scorer: str) -> tuple[list[bytes], Array]:
    from calibrated_rewards.calibration.shards import SCORE, read_table

    columns = read_table(path)
    name = SCORE + scorer
    if name not in columns.column_names:
        return [], np.empty(0)
    return columns.column("key").to_pylist(), columns.column(name).to_numpy().astype(np.float64)


def _holds(interval: Stated, value: float) -> bool:
    return interval.low is not None and interval.high is not None and interval.low <= value <= interval.high
