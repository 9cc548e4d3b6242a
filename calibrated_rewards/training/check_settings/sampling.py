"""Whether a trainer draws completions as calibration drew them: other settings are another reference policy."""

from collections.abc import Iterator, Mapping
from math import isclose
from typing import Any

from calibrated_rewards.training.check_settings.rules import Finding, Settings

# What leaves the model's own distribution alone, as `Decoding` writes it.
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Frameworks write "all tokens" as None, 0, -1 or a number beyond any vocabulary.
_BEYOND_ANY_VOCABULARY = 10**7


def bent(settings: Settings) -> Iterator[Finding]:
    """Sampling settings that the log-probabilities of the loss know nothing of: top_p, top_k, min_p, penalties."""
    for name, setting in settings.framework.sampling.items():
        if name in _NEUTRAL and setting in settings and not _same(name, settings[setting], _NEUTRAL[name]):
            why = "completions are drawn from another distribution than the one whose log-probabilities are trained"
            yield Finding(settings.shown(setting), why, f"{setting}={_NEUTRAL[name]}")


def other_than_calibrated(settings: Settings, meta: Mapping[str, Any]) -> Iterator[Finding]:
    """Sampling settings that are not those that the table's references were drawn with."""
    decoding = decoding_of(meta)
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
        yield Finding(settings.shown(setting), why, f"{setting}={decoding[name]!r}", "warning" if unknown else "error")


def decoding_of(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The decoding settings that a table remembers, or None."""
    sampler = meta.get("sampler")
    decoding = sampler.get("decoding") if isinstance(sampler, Mapping) else None
    return decoding if isinstance(decoding, Mapping) else None


def _same(name: str, value: Any, wanted: Any) -> bool:
    one, other = _plain(name, value), _plain(name, wanted)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _plain(name: str, value: Any) -> Any:
    """The value as `Decoding` writes it: one way to say that a setting is off."""
    if value is None and name in _NEUTRAL:
        return _NEUTRAL[name]
    if name == "top_k" and isinstance(value, int | float) and (value < 0 or value >= _BEYOND_ANY_VOCABULARY):
        return 0
    return value
