"""Whether a framework's settings leave a calibrated reward as it is: clipping, dropped columns, values out of range."""

from collections.abc import Iterator
from numbers import Real
from typing import Any

import numpy as np

from calibrated_rewards.faithful.rules import Finding, Settings
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.transforms import scaled

# Frameworks' own clips are at 10 or 20, and their step sizes are for rewards of about 1.
_LARGE = 10.0


def span_of(reward: CalibratedReward) -> tuple[float, float] | None:
    """The least and the greatest reward that there can be; None where the calibration is not one of ranks.

    >>> from calibrated_rewards import Log, ReferenceTable
    >>> span_of(CalibratedReward(None, ReferenceTable.build([("2+2=", [1.0, 2.0])]), Log()))
    (-1.3862943611198906, 0.0)
    """
    if not isinstance(reward.calibration, EmpiricalCDF):
        return None
    counts = reward.table.counts(np.arange(len(reward.table)))
    transform = scaled(reward.transform, reward.scale)
    ends = [values(transform, int(K), reward.estimator)[[0, -1]] for K in {counts.min(), counts.max()}]
    return float(min(end[0] for end in ends)), float(max(end[1] for end in ends))


def clipped(settings: Settings, span: tuple[float, float] | None) -> Iterator[Finding]:
    """Clips that cut rewards."""
    for setting in settings.framework.clips:
        low, high = _bounds(settings[setting])
        if span is None:
            if np.isfinite([low, high]).any():
                why = "it clips rewards, and this calibration has no bounds that it could be compared with"
                yield Finding(settings.shown(setting), why, severity="warning")
        elif span[0] < low or span[1] > high:
            why = f"rewards from {span[0]:.4g} to {span[1]:.4g} are cut, and those beyond all count the same"
            yield Finding(settings.shown(setting), why, f"bounds outside of {span[0]:.4g} and {span[1]:.4g}")


def out_of_range(span: tuple[float, float] | None) -> Iterator[Finding]:
    """Rewards that are large for a trainer."""
    if span is not None and max(map(abs, span)) > _LARGE:
        why = f"rewards go from {span[0]:.4g} to {span[1]:.4g}, and beta is measured in their unit"
        yield Finding("scale", why, 'scale="unit", and a beta for it', "warning")


def lost_id(settings: Settings, reward: CalibratedReward) -> Iterator[Finding]:
    """A trainer that drops the column by which the reward finds prompts."""
    setting = settings.framework.only_prompts
    if setting is not None and reward.id_column is not None and settings[setting]:
        why = f"the reward finds prompts by the column {reward.id_column!r}, which is dropped"
        yield Finding(settings.shown(setting), why, f"{setting}=False")


def _bounds(clip: Any) -> tuple[float, float]:
    if not isinstance(clip, Real):
        low, high = clip if clip else (None, None)
        return -np.inf if low is None else float(low), np.inf if high is None else float(high)
    return (-float(clip), float(clip)) if clip else (-np.inf, np.inf)
