"""The rollouts of a run with the scores that two reward models gave them: one to select by, one to judge."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from calibrated_rewards.calibration.shards import SCORE, read_table
from calibrated_rewards.estimates import Samples


def scorers_of(run: Path) -> list[str]:
    """The names of the reward models whose scores a run's rollouts have."""
    names = (name for path in _files(run)[:1] for name in read_table(path).column_names)
    return [name.removeprefix(SCORE) for name in names if name.startswith(SCORE)]


def references_of(run: Path, select: str, judge: str | None = None) -> Samples:
    """All rollouts, prompt by prompt, by both scores; by one where no judge is named."""
    known, asked = scorers_of(run), [select, *([judge] if judge is not None and judge != select else [])]
    for name in asked:
        if name not in known:
            raise ValueError(
                f"the rollouts of {run} have scores of {', '.join(known) or 'nobody'}, got {name!r}. Another scorer is "
                f"added by `calibrated-rewards calibrate --reward-model NAME=PATH --out {run}`, drawing nothing."
            )
    parts: dict[bytes, list[Float64[np.ndarray, "scorers _"]]] = {}
    for path in _files(run):
        table = read_table(path, ["key", *(SCORE + name for name in asked)])
        keys = table.column("key").to_pylist()
        scores = np.array([table.column(SCORE + name).to_numpy() for name in asked], np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"{path} needs a score for each rollout, got some without: calibrate again.")
        starts = [place for place in range(len(keys)) if place == 0 or keys[place] != keys[place - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            parts.setdefault(keys[start], []).append(scores[:, start:end])
    rows = [np.hstack(own) for own in parts.values()]
    return Samples([row[0] for row in rows], [row[1] for row in rows] if len(asked) > 1 else None)


def _files(run: Path) -> list[Path]:
    found = sorted((run / "rollouts").glob("*.parquet"))
    if not found:
        raise ValueError(f"{run} needs rollouts/*.parquet, got none: not calibrated yet?")
    return found
