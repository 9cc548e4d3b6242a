"""What a framework's settings must be for it to maximise E[R] - beta KL, as rules in a table, and what breaks them.

A rule names a setting, what it may be, and what to write instead. Settings are read from whatever holds them: a
dataclass or a namespace, nested mappings (OmegaConf's too), or one mapping with dotted names.

>>> rule = Rule("algo.scale", Is("none"), "algo.scale=none", "a reward over its standard deviation has no beta")
>>> toy = Framework("toy", "1.0", (rule,), {"algo.scale": "group"})
>>> [str(finding) for finding in broken(Settings({}, toy))]
["error: algo.scale='group': a reward over its standard deviation has no beta. Write algo.scale=none."]
>>> broken(Settings({"algo": {"scale": "none"}}, toy)), broken(Settings({"algo.scale": "none"}, toy))
([], [])
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

Severity: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A setting, what is wrong with it, and what to write instead; a note is to be known, and nothing is wrong."""

    setting: str
    """The name alone where the framework does not have it, else name=value."""
    why: str
    write: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.setting}: {self.why}." + (f" Write {self.write}." if self.write else "")


@dataclass(frozen=True, eq=False)
class Settings:
    """A framework's settings by their dotted names, read from `source`; what it does not have is at its default."""

    source: Any
    framework: "Framework"

    def __contains__(self, name: str) -> bool:
        return is_set(self.source, name) or name in self.framework.defaults

    def __getitem__(self, name: str) -> Any:
        found, value = _read(self.source, name)
        return value if found else self.framework.defaults[name]

    def shown(self, name: str) -> str:
        """The setting as a finding names it."""
        return f"{name}={self[name]!r}" if name in self else name


def is_set(source: Any, name: str) -> bool:
    """Whether the source has the setting, and no default stands for it."""
    return _read(source, name)[0]


def _read(source: Any, name: str) -> tuple[bool, Any]:
    """Whether the source has the setting, whole ("a.b") or nested (a, then b), and its value."""
    if isinstance(source, Mapping):
        if name in source:
            return True, source[name]
    elif hasattr(source, name):
        return True, getattr(source, name)
    first, _, rest = name.partition(".")
    if not rest:
        return False, None
    found, inner = _read(source, first)
    return _read(inner, rest) if found and inner is not None else (False, None)


@runtime_checkable
class Condition(Protocol):
    """What a setting's value must be, given the others."""

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it holds."""


@dataclass(frozen=True)
class Is:
    """Equal to a value."""

    wanted: Any

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return bool(value == self.wanted)


@dataclass(frozen=True)
class OneOf:
    """Equal to one of several values."""

    wanted: tuple[Any, ...]

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return value in self.wanted


@dataclass(frozen=True)
class Off:
    """Not set: None, False, 0 or empty."""

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return not value


@dataclass(frozen=True)
class Given:
    """Set to anything at all."""

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return value is not None


@dataclass(frozen=True)
class Positive:
    """A number above 0."""

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return isinstance(value, int | float) and value > 0


@dataclass(frozen=True)
class SameAs:
    """Not set, or equal to another setting."""

    other: str

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return value is None or self.other not in settings or bool(value == settings[self.other])


@dataclass(frozen=True)
class Never:
    """Nothing will do: the framework has no faithful setting."""

    def __call__(self, value: Any, settings: Settings, /) -> bool:
        """Whether it is."""
        return False


Case: TypeAlias = tuple[str, Condition]


@dataclass(frozen=True)
class Rule:
    """A setting, what it must be, what to write instead, and why."""

    setting: str
    must: Condition
    write: str | None
    why: str
    severity: Severity = "error"
    only: tuple[Case, ...] = ()
    """The rule is about runs of which all of these hold."""

    def applies(self, settings: Settings) -> bool:
        """Whether the framework has the setting, in a run that the rule is about."""
        return self.setting in settings and holds(self.only, settings)


@dataclass(frozen=True)
class Strength:
    """Where beta is: the setting, and what makes the KL weigh more than it says.

    A group's mean that includes the completion itself shrinks the reward by (G - 1) / G. A KL that is added to the
    loss afterwards is not shrunk, so that what is maximised is E[R] - beta G / (G - 1) KL.
    """

    coefficient: str
    group: str | None = None
    """The setting that has G, where its factor applies."""
    only: tuple[Case, ...] = ()

    def beta(self, settings: Settings) -> float:
        """The beta of the objective that the settings amount to."""
        return float(settings[self.coefficient]) / self._shrink(settings)

    def to_write(self, beta: float, settings: Settings) -> str:
        """What to write for a beta."""
        return f"{self.coefficient}={beta * self._shrink(settings):.6g}"

    def _shrink(self, settings: Settings) -> float:
        group = settings[self.group] if self.group else None
        return 1 - 1 / group if group and group > 1 else 1.0


@dataclass(frozen=True)
class Framework:
    """A framework's rules, and where it has what must agree with the reward; all names are those of its version."""

    name: str
    version: str
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    strengths: tuple[Strength, ...] = ()
    """The first whose cases hold says what beta is."""
    sampling: Mapping[str, str] = field(default_factory=dict)
    """Names of `Decoding` to settings."""
    clips: tuple[str, ...] = ()
    """Settings that clip rewards: (low, high), or a number for both sides; None and 0 are off."""
    only_prompts: str | None = None
    """The setting that drops the columns which a prompt's id could come from."""

    def __post_init__(self) -> None:
        names = {each.coefficient for each in self.strengths} | {each.group for each in self.strengths if each.group}
        names |= {rule.setting for rule in self.rules} | {*self.sampling.values(), *self.clips}
        cases = [*(rule.only for rule in self.rules), *(each.only for each in self.strengths)]
        names |= {name for only in cases for name, _ in only}
        if missing := sorted(names - {*self.defaults}):
            raise ValueError(f"{self.name} needs a default for each setting that it names, got none for {missing}")


def holds(cases: tuple[Case, ...], settings: Settings) -> bool:
    """Whether all of these are so."""
    return all(name in settings and must(settings[name], settings) for name, must in cases)


def broken(settings: Settings) -> list[Finding]:
    """The rules that the settings break, in the order of the table."""
    return [
        Finding(settings.shown(rule.setting), rule.why, rule.write, rule.severity)
        for rule in settings.framework.rules
        if rule.applies(settings) and not rule.must(settings[rule.setting], settings)
    ]


def strength(settings: Settings) -> Strength | None:
    """Where the run has its beta, or None where it has no KL that the reward is weighed against."""
    return next((each for each in settings.framework.strengths if holds(each.only, settings)), None)
