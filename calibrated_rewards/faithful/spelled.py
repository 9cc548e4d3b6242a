"""Settings whose names are nearly those of a rule: they were meant, and what was read is the default."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

from calibrated_rewards.faithful.rules import Finding, Settings, is_set

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
