"""What training for each reward would come to, as the rollouts have it: tables, words, JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrated_rewards.estimates import Stated

RELIABLE = 5
"""The effective number of rollouts below which docs/frontier.md found win rates off by more than .02."""


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
        from calibrated_rewards.rollouts.shard_files import replacing

        with replacing(Path(path)) as file:
            file.write((json.dumps(self.as_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Reweighted":
        """Read what `save` wrote."""
        saved = json.loads(Path(path).read_text())
        try:
            points = tuple(Point(**{**point, **_stated_again(point)}) for point in saved["points"])
            procedures, left_out = tuple(saved["procedures"]), tuple(saved["left_out"])
            return cls(points, procedures, saved["selected_by"], saved["prompts"], saved["rollouts"], left_out)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} needs to be a frontier that Reweighted.save wrote, got {error!r}.") from error


def _stated_again(point: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {judge: {key: Stated(**value) for key, value in by.items()} for judge, by in point[name].items()}
        for name in ("win_rates", "gains")
    }


def _lines(found: Reweighted) -> Iterator[str]:
    yield (
        f"{found.prompts:,} prompts, {found.rollouts:,} rollouts of each or more. Win rates over the reference, both "
        f"sides under\nthe procedure, which selects by {found.selected_by}; 95 % intervals over prompts."
    )
    for kl in sorted({point.kl for point in found.points}):
        points = [point for point in found.points if point.kl == kl]
        for judge in points[0].win_rates:
            yield f"\nKL {kl:g}, judged by {judge}"
            yield from _table(points, judge, found.procedures)
            yield from _told_apart(points, judge, found.procedures)
    if any(value < RELIABLE for point in found.points for value in point.ess_of.values()):
        yield (
            f"\n~ rests on fewer than {RELIABLE} effective rollouts of a prompt: off by up to .04, near 1 by .1 and "
            "more. A larger K helps."
        )
    if any(point.gains for point in found.points):
        yield (
            "\nIntervals are over prompts, each by itself: of many, one in twenty misses by chance, and none knows of "
            "too small a K."
        )
    yield from (f"\nLeft out: {reason}" for reason in found.left_out)


def _table(points: Sequence[Point], judge: str, procedures: Sequence[str]) -> Iterator[str]:
    name = max(len("arm"), *(len(point.arm) for point in points))
    yield f"  {'arm':{name}}" + "".join(f"  {each:<21}" for each in procedures) + "   ESS  KL sd"
    for point in points:
        cells = "".join(f"  {_cell(point, judge, each):<21}" for each in procedures)
        yield f"  {point.arm:{name}}{cells}{point.ess:6.1f}{point.kl_spread:7.2f}"


def _cell(point: Point, judge: str, procedure: str) -> str:
    return f"{point.win_rates[judge][procedure]}{'' if point.ess_of[procedure] >= RELIABLE else '~'}"


def _told_apart(points: Sequence[Point], judge: str, procedures: Sequence[str]) -> Iterator[str]:
    """Against the first arm, whose interval of a difference is the one that counts: prompts cancel in it."""
    first, *others = points
    if not others or not first.gains or others[0].gains[judge][procedures[0]].low is None:
        return
    for procedure in procedures:
        told: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        for point in others:
            gain = point.gains[judge][procedure]
            low, high = gain.low or 0.0, gain.high or 0.0
            how = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            told[how].append(f"{point.arm} {gain.value:+.3f}" if low > 0 or high < 0 else point.arm)
        said = "; ".join(f"{how}: {', '.join(who)}" for how, who in told.items() if who)
        yield f"  {procedure} against {first.arm}: {said}"
