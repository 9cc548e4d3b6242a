"""Files of an experiment as they were kept; of one that is something else, its name and what is wrong with it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What the page draws or adds up; a run may keep whatever else it likes.
DRAWN = ("reward", "u", "kl", "seconds", "seconds_scoring")


def json_object(path: Path) -> Mapping[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} needs to be a JSON object, got something else, or a part of one: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} needs to be a JSON object, got {found!r:.80}.")
    return found


def logged(path: Path) -> list[Mapping[str, Any]]:
    """The steps of a log, without a line whose writing was broken off."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} needs to be text, a JSON object a line, got {error}.") from error
    return [*_rows(path, lines)]


def _rows(path: Path, lines: list[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if line.lstrip()[:1] in ("", "{"):
                continue
            row = line
        rule = f"{path} needs a JSON object of numbers with a step in each line, got"
        if not isinstance(row, dict) or not _number(row.get("step")):
            raise ValueError(f"{rule} {row!r:.80} in line {number}.")
        wrong = [name for name in DRAWN if row.get(name) is not None and not _number(row[name])]
        if wrong:
            raise ValueError(f"{rule} {wrong[0]}={row[wrong[0]]!r:.60} in line {number}.")
        yield row


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
