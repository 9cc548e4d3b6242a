"""Whether a framework's settings leave a calibrated reward as it is: clipping, dropped columns, values out of range.

Settings whose names are nearly those of a rule: they were meant, and what was read is the default.

check_settings: what is wrong with a trainer's settings for E[R] - beta KL, and what to write instead.

>>> print(check_settings({"beta": 0.0, "scale_rewards": "none", "disable_dropout": True}, framework="trl-grpo"))
error: beta=0.0: without a KL the optimum is an argmax. Write the beta that you chose, such as beta=0.05.
>>> check_settings({"beta": 0.07, "scale_rewards": "none"}, framework="trl-grpo").beta
0.08
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import isclose
from numbers import Real
from types import SimpleNamespace
from typing import Any

import numpy as np

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.transforms import scaled
from calibrated_rewards.training.check_settings.areal import AREAL
from calibrated_rewards.training.check_settings.lightrft import LIGHTRFT
from calibrated_rewards.training.check_settings.nemo import NEMO
from calibrated_rewards.training.check_settings.openrlhf import OPENRLHF
from calibrated_rewards.training.check_settings.rules import Finding, Framework, Settings, broken, is_set, strength
from calibrated_rewards.training.check_settings.sampling import bent, other_than_calibrated
from calibrated_rewards.training.check_settings.skyrl import SKYRL
from calibrated_rewards.training.check_settings.slime import SLIME
from calibrated_rewards.training.check_settings.swift import SWIFT
from calibrated_rewards.training.check_settings.trl import ASYNC_GRPO, GRPO, ONLINE_DPO, RLOO
from calibrated_rewards.training.check_settings.verl import VERL

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


# Frameworks have settings such as num_generations_eval: what has a word more is another name, not a slip.
_ALIKE, _LONGER = 0.85, 2


def unreadable(source: Any) -> None:
    """TypeError for what has no settings by name: nothing in it would be found, and all taken to be at its default."""
    if source is None or isinstance(source, str | bytes | list | tuple | set | frozenset):
        raise TypeError(
            "check_settings reads a configuration object, parsed arguments or a mapping, got "
            f"{type(source).__name__}: parse it first, such as vars(parser.parse_args(arguments))"
        )


def misspelled(settings: Settings) -> Iterator[Finding]:
    """Names that are no setting of a rule, next to one that is and is not set."""
    for name, value in _names(settings.source):
        if name not in settings.framework.defaults and (meant := _meant(name, settings)) is not None:
            why = f"unknown setting {name!r} ({meant}?), and {settings.shown(meant)} is what was checked"
            yield Finding(f"{name}={value!r}", why, f"{meant}={value!r}", "warning")


def _meant(name: str, settings: Settings) -> str | None:
    """The setting that a name is nearly: each of its parts is, so that a long path does not make names alike."""
    parts = name.split(".")
    for known in settings.framework.defaults:
        own = known.split(".")
        if len(own) == len(parts) and all(map(_alike, own, parts)) and not is_set(settings.source, known):
            return known
    return None


def _alike(one: str, other: str) -> bool:
    near = abs(len(one) - len(other)) <= _LONGER and get_close_matches(one, [other], cutoff=_ALIKE)
    return one == other or bool(near)


def _names(source: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their dotted names, of mappings and namespaces; classes know themselves what they take."""
    if isinstance(source, Namespace | SimpleNamespace):
        source = vars(source)
    if not isinstance(source, Mapping):
        return
    for name, value in source.items():
        if isinstance(value, Mapping | Namespace | SimpleNamespace):
            yield from _names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


FRAMEWORKS = (RLOO, GRPO, ASYNC_GRPO, ONLINE_DPO, OPENRLHF, VERL, SWIFT, SKYRL, SLIME, AREAL, NEMO, LIGHTRFT)
# The package and class of a configuration that can be of one framework only.
_CLASSES = (
    ("trl", "RLOOConfig", RLOO),
    ("trl", "GRPOConfig", GRPO),
    ("trl", "AsyncGRPOConfig", ASYNC_GRPO),
    ("trl", "OnlineDPOConfig", ONLINE_DPO),
    ("swift", "GRPOConfig", SWIFT),
    ("swift", "RLHFArguments", SWIFT),
    ("skyrl", "SkyRLTrainConfig", SKYRL),
    ("areal", "PPOConfig", AREAL),
)
_GRAVEST_FIRST = ("error", "warning", "note")


@dataclass(frozen=True)
class Report:
    """What a check found, errors first; printed, it has a line for each finding."""

    framework: str
    findings: tuple[Finding, ...]
    beta: float | None
    """The beta that the settings amount to, as far as the findings let there be one; None without a KL."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Errors, after which the optimum is another, and warnings; no notes."""
        return tuple(finding for finding in self.findings if finding.severity != "note")

    def raise_if_wrong(self) -> None:
        """ValueError, with a line for each, if any finding is an error."""
        if any(finding.severity == "error" for finding in self.findings):
            raise ValueError(f"{self.framework} would not maximise E[reward] - beta KL:\n{self}")

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or f"{self.framework}: nothing to change"


def check_settings(
    settings: Any,
    reward: CalibratedReward | None = None,
    framework: str | None = None,
    *,
    beta: float | None = None,
) -> Report:
    """Check a trainer's settings: a configuration object, parsed arguments, or mappings, nested or with dotted names.

    With the reward, also that completions are drawn as its references were and that no clip cuts it; with the beta
    that is wanted, which is the reward's if none is given, that the settings amount to it. What is not set is taken to
    be at the framework's default.
    """
    unreadable(settings)
    read = Settings(settings, _framework(settings, framework))
    wanted = reward.beta if beta is None and reward is not None else beta
    findings = [*broken(read), *_strength(read, wanted), *bent(read), *_with(reward, read), *misspelled(read)]
    findings.sort(key=lambda finding: _GRAVEST_FIRST.index(finding.severity))
    where = strength(read)
    return Report(read.framework.name, tuple(findings), None if where is None else where.beta(read))


def _with(reward: CalibratedReward | None, settings: Settings) -> Iterator[Finding]:
    if reward is not None:
        span = span_of(reward)
        yield from clipped(settings, span)
        yield from out_of_range(span)
        yield from lost_id(settings, reward)
        yield from other_than_calibrated(settings, reward.table.meta)


def _strength(settings: Settings, beta: float | None) -> Iterator[Finding]:
    """A KL of another strength than is wanted, or than it seems."""
    where = strength(settings)
    if where is None:
        return
    found, written = where.beta(settings), float(settings[where.coefficient])
    name = settings.shown(where.coefficient)
    if beta is not None and not isclose(found, beta, rel_tol=1e-3):
        yield Finding(name, f"this is beta={found:.6g}, and beta={beta:.6g} is wanted", where.to_write(beta, settings))
    elif beta is None and not isclose(found, written, rel_tol=1e-3):
        why = f"the mean of a group includes the completion itself, which makes this beta={found:.6g}"
        yield Finding(name, why, f"{where.to_write(written, settings)} for beta={written:.6g}", "note")


def _framework(settings: Any, name: str | None) -> Framework:
    known = {framework.name: framework for framework in FRAMEWORKS}
    if name is not None:
        if name not in known:
            raise ValueError(f"check_settings knows the frameworks {', '.join(known)}, got framework={name!r}")
        return known[name]
    for base in type(settings).__mro__:
        for package, kind, framework in _CLASSES:
            if base.__name__ == kind and base.__module__.partition(".")[0] == package:
                return framework
    raise ValueError(f"check_settings needs framework= for {type(settings).__name__}, one of {', '.join(known)}")
