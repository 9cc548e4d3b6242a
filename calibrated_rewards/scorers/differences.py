"""Compare two fingerprints: of scorers and samplers, those of plain callables included.

>>> [*differences({"kind": "hash", "seed": 0}, {"kind": "hash", "seed": 1}, "scorers.reward")]
[Difference(place='scorers.reward.seed', there=0, here=1)]

A plain callable is the same if its code and its state are, wherever it stands. Where that cannot be compared (another
version of Python, another layout of the digests, a release that had no digest of the state), only its name is.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# How far two scores of one pair may be apart, in standard deviations of the references of a prompt. Equal scores of
# float32 are 1e-4 apart at most; other hardware multiplies with fewer bits (TF32). What 16 bits leave apart depends on
# the shape of the batch.
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.5
FEW_BITS = ("float16", "bfloat16", "float8", "int8", "int4", "uint8")


class Difference(NamedTuple):
    """A place in two fingerprints where they are not the same."""

    place: str
    there: Any
    here: Any


def differences(there: Any, here: Any, place: str = "") -> Iterator[Difference]:
    """Yield every place in which two fingerprints differ."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        yield from _unlike(there, here, place)
    elif _are_of_kind("callable", there, here):
        yield from _between_callables(there, here, place)
    else:
        names = {*there, *here}
        if _are_of_kind("function", there, here):
            names -= _uncompared(there, here)
        for name in sorted(names):
            yield from differences(there.get(name), here.get(name), f"{place}.{name}" if place else name)


def merge(there: Any, here: Any) -> Any:
    """Return the fingerprint `here`, an equal one of `there`, with the parts of state that either knows to change."""
    if isinstance(there, list) and isinstance(here, list):
        return [merge(*pair) for pair in zip(there, here, strict=True)] if len(there) == len(here) else here
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return here
    merged = {name: merge(there.get(name), value) for name, value in here.items()}
    changing = sorted({*there.get("changing", ()), *here.get("changing", ())})
    return {**merged, "changing": changing} if changing else merged


def tolerance_of(there: Any, here: Any) -> float:
    """Return the largest gap between two equal scorers' scores of one pair, in standard deviations."""
    few_bits = [
        any(str(each.get("dtype", "")).startswith(FEW_BITS) for each in _walk(fingerprint))
        for fingerprint in (there, here)
    ]
    return TOLERANCE_16_BIT if all(few_bits) else TOLERANCE


def depends_on_calls(fingerprint: Any) -> bool:
    """Return whether a fingerprint is that of a plain callable, or holds one, whose state its calls may change."""
    return any(each.get("kind") == "callable" for each in _walk(fingerprint))


def unread(fingerprint: Any) -> list[str]:
    """List the parts of the state of plain callables that no fingerprint can tell apart."""
    callables = (each for each in _walk(fingerprint) if each.get("kind") == "callable")
    return [str(name) for each in callables for name in each.get("unread") or ()]


def _walk(fingerprint: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping inside a fingerprint, itself first."""
    if isinstance(fingerprint, Mapping):
        yield fingerprint
        fingerprint = [*fingerprint.values()]
    for member in fingerprint if isinstance(fingerprint, list) else ():
        yield from _walk(member)


def mark_changing(before: Any, after: Any) -> Any:
    """Return the fingerprint before some calls, with the names of the parts of its state that the calls changed.

    A counter, a cache or a model that is loaded at the first call makes no other scorer.

    >>> before = {"kind": "callable", "name": "m.f", "python": "3.11", "code": "ab", "state": {"calls": 0, "sign": 1}}
    >>> mark_changing(before, {**before, "state": {"calls": 3, "sign": 1}})["changing"]
    ['calls']
    """
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [mark_changing(*pair) for pair in zip(before, after, strict=True)]
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return before
    if not _are_of_kind("callable", before, after):
        return {name: mark_changing(value, after.get(name)) for name, value in before.items()}
    old, new = before.get("state", {}), after.get("state", {})
    changed = {name for name in {*old, *new} if name not in old or name not in new or old[name] != new[name]}
    changing = sorted(changed | {*before.get("changing", ())})
    return {**before, "changing": changing} if changing else before


def _between_callables(there: Mapping[str, Any], here: Mapping[str, Any], place: str) -> Iterator[Difference]:
    if not _have_comparable_digests(there, here):
        yield from _unlike(_place_free(there.get("name")), _place_free(here.get("name")), f"{place}.name")
        return
    if there["code"] != here["code"]:
        yield from _unlike(there.get("name"), here.get("name"), f"{place}.name")
        yield Difference(f"{place}.code", there["code"], here["code"])
    old, new = there.get("state", {}), here.get("state", {})
    for name in sorted({*old, *new} - {*there.get("changing", ()), *here.get("changing", ())}):
        yield from _unlike(old.get(name, "nothing"), new.get(name, "nothing"), f"{place}.state.{name}")


def _uncompared(there: Mapping[str, Any], here: Mapping[str, Any]) -> set[str]:
    """Return the fields that tell nothing about two Functions: the code of one alone, the place of equal code."""
    if not ("function" in there and "function" in here):
        return {"function"}
    both = there["function"], here["function"]
    mappings = all(isinstance(each, Mapping) for each in both)
    return {"name"} if mappings and _have_comparable_digests(*both) and not [*differences(*both)] else set()


def _have_comparable_digests(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return whether two callables were digested by the same Python and in the same layout (0.1 names none)."""
    return there.get("python") is not None and all(there.get(name) == here.get(name) for name in ("python", "layout"))


def _place_free(name: Any) -> Any:
    """Return a callable's name; of one of the package's own without the module that it stood in, as 0.1 wrote it."""
    ours = isinstance(name, str) and name.startswith("calibrated_rewards.")
    return f"calibrated_rewards.{name.rpartition('.')[2]}" if ours else name


def _unlike(there: Any, here: Any, place: str) -> Iterator[Difference]:
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, pair in enumerate(zip(there, here, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif isinstance(there, str) and isinstance(here, Mapping) and here.get("kind") == "callable":
        return  # a release that knew a function by its name or its repr
    elif there != here:
        yield Difference(place, there, here)


def _are_of_kind(kind: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    return there.get("kind") == here.get("kind") == kind
