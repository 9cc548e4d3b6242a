"""Whether a table is fit for use: how it was made, what its references tell, how far prompts are apart, what is odd.

>>> import numpy as np
>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> rng = np.random.default_rng(0)
>>> rows = [(f"prompt {i}", rng.normal(loc=i, size=50)) for i in range(40)]
>>> table = ReferenceTable.build([*rows, ("broken", [0.0] * 50)], meta={"seed": 7})
>>> print(str(health(table)).partition("resolution")[0])
in memory
  prompts                 41
  references              2,050; 50 a prompt
made with
  seed                    7
<BLANKLINE>
>>> [(odd.reason, odd.detail) for odd in health(table).odd]
[('all equal', '50 references of 0')]
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from calibrated_rewards.health.row_statistics import row_statistics
from calibrated_rewards.health.sections import (
    Lines,
    Precision,
    Resolution,
    Size,
    Spread,
    precision,
    resolution,
    spread,
)
from calibrated_rewards.health.suspicious_rows import Suspicion, suspicions
from calibrated_rewards.table.reference_table import ReferenceTable

_LONGEST = 160


@dataclass(frozen=True)
class Odd:
    """A suspicious row; with how its prompt starts, where the rollouts are at hand."""

    row: int
    key: str
    reason: str
    detail: str
    prompt: str | None = None


@dataclass(frozen=True)
class Health:
    """What `health` found: it prints as a report, and `as_json` is the same as an object.

    `odd_rows` counts suspicious rows by reason, `odd` are the first of each.
    """

    where: str | None
    meta: Mapping[str, Any]
    size: Size
    resolution: Resolution
    precision: Precision
    spread: Spread
    odd_rows: Mapping[str, int]
    odd: tuple[Odd, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it; of the probes, how many there are."""
        probes = self.meta.get("probes")
        meta = {**self.meta, "probes": len(probes)} if isinstance(probes, list) else dict(self.meta)
        odd = [asdict(each) for each in self.odd]
        sections = {name: asdict(getattr(self, name)) for name in ("size", "resolution", "precision", "spread")}
        return {"where": self.where, "meta": meta, **sections, "odd_rows": dict(self.odd_rows), "odd": odd}

    def __str__(self) -> str:
        return "\n".join(
            [
                *section(self.where or "in memory", self.size.lines()),
                *section("made with", made_with(self.meta)),
                *section("resolution", self.resolution.lines()),
                *section(self.precision.heading, self.precision.lines()),
                *section("spread between prompts", self.spread.lines()),
                *section("suspicious rows", self._odd_lines()),
            ]
        )

    def _odd_lines(self) -> Lines:
        for reason, count in self.odd_rows.items():
            yield reason, f"{count:,} row{'s' * (count > 1)}"
            for each in self.odd:
                if each.reason == reason:
                    start = f"  {each.prompt}" if each.prompt is not None else ""
                    yield "", f"{each.key} (row {each.row}): {each.detail}{start}"
        if not self.odd_rows:
            yield "none", ""


def health(table: ReferenceTable, most: int = 5) -> Health:
    """Reads a table thrice, in memory that grows with its prompts and not with K; `most` odd rows for each reason."""
    of, described = row_statistics(table), table.describe()
    found = suspicions(table, of)
    fewest, median, greatest = (described[f"references_{name}"] for name in ("min", "median", "max"))
    return Health(
        where=table.path,
        meta=table.meta,
        size=Size(len(table), int(described["references"]), int(fewest), median, int(greatest)),
        resolution=resolution(of, described["tied_share"]),
        precision=precision(of, described["tied_share"]),
        spread=spread(table, of, described),
        odd_rows=dict(Counter(each.reason for each in found)),
        odd=_first(table, found, most),
    )


def _first(table: ReferenceTable, found: list[Suspicion], most: int) -> tuple[Odd, ...]:
    """The first of each reason, with their keys."""
    seen: Counter[str] = Counter()
    chosen = []
    for each in found:
        seen[each.reason] += 1
        chosen += [each] if seen[each.reason] <= most else []
    wanted = {each.row for each in chosen}
    keys = {row: key.hex() for row, (key, _) in enumerate(table.items()) if row in wanted} if wanted else {}
    return tuple(Odd(each.row, keys[each.row], each.reason, each.detail) for each in chosen)


def made_with(meta: Mapping[str, Any]) -> Lines:
    """A line for each thing that the meta says, objects within as `name: value`, long texts cut.

    >>> meta = {"seed": 0, "scorer": {"kind": "cost", "of": {"template": "x" * 500}}, "probes": [{}, {}]}
    >>> for label, text in made_with(meta):
    ...     print(label, "|", text)
    seed | 0
    scorer | kind: cost
     | of.template: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
    probes | 2 pairs with their scores
    """
    for name, value in meta.items():
        if name == "probes" and isinstance(value, list):
            yield name, f"{len(value)} pairs with their scores"
            continue
        for place, text in enumerate(_flat(value) or ["nothing"]):
            yield "" if place else name, text
    if not meta:
        yield "not said", ""


def _flat(value: Any, name: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, inner in value.items() for line in _flat(inner, f"{name}.{key}".lstrip("."))]
    if value is None:
        return []
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return [f"{name}: " * bool(name) + (text if len(text) <= 60 else f"{text[:57]}...")]


def section(heading: str, lines: Lines) -> list[str]:
    """A heading, and its lines indented, their texts one under the other."""
    return [heading, *(f"  {label:<24}{text}".rstrip() for label, text in lines)]
