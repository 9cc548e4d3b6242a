"""What training for each reward would come to, as the rollouts have it: tables, words, JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from calibrated_rewards.evaluation.estimates import FEW, Stated
from calibrated_rewards.files import write_file

RELIABLE = 5
"""The effective number of rollouts below which docs/evidence/results.md found win rates off by more than .02."""
ERRORS = (
    (1.5, 0.137, 0.113),
    (3.0, 0.072, 0.062),
    (5.0, 0.042, 0.039),
    (8.0, 0.023, 0.025),
    (12.0, 0.014, 0.015),
    (20.0, 0.007, 0.008),
    (50.0, 0.005, 0.006),
    (inf, 0.002, 0.002),
)
"""Below which ESS, the largest error of a win rate and of a gain that benchmarks/results/reweighted.json has there."""


@dataclass(frozen=True)
class Point:
    """One reward at one KL."""

    arm: str
    """What is maximised, by its name on the command line: "identity", "exp:10", "raw", ..."""
    kl: float
    """Mean over the prompts, the same for all arms."""
    kl_spread: float
    """Its standard deviation between prompts: a raw score spends more KL on some prompts than on others."""
    beta: float
    ess: float
    """Effective number of rollouts of a prompt behind the numbers: the least of `ess_of`."""
    ess_of: Mapping[str, float]
    """By procedure: 1 / sum A_i^2, the least of the policy's weights, its output's and the base's; a harmonic mean."""
    win_rates: Mapping[str, Mapping[str, Stated]]
    """By scorer that judges, then by procedure, as its repr."""
    gains: Mapping[str, Mapping[str, Stated]]
    """The same less those of the first arm, paired by prompt; empty where that does not reach this KL."""
    ess_of_gains: Mapping[str, float] = field(default_factory=dict)
    """By procedure: the lesser of this arm's and the first arm's; empty where there are no gains."""


def margin(ess: float) -> float:
    """How far off a gain was, at the most, where it rested on this many effective rollouts of a prompt.

    Found on one model of scores (docs/evidence/results.md): a measure of what too small a K does, no bound.

    >>> margin(2.0), margin(100.0)
    (0.062, 0.002)
    """
    return next(gain for below, _, gain in ERRORS if ess < below or below == inf)


def ess_of_gain(point: Point, procedure: str) -> float:
    """How many effective rollouts of a prompt a gain rests on."""
    return point.ess_of_gains.get(procedure, point.ess_of[procedure])


def told(point: Point, judge: str, procedure: str) -> Literal["better", "worse"] | None:
    """Which way an arm differs from the first; None where its interval, widened by the margin, does not say."""
    gain = point.gains[judge][procedure] if point.gains else None
    if gain is None or gain.low is None or gain.high is None:
        return None
    off = margin(ess_of_gain(point, procedure))
    return "better" if gain.low > off else "worse" if gain.high < -off else None


@dataclass(frozen=True)
class Reweighted:
    """What the comparison found: all arms at each KL."""

    points: tuple[Point, ...]
    procedures: tuple[str, ...]
    selected_by: str
    prompts: int
    rollouts: int
    """Of each prompt, K; the least of them."""
    left_out: tuple[str, ...] = ()
    """Which arms are missing at which KL, and why."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, in one step."""
        write_file(path, json.dumps(self.as_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Reweighted":
        """Read what `save` wrote."""
        try:
            saved = json.loads(Path(path).read_text())
            points = tuple(Point(**{**point, **_stated_again(point)}) for point in saved["points"])
            procedures, left_out = tuple(saved["procedures"]), tuple(saved["left_out"])
            return cls(points, procedures, saved["selected_by"], saved["prompts"], saved["rollouts"], left_out)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} needs to be a frontier that Reweighted.save wrote, got {error!r}.") from error


def _stated_again(point: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {judge: {key: Stated.read(value) for key, value in by.items()} for judge, by in point[name].items()}
        for name in ("win_rates", "gains")
    }


def _lines(found: Reweighted) -> Iterator[str]:
    yield (
        f"{found.prompts:,} prompt{'s' * (found.prompts != 1)}, {found.rollouts:,} rollouts of each or more. Win rates "
        f"over the reference, both sides under\nthe procedure, which selects by {found.selected_by}"
        f"{'; 95 % intervals over prompts' * (found.prompts > 1)}.{_few(found.prompts)}"
    )
    for kl in sorted({point.kl for point in found.points}):
        points = [point for point in found.points if point.kl == kl]
        for judge in points[0].win_rates:
            yield f"\nKL {kl:g}, judged by {judge}"
            yield from _table(points, judge, found.procedures)
            yield from _told_apart(points, judge, found.procedures)
    yield from _notes(found)
    yield from (f"\nLeft out: {reason}" for reason in found.left_out)


def _notes(found: Reweighted) -> Iterator[str]:
    if any(value < RELIABLE for point in found.points for value in point.ess_of.values()):
        (low, lowest, _), (mid, middle, _), (high, highest, _) = ERRORS[:3]
        yield (
            f"\n~ rests on an ESS below {RELIABLE}. Where the truth is known, win rates were off by up to {highest:g} "
            f"at an ESS of\n{mid:g} to {high:g}, {middle:g} at {low:g} to {mid:g}, {lowest:g} below "
            "(docs/evidence/results.md). A larger K helps."
        )
    if any(len({each.arm for each in found.points}) > 1 and point.gains for point in found.points):
        yield (
            "\nBetter and worse: the interval is farther from 0 than gains were found off at that ESS, a measure and "
            "no bound.\nIntervals are over prompts, each by itself: of many, one in twenty misses by chance."
        )


def _few(prompts: int) -> str:
    """What to know before any claim, where prompts are few."""
    if prompts >= FEW:
        return ""
    if prompts == 1:
        return "\n1 prompt: there are no intervals, and nothing is told apart."
    return f"\nFewer than {FEW} prompts: intervals are rough."


def _table(points: Sequence[Point], judge: str, procedures: Sequence[str]) -> Iterator[str]:
    name = max(len("arm"), *(len(point.arm) for point in points))
    yield f"  {'arm':{name}}" + "".join(f"  {each:<21}" for each in procedures) + "   ESS  KL sd  beta"
    for point in points:
        cells = "".join(f"  {_cell(point, judge, each):<21}" for each in procedures)
        yield f"  {point.arm:{name}}{cells}{point.ess:6.1f}{point.kl_spread:7.2f}  {point.beta:.3g}"


def _cell(point: Point, judge: str, procedure: str) -> str:
    return f"{point.win_rates[judge][procedure]}{'' if point.ess_of[procedure] >= RELIABLE else '~'}"


def _told_apart(points: Sequence[Point], judge: str, procedures: Sequence[str]) -> Iterator[str]:
    """Against the first arm, whose interval of a difference is the one that counts: prompts cancel in it."""
    first, *others = points
    if not others or not first.gains or others[0].gains[judge][procedures[0]].low is None:
        return
    for procedure in procedures:
        ways: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        for point in others:
            how = told(point, judge, procedure)
            mark = "~" * (ess_of_gain(point, procedure) < RELIABLE)
            gain = f" {point.gains[judge][procedure].value:+.3f}{mark}"
            ways[how or "not told apart"].append(f"{point.arm}{gain if how else ''}")
        said = "; ".join(f"{how}: {', '.join(who)}" for how, who in ways.items() if who)
        yield f"  {procedure} against {first.arm}: {said}"
