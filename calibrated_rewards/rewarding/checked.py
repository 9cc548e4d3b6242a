"""The settings of a calibrated reward: each error names the setting, the rule, and what came."""

from math import isfinite
from typing import Any, NoReturn

from calibrated_rewards.table.reference_table import ReferenceTable

MISSING = ("raise", "neutral", "skip")


def check(reward: Any) -> None:
    """TypeError or ValueError for what makes no sense, before anything is scored."""
    if not isinstance(reward.table, ReferenceTable):
        _refuse("table", "a ReferenceTable", reward.table)
    if reward.scorer is not None and not callable(reward.scorer):
        _refuse("scorer", "called with prompts and completions", reward.scorer)
    if not callable(reward.transform):
        _refuse("transform", "called with quantiles, as Exponential(10.0) is", reward.transform)
    if not callable(reward.calibration):
        _refuse("calibration", "called, as EmpiricalCDF() is", reward.calibration)
    if not callable(reward.on_missing) and reward.on_missing not in MISSING:
        raise ValueError(f"on_missing is one of {MISSING} or a function, got {reward.on_missing!r:.80}")
    for name in ("name", "id_column"):
        if not isinstance(getattr(reward, name), str | None):
            _refuse(name, "a text or None", getattr(reward, name))
    if isinstance(reward.endings, str) or not all(isinstance(ending, str) for ending in reward.endings):
        _refuse("endings", "a tuple of texts", reward.endings)
    _check_numbers(reward.batch_size, reward.beta)


def _check_numbers(batch_size: Any, beta: Any) -> None:
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"CalibratedReward needs a whole batch_size >= 1, or None, got batch_size={batch_size!r}")
    if beta is not None and not (isinstance(beta, int | float) and isfinite(beta) and beta > 0):
        raise ValueError(f"CalibratedReward needs a finite beta > 0, or None, got beta={beta!r}")


def _refuse(setting: str, rule: str, got: Any) -> NoReturn:
    raise TypeError(f"CalibratedReward: {setting} is {rule}, got {got!r:.80}")
