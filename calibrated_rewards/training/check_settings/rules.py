"""Rules for a framework's settings: what each must be for a run to maximise E[reward] - beta KL, and what to write.

`Framework` is a table of rules, `FrameworkSettings` reads the settings that they name from a dataclass or a namespace,
nested mappings (OmegaConf's too), or one mapping with dotted names, and `find_broken_rules` compares the two.

>>> rule = Rule("algo.scale", Is("none"), "algo.scale=none", "a reward over its standard deviation has no beta")
>>> toy = Framework("toy", "1.0", (rule,), {"algo.scale": "group"})
>>> [str(finding) for finding in find_broken_rules(FrameworkSettings({}, toy))]
["error: algo.scale='group': a reward over its standard deviation has no beta. Write algo.scale=none."]
>>> find_broken_rules(FrameworkSettings({"algo": {"scale": "none"}}, toy))
[]
>>> find_broken_rules(FrameworkSettings({"algo.scale": "none"}, toy))
[]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeAlias

from calibrated_rewards.samplers.protocol import Decoding

Severity: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A setting, what is wrong with it, and what to write instead; a note is information, and nothing is wrong."""

    setting: str
    """The name alone where the framework does not have the setting, else name=value."""
    why: str
    write: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.setting}: {self.why}." + (f" Write {self.write}." if self.write else "")


@dataclass(frozen=True, eq=False)
class FrameworkSettings:
    """Settings by their dotted names, read from `source`; a setting that it lacks has the framework's default."""

    source: Any
    framework: "Framework"

    def __contains__(self, name: str) -> bool:
        return is_set(self.source, name) or name in self.framework.defaults

    def __getitem__(self, name: str) -> Any:
        present, value = _read(self.source, name)
        return value if present else self.framework.defaults[name]

    def describe(self, name: str) -> str:
        """Name a setting, with its value if it has one, as findings do."""
        return f"{name}={self[name]!r}" if name in self else name


def is_set(source: Any, name: str) -> bool:
    """Tell whether the source itself has the setting, so that no default stands for it."""
    return _read(source, name)[0]


def _read(source: Any, name: str) -> tuple[bool, Any]:
    """Look a setting up by its whole name ("a.b") or nested (a, then b): whether it is there, and its value."""
    if isinstance(source, Mapping):
        if name in source:
            return True, source[name]
    elif hasattr(source, name):
        return True, getattr(source, name)
    first, _, rest = name.partition(".")
    if not rest:
        return False, None
    present, inner = _read(source, first)
    return _read(inner, rest) if present and inner is not None else (False, None)


# Tests of a setting's value, given what it is compared with and the other settings.
TESTS: dict[str, Callable[[Any, Any, FrameworkSettings], bool]] = {
    "is": lambda value, right, settings: bool(value == right),
    "is one of": lambda value, right, settings: value in right,
    "is off": lambda value, right, settings: not value,  # None, False, 0 or empty
    "is given": lambda value, right, settings: value is not None,
    "is positive": lambda value, right, settings: isinstance(value, int | float) and value > 0,
    "is None or the same as": lambda value, other, settings: (
        value is None or other not in settings or bool(value == settings[other])
    ),
    "is never right": lambda value, right, settings: False,  # the framework has no faithful setting
}


@dataclass(frozen=True)
class Condition:
    """A condition on a setting's value: the name of its test in TESTS, and what the value is compared with."""

    test: str
    right: Any = None
    """The right value, several of them, or the name of another setting."""

    def __call__(self, value: Any, settings: FrameworkSettings, /) -> bool:
        """Return True where the value is as it must be."""
        return TESTS[self.test](value, self.right, settings)


Is, OneOf, SameAs = (partial(Condition, test) for test in ("is", "is one of", "is None or the same as"))
OFF, ON, GIVEN = Condition("is off"), Is(True), Condition("is given")
POSITIVE, NEVER = Condition("is positive"), Condition("is never right")

Cases: TypeAlias = tuple[tuple[str, Condition], ...]


@dataclass(frozen=True)
class Rule:
    """A setting, what it must be, what to write instead, and what goes wrong otherwise."""

    setting: str
    must: Condition
    write: str | None
    why: str
    severity: Severity = "error"
    only: Cases = ()
    """The rule applies to runs in which all of these hold."""

    def is_broken(self, settings: FrameworkSettings) -> bool:
        """Tell whether the framework has the setting, in a run that the rule is about, with a wrong value."""
        applies = self.setting in settings and all_hold(self.only, settings)
        return applies and not self.must(settings[self.setting], settings)


@dataclass(frozen=True)
class Strength:
    """The setting that has beta, and the factor by which the KL weighs more than it says.

    A group's mean that includes the completion itself shrinks the reward by (G - 1) / G. A KL that is added to the
    loss afterwards is not shrunk, so that what is maximised is E[R] - beta G / (G - 1) KL.
    """

    coefficient: str
    group: str | None = None
    """The setting that has G, where its factor applies."""
    only: Cases = ()

    def beta(self, settings: FrameworkSettings) -> float:
        """Compute the beta of the objective that the settings amount to."""
        return float(settings[self.coefficient]) / self._shrink(settings)

    def to_write(self, beta: float, settings: FrameworkSettings) -> str:
        """Spell the setting for a beta that is wanted."""
        return f"{self.coefficient}={beta * self._shrink(settings):.6g}"

    def _shrink(self, settings: FrameworkSettings) -> float:
        group = settings[self.group] if self.group else None
        return 1 - 1 / group if group and group > 1 else 1.0


@dataclass(frozen=True)
class Framework:
    """A framework's rules, and the settings that must agree with the reward; names are those of its version."""

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
    title: str = ""
    optimum: str = ""
    """How near faithful settings come to the optimum, as the documents say it."""
    write: str = ""
    """The faithful settings in one line, as the documents say them."""

    def __post_init__(self) -> None:
        names = {each.coefficient for each in self.strengths} | {each.group for each in self.strengths if each.group}
        names |= {rule.setting for rule in self.rules} | {*self.sampling.values(), *self.clips}
        cases = [*(rule.only for rule in self.rules), *(each.only for each in self.strengths)]
        names |= {name for only in cases for name, _ in only}
        if missing := sorted(names - {*self.defaults}):
            raise ValueError(f"{self.name} needs a default for each setting that it names, got none for {missing}")


@dataclass(frozen=True)
class Row:
    """A line of a framework's table: a rule with the default of its setting."""

    setting: str
    default: Any
    must: Condition
    write: str | None
    """What to write; `{}` stands for the setting as the framework's command line or configuration spells it."""
    why: str
    severity: Severity = "error"
    only: Cases = ()


LEAVE_OUT = "the command without {}"
SPELLINGS: dict[str, tuple[str, str]] = {"": ("", "_"), "--a_b": ("--", "_"), "--a-b": ("--", "-")}


def build_framework(
    name: str,
    version: str,
    *,
    rows: tuple[Row, ...],
    sampling: Mapping[str, tuple[str, Any]],
    others: Mapping[str, Any],
    spelling: Literal["", "--a_b", "--a-b"] = "",
    **more: Any,
) -> Framework:
    """Build a framework from the rows of its table, its sampling settings and its other settings, with defaults."""
    dashes, joint = SPELLINGS[spelling]
    rules = []
    for row in rows:
        setting = dashes + row.setting.replace("_", joint)
        write = None if row.write is None else row.write.replace("{}", setting)
        rules.append(Rule(row.setting, row.must, write, row.why, row.severity, row.only))
    defaults = {row.setting: row.default for row in rows} | dict(sampling.values()) | dict(others)
    names = {decoding: setting for decoding, (setting, _) in sampling.items()}
    return Framework(name, version, tuple(rules), defaults, sampling=names, **more)


def all_hold(cases: Cases, settings: FrameworkSettings) -> bool:
    """Tell whether each named setting is there and as its condition says."""
    return all(name in settings and must(settings[name], settings) for name, must in cases)


def find_broken_rules(settings: FrameworkSettings) -> list[Finding]:
    """List the rules that the settings break, in the order of the table."""
    return [
        Finding(settings.describe(rule.setting), rule.why, rule.write, rule.severity)
        for rule in settings.framework.rules
        if rule.is_broken(settings)
    ]


def find_strength(settings: FrameworkSettings) -> Strength | None:
    """Find where the run has its beta; None where it has no KL that the reward is weighed against."""
    return next((each for each in settings.framework.strengths if all_hold(each.only, settings)), None)


def read_decoding(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read from a table's metadata how its references were drawn; None where it does not say."""
    sampler = meta.get("sampler")
    decoding = sampler.get("decoding") if isinstance(sampler, Mapping) else None
    return decoding if isinstance(decoding, Mapping) else None


def restore_decoding(meta: Mapping[str, Any], table: str, remedy: str) -> Decoding:
    """Restore the decoding of a table's references; ValueError with the remedy if its metadata does not say all."""
    recorded = read_decoding(meta)
    # Of a part of the settings the others would be guessed.
    if recorded is None or {*recorded} != {each.name for each in fields(Decoding)}:
        got = "" if recorded is None else f", only {dict(recorded)!r:.200}"
        raise ValueError(f"{table} does not say how its references were drawn{got}: {remedy}")
    try:
        lists = {name: tuple(value) for name, value in recorded.items() if isinstance(value, list)}
        return Decoding(**{**recorded, **lists})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the decoding that {table} records cannot be used, {error}: {remedy}") from error
