"""Find the settings under which a trainer would not maximise E[reward] - beta KL, and say what to write instead.

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
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.training.check_settings.frameworks import (
    AREAL,
    LIGHTRFT,
    NEMO,
    OPENRLHF,
    SKYRL,
    SLIME,
    SWIFT,
    VERL,
)
from calibrated_rewards.training.check_settings.rules import (
    Finding,
    Framework,
    FrameworkSettings,
    Severity,
    find_broken_rules,
    find_strength,
    is_set,
    read_decoding,
)
from calibrated_rewards.training.check_settings.trl import A2PO, ASYNC_GRPO, GRPO, ONLINE_DPO, RLOO

FRAMEWORKS = (RLOO, GRPO, A2PO, ASYNC_GRPO, ONLINE_DPO, OPENRLHF, VERL, SWIFT, SKYRL, SLIME, AREAL, NEMO, LIGHTRFT)
# Package and class of configurations that can be of one framework only.
CLASSES = {
    ("trl", "RLOOConfig"): RLOO,
    ("trl", "GRPOConfig"): GRPO,
    ("trl", "A2POConfig"): A2PO,
    ("trl", "AsyncGRPOConfig"): ASYNC_GRPO,
    ("trl", "OnlineDPOConfig"): ONLINE_DPO,
    ("swift", "GRPOConfig"): SWIFT,
    ("swift", "RLHFArguments"): SWIFT,
    ("skyrl", "SkyRLTrainConfig"): SKYRL,
    ("areal", "PPOConfig"): AREAL,
}
GRAVEST_FIRST = ("error", "warning", "note")
# Frameworks' own clips are at 10 or 20, and their step sizes are for rewards of about 1.
LARGE_REWARD = 10.0
# The values of `Decoding` that leave the model's own distribution alone.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Frameworks write "all tokens" as None, 0, -1 or a number beyond any vocabulary.
BEYOND_ANY_VOCABULARY = 10**7
# Frameworks have settings such as num_generations_eval: a name with a word more is another name, not a slip.
SIMILARITY, LONGER_BY = 0.85, 2


@dataclass(frozen=True)
class Report:
    """The findings of a check, errors first; printed, a line for each."""

    framework: str
    findings: tuple[Finding, ...]
    beta: float | None
    """The beta that the settings amount to, as far as the findings let there be one; None without a KL."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Errors, after which the optimum is another, and warnings; no notes."""
        return tuple(finding for finding in self.findings if finding.severity != "note")

    def raise_if_wrong(self) -> None:
        """Raise ValueError, with a line for each finding, if any of them is an error."""
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

    With the reward, also check that completions are drawn as its references were and that no clip cuts it; with the
    beta that is wanted, which is the reward's if none is given, that the settings amount to it. A setting that is not
    set is taken to be at the framework's default.
    """
    if settings is None or isinstance(settings, str | bytes | list | tuple | set | frozenset):
        raise TypeError(
            "check_settings reads a configuration object, parsed arguments or a mapping, got "
            f"{type(settings).__name__}: parse it first, such as vars(parser.parse_args(arguments))"
        )
    source = FrameworkSettings(settings, _find_framework(settings, framework))
    beta = reward.beta if beta is None and reward is not None else beta
    findings = [*find_broken_rules(source), *_check_strength(source, beta), *_check_distribution(source)]
    if reward is not None:
        span = find_span(reward)
        findings += [*_check_clips(source, span), *_check_span(span), *_check_id_column(source, reward)]
        findings += _check_decoding(source, reward.table.meta)
    findings += _find_misspelled(source)
    findings.sort(key=lambda finding: GRAVEST_FIRST.index(finding.severity))
    strength = find_strength(source)
    return Report(source.framework.name, tuple(findings), None if strength is None else strength.beta(source))


def _find_framework(settings: Any, name: str | None) -> Framework:
    """Look a framework up by its name or by the class of the settings."""
    frameworks = {framework.name: framework for framework in FRAMEWORKS}
    if name is not None:
        if name not in frameworks:
            raise ValueError(f"check_settings knows the frameworks {', '.join(frameworks)}, got framework={name!r}")
        return frameworks[name]
    for base in type(settings).__mro__:
        framework = CLASSES.get((base.__module__.partition(".")[0], base.__name__))
        if framework is not None:
            return framework
    raise ValueError(f"check_settings needs framework= for {type(settings).__name__}, one of {', '.join(frameworks)}")


def _check_strength(settings: FrameworkSettings, wanted: float | None) -> Iterator[Finding]:
    """Find a KL of another strength than is wanted, or than it seems."""
    strength = find_strength(settings)
    if strength is None:
        return
    beta, written = strength.beta(settings), float(settings[strength.coefficient])
    name = settings.describe(strength.coefficient)
    if wanted is not None and not isclose(beta, wanted, rel_tol=1e-3):
        why = f"this is beta={beta:.6g}, and beta={wanted:.6g} is wanted"
        yield Finding(name, why, strength.to_write(wanted, settings))
    elif wanted is None and not isclose(beta, written, rel_tol=1e-3):
        why = f"the mean of a group includes the completion itself, which makes this beta={beta:.6g}"
        yield Finding(name, why, f"{strength.to_write(written, settings)} for beta={written:.6g}", "note")


def find_span(reward: CalibratedReward) -> tuple[float, float] | None:
    """Find the least and the greatest reward that there can be; None where the calibration is not one of ranks.

    >>> from calibrated_rewards import Log, ReferenceTable
    >>> find_span(CalibratedReward(None, ReferenceTable.build([("2+2=", [1.0, 2.0])]), Log()))
    (-1.3862943611198906, 0.0)
    """
    if not isinstance(reward.calibration, EmpiricalCDF):
        return None
    counts = reward.table.counts(np.arange(len(reward.table)))
    transform = scaled(reward.transform, reward.scale)
    ends = [values(transform, int(K), reward.estimator)[[0, -1]] for K in {counts.min(), counts.max()}]
    return float(min(end[0] for end in ends)), float(max(end[1] for end in ends))


def _check_clips(settings: FrameworkSettings, span: tuple[float, float] | None) -> Iterator[Finding]:
    """Find clips of the framework that cut rewards."""
    for setting in settings.framework.clips:
        clip = settings[setting]
        if isinstance(clip, Real):
            clip = (-clip, clip) if clip else None
        low, high = clip or (None, None)
        low, high = -np.inf if low is None else float(low), np.inf if high is None else float(high)
        if span is None:
            if np.isfinite([low, high]).any():
                why = "it clips rewards, and this calibration has no bounds that it could be compared with"
                yield Finding(settings.describe(setting), why, severity="warning")
        elif span[0] < low or span[1] > high:
            why = f"rewards from {span[0]:.4g} to {span[1]:.4g} are cut, and those beyond all count the same"
            yield Finding(settings.describe(setting), why, f"bounds outside of {span[0]:.4g} and {span[1]:.4g}")


def _check_span(span: tuple[float, float] | None) -> Iterator[Finding]:
    """Find rewards that are large for a trainer."""
    if span is not None and max(map(abs, span)) > LARGE_REWARD:
        why = f"rewards go from {span[0]:.4g} to {span[1]:.4g}, and beta is measured in their unit"
        yield Finding("scale", why, 'scale="unit", and a beta for it', "warning")


def _check_id_column(settings: FrameworkSettings, reward: CalibratedReward) -> Iterator[Finding]:
    """Find a trainer that drops the column by which the reward finds prompts."""
    setting = settings.framework.only_prompts
    if setting is not None and reward.id_column is not None and settings[setting]:
        why = f"the reward finds prompts by the column {reward.id_column!r}, which is dropped"
        yield Finding(settings.describe(setting), why, f"{setting}=False")


def _check_distribution(settings: FrameworkSettings) -> Iterator[Finding]:
    """Find sampling settings that the log-probabilities of the loss ignore: top_p, top_k, min_p, penalties."""
    for name, setting in settings.framework.sampling.items():
        if name in NEUTRAL and setting in settings and not _same(name, settings[setting], NEUTRAL[name]):
            why = "completions are drawn from another distribution than the one whose log-probabilities are trained"
            yield Finding(settings.describe(setting), why, f"{setting}={NEUTRAL[name]}")


def _check_decoding(settings: FrameworkSettings, meta: Mapping[str, Any]) -> Iterator[Finding]:
    """Find sampling settings that are not those that the table's references were drawn with."""
    decoding = read_decoding(meta)
    if decoding is None:
        why = "does not say how its references were drawn: they should be this trainer's own settings"
        yield Finding("the table", why, severity="note")
        return
    for name, setting in settings.framework.sampling.items():
        if name not in decoding or setting not in settings or _same(name, settings[setting], decoding[name]):
            continue
        why = f"the references were drawn with {name}={decoding[name]!r}, so that quantiles are of another policy"
        unknown = settings[setting] is None and name == "max_tokens"
        if name == "max_tokens" and not unknown:
            why = f"the calibration cut at {decoding[name]} tokens, the trainer at {settings[setting]}"
        severity: Severity = "warning" if unknown else "error"
        yield Finding(settings.describe(setting), why, f"{setting}={decoding[name]!r}", severity)


def _same(name: str, value: Any, wanted: Any) -> bool:
    """Compare two values of a sampling setting, of which several may mean that it is off."""
    one, other = _normalise(name, value), _normalise(name, wanted)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _normalise(name: str, value: Any) -> Any:
    """Write a value as `Decoding` does, which has one way to say that a setting is off."""
    if value is None and name in NEUTRAL:
        return NEUTRAL[name]
    if name == "top_k" and isinstance(value, int | float) and (value < 0 or value >= BEYOND_ANY_VOCABULARY):
        return 0
    return value


def _find_misspelled(settings: FrameworkSettings) -> Iterator[Finding]:
    """Find names that are no setting of a rule, next to one that is and is not set: its default was checked."""
    for name, value in _list_settings(settings.source):
        if name not in settings.framework.defaults and (meant := _guess_setting(name, settings)) is not None:
            why = f"unknown setting {name!r} ({meant}?), and {settings.describe(meant)} is what was checked"
            yield Finding(f"{name}={value!r}", why, f"{meant}={value!r}", "warning")


def _guess_setting(name: str, settings: FrameworkSettings) -> str | None:
    """Guess the setting that a name was meant to be: each of its parts is close, not only a long path in common."""
    parts = name.split(".")
    for other in settings.framework.defaults:
        other_parts = other.split(".")
        if (
            len(other_parts) == len(parts)
            and all(map(_alike, other_parts, parts))
            and not is_set(settings.source, other)
        ):
            return other
    return None


def _alike(one: str, other: str) -> bool:
    close = abs(len(one) - len(other)) <= LONGER_BY and get_close_matches(one, [other], cutoff=SIMILARITY)
    return one == other or bool(close)


def _list_settings(source: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the settings of mappings and namespaces by dotted names; classes know themselves what they take."""
    if isinstance(source, Namespace | SimpleNamespace):
        source = vars(source)
    if not isinstance(source, Mapping):
        return
    for name, value in source.items():
        if isinstance(value, Mapping | Namespace | SimpleNamespace):
            yield from _list_settings(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
