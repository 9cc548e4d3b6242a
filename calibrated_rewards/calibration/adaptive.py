"""Adaptive K: draw references in rounds, until the band on a prompt's transformed reward is narrow enough.

A band on C = (F(y-) + F(y)) / 2 assumes no distribution: among scores that never tie its width depends on K alone, all
prompts stop in the same round, and stopping saves nothing. (It costs: each round is a look, and has only a share of
delta.) Where scores tie, C moves less than F does, and a prompt whose references are all alike has a band of order 1/K
in place of 1/sqrt(K). That saving is worth the looks where many prompts are alike (always solved, never solved) and
others are not; for ratings it is not (benchmarks/adaptive.py).

>>> from calibrated_rewards.theory.transforms import Identity
>>> rows = {"no ties": range(64), "half of them solved": [0, 1] * 32, "all but two": [0, 0] + [1] * 62, "all": [1] * 64}
>>> for name, row in rows.items():
...     print(f"{name:20} ± {half_width(row, Identity(), 0.05):.3f}")
no ties              ± 0.106
half of them solved  ± 0.078
all but two          ± 0.040
all                  ± 0.028
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.theory.bands import Kind, band
from calibrated_rewards.theory.transforms import Transform

Array: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = Iterable[tuple[bytes, npt.ArrayLike]]
"""Keys with the scores so far, which may be none: `table.items()`, for one."""


def half_width(scores: npt.ArrayLike, transform: Transform, delta: float, kind: Kind = "pointwise") -> float:
    """Compute half the length of the band on Phi(C(y)), as root mean square over the prompt's own references y.

    With below of K references under y and upto not above it, C lies between the means of the lower and of the upper
    ends for F(y-) and F(y): the bands of `bands.band` at index 2 below and at 2 upto. This holds with ties and
    without: for "pointwise" with probability 1 - delta for a response that is independent of the references, for
    "simultaneous" and "dkw" for all responses at once. It is infinite where Phi is and the band goes there (dkw alone).
    """
    groups = _groups(scores)
    if not groups.size:
        raise ValueError("half_width needs one score or more, got none.")
    return _half_width(groups, int(groups.sum()), transform, delta, kind)


@dataclass(frozen=True)
class Adaptive:
    """Decides how many references each prompt gets next, by the scores so far and nothing else.

    A prompt is done when its `half_width` is at most `width`, in the transform's units: say `scaled(transform, "unit")`
    for rewards in [0, 1]. The rounds share delta (`delta_at`), so that the probability of a band holds at the K where a
    prompt stopped, whatever made it stop there. `budget` is the most rollouts of all prompts together. Where it does
    not last for all, it goes to the widest bands, as far as they can be foreseen, and among equal ones to the smaller
    keys.

    >>> from calibrated_rewards.theory.transforms import Identity
    >>> adaptive = Adaptive(Identity(), width=0.1, rounds=(16, 32, 64))
    >>> rows = {b"always solved": [1.0] * 32, b"never ties": list(range(32)), b"new": []}
    >>> adaptive.next(rows.items())
    {b'new': 16, b'never ties': 64}
    """

    transform: Transform
    width: float
    rounds: tuple[int, ...] = (16, 32, 64, 128)
    delta: float = 0.05
    budget: int | None = None
    kind: Kind = "pointwise"

    def __post_init__(self) -> None:
        rounds = tuple(self.rounds)
        object.__setattr__(self, "rounds", rounds)
        whole, rises = all(int(K) == K for K in rounds), all(a < b for a, b in pairwise(rounds))
        rules = {
            "a finite width > 0": isfinite(self.width) and self.width > 0,
            "rounds of whole numbers >= 1 that rise": rounds and min(rounds) >= 1 and whole and rises,
            "0 < delta < 1": 0 < self.delta < 1,
            "a budget of at least the first round, or None": self.budget is None or self.budget >= rounds[0],
            'a kind "pointwise", "simultaneous" or "dkw"': self.kind in ("pointwise", "simultaneous", "dkw"),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"Adaptive needs {rule}, got {self!r}.")

    def delta_at(self, K: int) -> float:
        """Compute the share of delta for the look at K references: doubled each round, delta over all rounds.

        A small share hardly widens early bands, which are narrow by ties; most prompts end with the last one.

        >>> from calibrated_rewards.theory.transforms import Identity
        >>> [round(Adaptive(Identity(), width=0.1, rounds=(16, 32, 64)).delta_at(K), 4) for K in (16, 20, 32, 64)]
        [0.0071, 0.0071, 0.0143, 0.0286]
        """
        place = max(bisect_right(self.rounds, K) - 1, 0)
        return self.delta * 2.0**place / (2.0 ** len(self.rounds) - 1.0)

    def half_width(self, scores: npt.ArrayLike) -> float:
        """Compute the half width of a prompt with these scores, at the delta of its round."""
        return half_width(scores, self.transform, self.delta_at(np.size(scores)), self.kind)

    def enough(self, scores: npt.ArrayLike) -> bool:
        """Check that a prompt with these scores needs no more; the first round is always completed."""
        return np.size(scores) >= self.rounds[0] and self.half_width(scores) <= self.width

    def next(self, rows: Rows, spent: int | None = None) -> dict[bytes, int]:
        """Choose the K that each prompt is to have next, widest band first; empty when nothing is left to do.

        `spent` is the number of rollouts that count against the budget, if not those of `rows`.
        """
        steps, total = [], 0
        by_ties: dict[bytes, list[tuple[float, int, int]]] = {}  # most rows have the ties of another one, and its band
        for key, scores in rows:
            groups = _groups(scores)
            total += int(groups.sum())
            ties = groups.tobytes()
            if ties not in by_ties:
                by_ties[ties] = [*self._steps(groups)]
            steps += [(-wide, key, goal, cost) for wide, goal, cost in by_ties[ties]]
        budget = inf if self.budget is None else self.budget - (total if spent is None else spent)
        goals: dict[bytes, int] = {}
        for wide, key, goal, cost in sorted(steps):
            budget -= cost
            if budget < 0 and wide == -inf:
                raise ValueError(f"Adaptive needs a budget for {self.rounds[0]} rollouts of each prompt, got {self!r}.")
            if budget < 0:
                break
            goals.setdefault(key, goal)
        return goals

    def _steps(self, groups: Counts) -> Iterator[tuple[float, int, int]]:
        """List the rounds ahead of a prompt, if its ties stay as they are: the band before each, its K, its cost."""
        have = int(groups.sum())
        for goal in self.rounds[bisect_right(self.rounds, have) :]:
            new = have < self.rounds[0]
            wide = inf if new else self._width_of(groups, have, self.delta_at(have))
            if wide <= self.width:
                return
            yield wide, goal, goal - have
            if new or self.budget is None:  # nothing to foresee, or no need to
                return
            have = goal

    def saved(self, rows: Rows, error: Literal["worst", "mean"] = "worst") -> "Saving":
        """Compare the cost of these rows with that of a fixed K with as narrow a band, widest or root mean square.

        The fixed K is looked at once, with all of delta; its rows are taken to have the ties that they have now.
        """
        if error not in ("worst", "mean"):
            raise ValueError(f'saved needs error "worst" or "mean", got error={error!r}.')
        patterns = Counter(_groups(scores).tobytes() for _, scores in rows)
        groups = [np.frombuffer(pattern, np.int64) for pattern in patterns]
        sizes, share = [int(each.sum()) for each in groups], np.array([*patterns.values()], np.float64)
        if not sizes or min(sizes) == 0:
            raise ValueError("saved needs rows that have scores, got none or an empty one.")

        achieved = [self._width_of(group, K, self.delta_at(K)) for group, K in zip(groups, sizes, strict=True)]
        reached = _overall(achieved, share, error)

        def excess(K: int) -> float:
            return reached - _overall([self._width_of(group, K, self.delta) for group in groups], share, error)

        fixed = 1 + bisect_left(range(1, max(sizes)), 0.0, key=excess)
        return Saving(int(share.sum()), int(share @ sizes), fixed, reached, error)

    def _width_of(self, groups: Counts, K: int, delta: float) -> float:
        return _half_width(groups, K, self.transform, delta, self.kind)


class Saving(NamedTuple):
    """The rollouts that an adaptive run used, and the fixed K with the same error.

    >>> print(Saving(prompts=1000, used=40_000, fixed=100, half_width=0.1, error="worst"))
    40,000 rollouts of 1,000 prompts; with 100 for each it takes 100,000 for the same worst band of ± 0.1: 60 % saved
    """

    prompts: int
    used: int
    fixed: int
    half_width: float
    error: str

    @property
    def share(self) -> float:
        """The share of the fixed K's rollouts that was saved; negative where the fixed K needs fewer."""
        return 1 - self.used / (self.fixed * self.prompts)

    def __str__(self) -> str:
        same = f"{self.error} band of ± {self.half_width:.3g}"
        what = f"{self.share:.0%} saved" if self.share >= 0 else f"{-self.share:.0%} more than needed"
        return (
            f"{self.used:,} rollouts of {self.prompts:,} prompts; with {self.fixed} for each it takes "
            f"{self.fixed * self.prompts:,} for the same {same}: {what.replace('%', ' %')}"
        )


def _groups(scores: npt.ArrayLike) -> Counts:
    """Count the references of each value, from the lowest up: a band depends on nothing else."""
    values, counts = np.unique(np.asarray(scores), return_counts=True)
    if values.size and not np.isfinite(values[[0, -1]]).all():
        raise ValueError(f"A band needs finite scores, got {values[-1] if np.isfinite(values[0]) else values[0]}.")
    return counts.astype(np.int64)


def _half_width(groups: Counts, K: int, transform: Transform, delta: float, kind: Kind) -> float:
    """Compute the half width of K references with the shares of these groups."""
    upto = np.cumsum(groups) * (2 * K / groups.sum())
    below = np.append(0.0, upto[:-1])
    lower, upper = _band(K, delta, kind)
    index = np.arange(2 * K + 1)
    low, high = ((np.interp(below, index, end) + np.interp(upto, index, end)) / 2 for end in (lower, upper))
    half = (np.asarray(transform(high)) - np.asarray(transform(low))) / 2
    return sqrt(np.average(half**2, weights=groups))


def _overall(widths: list[float], share: Array, error: str) -> float:
    return max(widths) if error == "worst" else sqrt(np.average(np.square(widths), weights=share))


@lru_cache(maxsize=256)
def _band(K: int, delta: float, kind: Kind) -> tuple[Float[np.ndarray, " i"], Float[np.ndarray, " i"]]:
    return band(K, delta, kind)
