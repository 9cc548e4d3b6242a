"""Validation dumps: the prompts and scores of each step, as verl and TRL write them while they train.

verl writes `trainer.validation_data_dir`/STEP.jsonl, a line for each completion: `input`, `output`, `gts`, `score`,
`step`, and each number or text that the reward function returned, such as `acc`. TRL with `log_completions=True` writes
OUTPUT_DIR/completions/completions_STEP.parquet: `step`, `prompt`, `completion`, a column for each reward function,
what functions logged with `log_extra`, and `advantage`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.files import Message, setting

DumpFormat: TypeAlias = Literal["verl", "trl"]
ENDINGS: Mapping[DumpFormat, str] = {"verl": ".jsonl", "trl": ".parquet"}
PROMPT: Mapping[DumpFormat, str] = {"verl": "input", "trl": "prompt"}
# Numbers of TRL's files that are no rewards.
NO_REWARDS = {"step", "advantage"}


@dataclass(frozen=True, eq=False)
class DumpedStep:
    """The prompts of one step, and the scores of each one's completions in the same order."""

    step: int
    prompts: tuple[Any, ...]
    """Texts, or lists of messages."""
    scores: Samples

    @property
    def fewest(self) -> int:
        """The smallest number of completions of a prompt."""
        return int(self.scores.sizes.min())

    @property
    def binary(self) -> bool:
        """True if every score is 0 or 1."""
        return all(((row == 0) | (row == 1)).all() for row in self.scores.judge)


@dataclass(frozen=True)
class _Row:
    """One completion, and the place that an error names."""

    place: str
    fields: Mapping[str, Any]


def read_dump(
    path: Path | str,
    format: DumpFormat | None = None,  # noqa: A002 (the name that users expect)
    *,
    score: str | None = None,
) -> dict[int, DumpedStep]:
    """Read a dump, a file or the folder of all steps, and group completions by step and prompt.

    `format` is "verl" or "trl", by default what the file's ending says. `score` names the field to read: by default
    verl's `score`, and the reward of a TRL run that has one. Completions of equal prompts are one prompt's.
    ValueError names file, line and field.
    """
    at = Path(path)
    kind = _find_format(at, format)
    files = sorted(at.glob(f"*{ENDINGS[kind]}")) if at.is_dir() else [at]
    groups: dict[int, dict[str, tuple[Any, list[float]]]] = {}
    for file in files:
        rows = _read_jsonl(file) if kind == "verl" else _read_parquet(file)
        field = score or ("score" if kind == "verl" else None)
        for row in rows:
            field = field or _find_reward(row)
            step, (prompt, key) = _read_step(row), _read_prompt(row, PROMPT[kind])
            groups.setdefault(step, {}).setdefault(key, (prompt, []))[1].append(_read_score(row, field))
    if not groups:
        raise ValueError(f"a dump has a completion or more, got none in {at}.")
    return {
        step: DumpedStep(
            step,
            tuple(prompt for prompt, _ in groups[step].values()),
            Samples([scores for _, scores in groups[step].values()]),
        )
        for step in sorted(groups)
    }


def _find_format(at: Path, wanted: DumpFormat | None) -> DumpFormat:
    """Return the format asked for, or that of the file's or the folder's files' ending."""
    if wanted is not None and wanted not in ENDINGS:
        raise ValueError(f'a dump has format "verl" or "trl", got format={wanted!r}.')
    if not at.exists():
        raise ValueError(f"a dump is a file or a folder, got {at}, which does not exist.")
    if at.is_file():
        kinds = [kind for kind, ending in ENDINGS.items() if at.suffix == ending]
    else:
        kinds = [kind for kind, ending in ENDINGS.items() if any(at.glob(f"*{ending}"))]
    if wanted is not None and (wanted in kinds or at.is_file()):
        return wanted
    if wanted is not None or len(kinds) != 1:
        files = f"{ENDINGS[wanted]} files" if wanted else "either .jsonl files (verl) or .parquet files (TRL)"
        raise ValueError(f"a dump has {files}, got {' and '.join(ENDINGS[kind] for kind in kinds) or 'none'} in {at}.")
    return kinds[0]


def _read_jsonl(file: Path) -> Iterator[_Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            place, start = f"{file}, line {number}", repr(line[:60].decode(errors="replace").strip())
            try:
                # Files that were joined have a byte order mark in the middle too.
                fields = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too many digits, too many brackets
                raise ValueError(f"{place} needs a JSON object, got {start}: {error}.") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{place} needs a JSON object, got {start}.")
            yield _Row(place, fields)


def _read_parquet(file: Path) -> Iterator[_Row]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError, ValueError) as error:  # no Parquet, cut short, texts that are no UTF-8
        raise ValueError(f"{file} needs to be a Parquet file, got {error}.") from error
    for number, fields in enumerate(rows, 1):
        yield _Row(f"{file}, row {number}", fields)


def _find_reward(row: _Row) -> str:
    """Return the field that must be the reward, the only one with numbers."""
    rewards = [name for name, value in row.fields.items() if isinstance(value, int | float) and name not in NO_REWARDS]
    if len(rewards) != 1:
        names = ", ".join(rewards) or "none"
        rule = f"{row.place} needs one field with a number as its reward, or a choice by {setting('score')}"
        raise ValueError(Message(f"{rule}; got {names}."))
    return rewards[0]


def _read_field(row: _Row, name: str) -> Any:
    if name not in row.fields:
        raise ValueError(f"{row.place} needs a field {name!r}, got {', '.join(map(repr, row.fields))}.")
    return row.fields[name]


def _read_step(row: _Row) -> int:
    step = _read_field(row, "step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{row.place} needs a whole number as step, got step={step!r:.60}.")
    return step


def _read_prompt(row: _Row, name: str) -> tuple[Any, str]:
    """Return a prompt, and the text that equal prompts share."""
    prompt = _read_field(row, name)
    try:
        key = json.dumps(prompt, sort_keys=True, ensure_ascii=False) if isinstance(prompt, str | list) else None
    except (TypeError, ValueError, RecursionError):  # messages with bytes in them, say
        key = None
    if key is None:
        raise ValueError(f"{row.place} needs a text or a list of messages as {name}, got {name}={prompt!r:.60}.")
    return prompt, key


def _read_score(row: _Row, name: str) -> float:
    value = _read_field(row, name)
    try:
        score = float(value) if isinstance(value, int | float) else inf
    except OverflowError:
        score = inf
    if not isfinite(score):
        raise ValueError(f"{row.place} needs a finite number as {name}, got {name}={value!r:.60}.")
    return score
