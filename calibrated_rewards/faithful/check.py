"""check_settings: what is wrong with a trainer's settings for E[R] - beta KL, and what to write instead.

>>> print(check_settings({"beta": 0.0, "scale_rewards": "none", "disable_dropout": True}, framework="trl-grpo"))
error: beta=0.0: without a KL the optimum is an argmax. Write the beta that you chose, such as beta=0.05.
>>> check_settings({"beta": 0.07, "scale_rewards": "none"}, framework="trl-grpo").beta
0.08
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose
from typing import Any

from calibrated_rewards.faithful.areal_settings import AREAL
from calibrated_rewards.faithful.lightrft_settings import LIGHTRFT
from calibrated_rewards.faithful.nemo_settings import NEMO
from calibrated_rewards.faithful.openrlhf_settings import OPENRLHF
from calibrated_rewards.faithful.rewarded import clipped, lost_id, out_of_range, span_of
from calibrated_rewards.faithful.rules import Finding, Framework, Settings, broken, strength
from calibrated_rewards.faithful.sampled import bent, other_than_calibrated
from calibrated_rewards.faithful.skyrl_settings import SKYRL
from calibrated_rewards.faithful.slime_settings import SLIME
from calibrated_rewards.faithful.spelled import misspelled, unreadable
from calibrated_rewards.faithful.swift_settings import SWIFT
from calibrated_rewards.faithful.trl_rules import ASYNC_GRPO, GRPO, ONLINE_DPO, RLOO
from calibrated_rewards.faithful.verl_settings import VERL
from calibrated_rewards.reward.calibrated_reward import CalibratedReward

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
