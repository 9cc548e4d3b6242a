"""Health of a table: how it was made, the precision of its references, the spread of prompts, suspicious rows.

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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import ceil, log, sqrt
from typing import Any, TypeAlias

import numpy as np

from calibrated_rewards.calibration.suspicious_rows import RowStatistics, Suspicion, describe_rows, find_suspicious_rows
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.bands import band
from calibrated_rewards.theory.finite_k import MOST_BANDED

Lines: TypeAlias = Iterator[tuple[str, str]]

DELTA, TARGET = 0.05, 0.05
# K times the variance of the calibrated reward of a response in the middle, without ties.
UNTIED_MIDDLE = 0.25
# The mean of Kolmogorov's law: sup |F_K - F| is about this over sqrt(K).
_KOLMOGOROV = 0.8687
_POOLED_SCORES = 1 << 20


@dataclass(frozen=True)
class Size:
    """The numbers of prompts and references: in all, and the fewest, median and most of a prompt."""

    prompts: int
    references: int
    fewest: int
    median: float
    most: int

    def lines(self) -> Lines:
        """Yield the numbers of prompts and references."""
        each = f"{self.most:,} a prompt"
        if self.fewest < self.most:
            each = f"{self.fewest:,} to {self.most:,} a prompt, the median has {self.median:,.0f}"
        yield "prompts", f"{self.prompts:,}"
        yield "references", f"{self.references:,}; {each}"


@dataclass(frozen=True)
class Resolution:
    """Ties and saturation, which keep references from telling responses apart: shares of references, or of prompts.

    `at_highest` are equal to the highest of their prompt (1/K of them at least), `at_ceiling` to the highest score of
    all. A reward model that clips has many of both. `unresolved` prompts have equal references only: their every reward
    is that of a quantile of 0, 1/2 or 1.
    """

    tied: float
    at_highest: float
    at_lowest: float
    prompts_sharing_highest: float
    prompts_sharing_lowest: float
    ceiling: float
    at_ceiling: float
    floor: float
    at_floor: float
    unresolved: int
    unresolved_share: float

    def lines(self) -> Lines:
        """Yield ties, saturation, and prompts without resolution."""
        yield "ties", f"{percent(self.tied)} of references equal another of their prompt"
        for end, at, sharing in (
            ("highest", self.at_highest, self.prompts_sharing_highest),
            ("lowest", self.at_lowest, self.prompts_sharing_lowest),
        ):
            shared = f"shared by several references in {percent(sharing)} of prompts"
            yield f"{end} of a prompt", f"{shared}; {percent(at)} of references are there"
        for end, score, at in (("highest", self.ceiling, self.at_ceiling), ("lowest", self.floor, self.at_floor)):
            yield f"{end} of all", f"{score:.6g}, the score of {percent(at)} of references"
        some = f"{self.unresolved:,} ({percent(self.unresolved_share)}): all their references are equal"
        yield "unresolved prompts", some if self.unresolved else "none"


def measure_resolution(rows: RowStatistics, tied: float) -> Resolution:
    """Measure resolution by the rows' ends, each counted with its ties."""
    total, alone = rows.size.sum(), (rows.distinct == 1) & (rows.size > 1)
    ceiling, floor = rows.highest.max(), rows.lowest.min()
    return Resolution(
        tied=tied,
        at_highest=float(rows.at_highest.sum() / total),
        at_lowest=float(rows.at_lowest.sum() / total),
        prompts_sharing_highest=float((rows.at_highest > 1).mean()),
        prompts_sharing_lowest=float((rows.at_lowest > 1).mean()),
        ceiling=float(ceiling),
        at_ceiling=float(rows.at_highest[rows.highest == ceiling].sum() / total),
        floor=float(floor),
        at_floor=float(rows.at_lowest[rows.lowest == floor].sum() / total),
        unresolved=int(alone.sum()),
        unresolved_share=float(alone.mean()),
    )


@dataclass(frozen=True)
class Precision:
    """Precision of a quantile at 95 % with the median number of references, K, and the ties that the table has.

    `rms` is the error's root mean square over the reference policy's responses; `values` the median number of different
    rewards among the references of a prompt. A response above all references has a quantile of at least `above_all`,
    one in their middle is known to `middle` on either side. The same `_at_once` holds for all responses together; it is
    None for K > 1000, for which it takes long, and where most references tie, for which it is too wide. `needed`
    references have an rms of 0.05, `needed_at_once` an error of 0.05 for all responses together.
    """

    K: int
    values: int
    tied: float
    rms: float
    above_all: float
    middle: float
    above_all_at_once: float | None
    middle_at_once: float | None
    needed: int
    needed_at_once: int

    @property
    def heading(self) -> str:
        """The heading of the section."""
        ties = "no references tie" if self.tied == 0 else f"{percent(self.tied)} of references tie"
        return f"precision at K = {self.K}, 95 %, {ties}"

    def lines(self) -> Lines:
        """Yield the band at its ends and in the middle, and the references that would make it narrower."""
        high = f" ({self.above_all_at_once:.3f} for all at once)" if self.above_all_at_once is not None else ""
        wide = f" (± {self.middle_at_once:.3f} for all at once)" if self.middle_at_once is not None else ""
        if self.tied:
            yield "rewards of a prompt", f"{self.values} different ones among its {self.K} references, the median"
        yield "a reward near the top", f"above all references is a quantile of {self.above_all:.3f} or more{high}"
        yield "a reward in the middle", f"is known to ± {self.middle:.3f}{wide}"
        yield "a reward on average", f"is off by {self.rms:.3f}, rms"
        all_at_once = f"{self.needed_at_once:,} for ± {TARGET:g} of all rewards at once"
        yield "references needed", f"{self.needed:,} for {TARGET:g} rms; {all_at_once}"


def measure_precision(rows: RowStatistics, tied: float) -> Precision:
    """Measure precision by the rows' ties and their median K."""
    K, variance = int(np.median(rows.size)), float(rows.u_variance.mean())
    lower, upper = band(K, DELTA, "pointwise")
    middle = float(upper[K] - lower[K]) / 2
    if tied > 0:  # as much narrower or wider as the standard error is, which ties change
        middle *= sqrt(float(rows.u_middle.mean()) / UNTIED_MIDDLE)
    at_once = band(K, DELTA) if K <= MOST_BANDED and tied <= 0.5 else None
    return Precision(
        K=K,
        values=int(np.median(rows.distinct)),
        tied=tied,
        rms=sqrt(variance / K),
        above_all=float(lower[-1]),
        middle=middle,
        above_all_at_once=float(at_once[0][-1]) if at_once else None,
        middle_at_once=float(at_once[1][K] - at_once[0][K]) / 2 if at_once else None,
        needed=max(1, ceil(variance / TARGET**2 * (1 - 1e-12))),
        needed_at_once=ceil(log(2 / DELTA) / (2 * TARGET**2)),  # Lemma 6; for so many no band is better
    )


@dataclass(frozen=True)
class Spread:
    """The distance between prompts, by which raw scores are miscalibrated when they are compared between prompts.

    `between_share` is the part of the raw scores' variance that is between prompts. `distance` is the mean of
    Kolmogorov's from a prompt's references to those of all prompts, `distance_by_chance` what K references of one law
    have. `medians_in_top_tenth` are the prompts whose median response is among the best tenth of all responses by its
    raw score; of scores that can be compared, none are, nor in the worst tenth.
    """

    within_sd: float
    between_sd: float
    between_share: float
    distance: float
    distance_by_chance: float
    medians_in_top_tenth: float
    medians_in_bottom_tenth: float

    def lines(self) -> Lines:
        """Yield the spread, and how raw scores mislead."""
        sd = f"{self.between_sd:.4g} between the prompts' means, {self.within_sd:.4g} within a prompt"
        yield "standard deviation", f"{sd}: {percent(self.between_share)} of the variance is between prompts"
        chance = f"chance alone makes it {self.distance_by_chance:.3f}"
        yield "a prompt from all", f"Kolmogorov distance {self.distance:.3f} on average; {chance}"
        top, bottom = percent(self.medians_in_top_tenth), percent(self.medians_in_bottom_tenth)
        yield (
            "raw scores mislead",
            f"{top} of prompts have their median in the top tenth of all, {bottom} in the bottom",
        )


def measure_spread(table: ReferenceTable, rows: RowStatistics, described: dict[str, float]) -> Spread:
    """Measure the spread by the rows' moments and medians, and `table.describe()`."""
    low, high = np.quantile(_pooled(table, int(rows.size.sum())), [0.1, 0.9])
    several = rows.size > 1
    within = float(rows.variance[several].mean()) if several.any() else 0.0
    # Means of K scores have a variance of their own, though prompts may be alike.
    noise = float((rows.variance[several] / rows.size[several]).sum() / len(rows.size))
    apart = max(float(rows.mean.var(ddof=1)) - noise, 0.0) if len(rows.size) > 1 else 0.0
    return Spread(
        within_sd=described["within_prompt_sd"],
        between_sd=described["between_prompts_sd"],
        between_share=apart / (apart + within) if apart + within > 0 else 0.0,
        distance=described["kolmogorov_distance"],
        distance_by_chance=_KOLMOGOROV / sqrt(described["references_median"]),
        medians_in_top_tenth=float((rows.median > high).mean()),
        medians_in_bottom_tenth=float((rows.median < low).mean()),
    )


def percent(share: float) -> str:
    """Write a share as a percentage, never 0 % for what is there.

    >>> [percent(x) for x in (0.0, 0.00004, 0.1234, 1.0)]
    ['0 %', '< 0.1 %', '12.3 %', '100 %']
    """
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f}".removesuffix(".0") + " %"


def _pooled(table: ReferenceTable, total: int) -> np.ndarray:
    """Pool all references; of more than a million, those of every n-th prompt: keys are hashes, so it is fair."""
    most = max(1, _POOLED_SCORES * len(table) // total)
    sample = np.unique(np.linspace(0, len(table) - 1, min(most, len(table))).astype(np.int64))
    return np.concatenate([scores.ravel() for _, scores in table.blocks(sample)])


_LONGEST = 160


@dataclass(frozen=True)
class Odd:
    """A suspicious row; with the start of its prompt, where the rollouts are at hand."""

    row: int
    key: str
    reason: str
    detail: str
    prompt: str | None = None


@dataclass(frozen=True)
class Health:
    """The result of `health`: it prints as a report, and `as_json` is the same as an object.

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
        """Return all fields in the types of JSON, with the number of probes in place of them."""
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
    """Inspect a table, in memory that grows with its prompts and not with K; `most` odd rows for each reason."""
    rows, described = describe_rows(table), table.describe()
    suspicious = find_suspicious_rows(table, rows)
    fewest, median, greatest = (described[f"references_{name}"] for name in ("min", "median", "max"))
    return Health(
        where=table.path,
        meta=table.meta,
        size=Size(len(table), int(described["references"]), int(fewest), median, int(greatest)),
        resolution=measure_resolution(rows, described["tied_share"]),
        precision=measure_precision(rows, described["tied_share"]),
        spread=measure_spread(table, rows, described),
        odd_rows=dict(Counter(each.reason for each in suspicious)),
        odd=_select_first(table, suspicious, most),
    )


def _select_first(table: ReferenceTable, suspicious: list[Suspicion], most: int) -> tuple[Odd, ...]:
    """Select the first rows of each reason, with their keys."""
    reasons = dict.fromkeys(each.reason for each in suspicious)
    chosen = [each for reason in reasons for each in [odd for odd in suspicious if odd.reason == reason][:most]]
    keys = table.keys([each.row for each in chosen]) if chosen else []
    return tuple(Odd(each.row, key.hex(), each.reason, each.detail) for each, key in zip(chosen, keys, strict=True))


def made_with(meta: Mapping[str, Any]) -> Lines:
    """Yield a line for each entry of the meta, objects within as `name: value`, long texts cut.

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
        for number, text in enumerate(_flat(value) or ["nothing"]):
            yield "" if number else name, text
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
    """Format a heading and its lines, indented, their texts one under the other."""
    return [heading, *(f"  {label:<24}{text}".rstrip() for label, text in lines)]
