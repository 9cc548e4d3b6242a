"""Averages over prompts, with standard errors and confidence intervals.

Responses are noisy within a prompt, and the prompts are a sample too; an `Estimate` has an error for each of the two.
An `IntervalEstimate` is the short form that results print and files hold.

>>> Estimate(np.array([0.5, 0.75, 1.0]))
Estimate(0.750 ± 0.144 over 3 prompts)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from math import isfinite, nan, sqrt
from types import UnionType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from scipy.special import ndtri, stdtrit

Array: TypeAlias = npt.NDArray[np.float64]
FEW_PROMPTS = 20
"""Below this many prompts intervals cover too rarely where per-prompt values are skewed."""
# A narrower interval is rounding error: the values of all prompts are equal.
NO_WIDTH = 1e-9
RESAMPLES = 10_000
LARGEST_SCORE = 1e150


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Samples:
    """The scores of one policy's responses: a row a prompt, by the scorer that selects and by the one that judges.

    Rows may differ in length; without `judge` the selecting scores judge. Make one object of a policy's responses and
    pass it to every comparison: `difference` then knows that they are shared.

    >>> Samples(select=[[0.1, 0.4], [0.3]], judge=[[2.0, 5.0], [3.0]])
    Samples(P=2, m=1..2)
    """

    select: tuple[Array, ...]
    judge: tuple[Array, ...]

    def __init__(self, select: Iterable[npt.ArrayLike], judge: Iterable[npt.ArrayLike] | None = None) -> None:
        selecting = _check_rows("select", select)
        judging = selecting if judge is None else _check_rows("judge", judge)
        if len(selecting) != len(judging):
            raise ValueError(f"Samples needs a judge for each prompt, got {len(selecting)} and {len(judging)} rows.")
        for prompt, (s, j) in enumerate(zip(selecting, judging, strict=True)):
            if s.size != j.size:
                raise ValueError(f"Samples needs a judge for each score, got {s.size} and {j.size} in row {prompt}.")
        object.__setattr__(self, "select", selecting)
        object.__setattr__(self, "judge", judging)

    def __len__(self) -> int:
        return len(self.select)

    def __repr__(self) -> str:
        low, high = self.sizes.min(), self.sizes.max()
        return f"Samples(P={len(self)}, m={low if low == high else f'{low}..{high}'})"

    @cached_property
    def sizes(self) -> Int[np.ndarray, " P"]:
        """Number of responses to each prompt."""
        return np.array([row.size for row in self.select])


def _check_rows(name: str, scores: Iterable[npt.ArrayLike]) -> tuple[Array, ...]:
    rows = tuple(np.array(row, np.float64) for row in scores)
    if not rows:
        raise ValueError(f"Samples needs at least one prompt, got {name} without rows.")
    for prompt, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise ValueError(f"Samples needs one axis of scores a prompt, got shape {row.shape} in {name}[{prompt}].")
        if not np.isfinite(row).all():
            at = int(np.argmin(np.isfinite(row)))
            raise ValueError(f"Samples needs finite scores, got {row[at]} in {name}[{prompt}][{at}].")
        if abs(row).max() > LARGEST_SCORE:
            at = int(abs(row).argmax())
            raise ValueError(
                f"Samples needs scores from {-LARGEST_SCORE:g} to {LARGEST_SCORE:g}, whose squares a float can hold, "
                f"got {row[at]:g} in {name}[{prompt}][{at}]."
            )
    return rows


@dataclass(frozen=True, eq=False)
class Influence:
    """Leave-one-out estimates of each prompt, for the jackknife: up to a constant, prompts end to end."""

    samples: Samples
    without: Float[np.ndarray, " responses"]


@dataclass(frozen=True, repr=False, eq=False)
class Estimate:
    """An average over prompts, with its two errors.

    `standard_error` is for the average over all prompts like these, and contains the noise of the responses;
    `sampling_error` is for these very prompts with other responses. The latter is a jackknife: on average never too
    small, and too large where N is near m (by 7 % at N = 4 of m = 16, by a third at 7 of 8), when it can exceed the
    former. An error that cannot be computed is nan: the former from one prompt, the latter without a jackknife or
    where a pool is no larger than the procedure's draws.
    """

    per_prompt: Float[np.ndarray, " P"]
    influences: tuple[Influence, ...] = ()

    @property
    def value(self) -> float:
        """The estimate: the mean over prompts."""
        return float(self.per_prompt.mean())

    @property
    def standard_error(self) -> float:
        """The standard error by the spread between prompts, the clusters in which responses are drawn."""
        prompts = len(self.per_prompt)
        return float(self.per_prompt.std(ddof=1)) / sqrt(prompts) if prompts > 1 else nan

    @cached_property
    def sampling_error(self) -> float:
        """The error of the responses by the jackknife: each is left out in turn, wherever its pool occurs."""
        if not self.influences:
            return nan
        variance = np.zeros_like(self.per_prompt)
        for samples in {id(influence.samples): influence.samples for influence in self.influences}.values():
            without = np.sum([i.without for i in self.influences if i.samples is samples], axis=0)
            sizes = samples.sizes
            starts = np.cumsum(sizes) - sizes
            shifts = without - np.repeat(np.add.reduceat(without, starts) / sizes, sizes)
            variance += (sizes - 1) / sizes * np.add.reduceat(shifts**2, starts)
        return sqrt(variance.sum()) / len(self.per_prompt)

    def interval(self, level: float = 0.95, method: str = "bootstrap", seed: int = 0) -> tuple[float, float]:
        """Compute a confidence interval for the average over all prompts like these.

        "bootstrap": percentiles over resampled prompts, stretched from the mean by `small_sample_factor`; "normal":
        `standard_error` and Student's t with P - 1 degrees of freedom. Where all prompts agree both have no width.
        benchmarks/intervals.py measures how often they cover the truth: of few and skewed values both too rarely.
        """
        tail, prompts = (1 - level) / 2, len(self.per_prompt)
        if not 0 < level < 1:
            raise ValueError(f"interval needs a level in (0, 1), got level={level!r}.")
        if prompts < 2:
            raise ValueError("interval needs 2 prompts or more, for one says nothing of the others, got 1.")
        if method == "normal":
            half = float(stdtrit(prompts - 1, 1 - tail)) * self.standard_error
            return self.value - half, self.value + half
        if method == "bootstrap":
            means = [self.per_prompt[drawn].mean(axis=1) for drawn in _resamples(prompts, seed)]
            ends = np.quantile(np.concatenate(means), [tail, 1 - tail])
            low, high = self.value + small_sample_factor(prompts, level) * (ends - self.value)
            return float(low), float(high)
        raise ValueError(f'interval needs method "bootstrap" or "normal", got method={method!r}.')

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        prompts = len(self.per_prompt)
        spread = "" if np.isnan(self.standard_error) else f" ± {self.standard_error:.3f}"
        noise = "" if np.isnan(self.sampling_error) else f", ± {self.sampling_error:.3f} from sampling"
        return f"Estimate({self.value:.3f}{spread} over {prompts} prompt{'s' * (prompts > 1)}{noise})"


def small_sample_factor(prompts: int, level: float = 0.95) -> float:
    """Factor that widens the bootstrap's percentile interval of a mean for few prompts: t / z * sqrt(n / (n - 1)).

    Resampled means vary by (n - 1) / n of what the variance is estimated to be, and their percentiles are those of a
    variance that is known: of normal values this makes the interval Student's t, at any number of prompts.

    >>> round(small_sample_factor(5), 2), round(small_sample_factor(24), 2), round(small_sample_factor(500), 2)
    (1.58, 1.08, 1.0)
    """
    tail = (1 - level) / 2
    return float(stdtrit(prompts - 1, 1 - tail) / ndtri(1 - tail) * sqrt(prompts / (prompts - 1)))


def _resamples(prompts: int, seed: int) -> Iterator[Int[np.ndarray, "B P"]]:
    """Draw prompts with replacement, `RESAMPLES` times, in chunks of at most a million numbers."""
    rng, chunk = np.random.default_rng(seed), max(1, 1_000_000 // prompts)
    for done in range(0, RESAMPLES, chunk):
        yield rng.integers(prompts, size=(min(chunk, RESAMPLES - done), prompts))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """Subtract b from a, estimates on the same prompts in the same order: paired, so what prompts share cancels.

    Responses count as shared where both estimates were made from the same `Samples` object, else as independent.
    """
    if len(a.per_prompt) != len(b.per_prompt):
        raise ValueError(f"difference needs the same prompts, got {len(a.per_prompt)} and {len(b.per_prompt)}.")
    negated = tuple(Influence(influence.samples, -influence.without) for influence in b.influences)
    jackknifed = a.influences and b.influences
    return Estimate(a.per_prompt - b.per_prompt, a.influences + negated if jackknifed else ())


@dataclass(frozen=True)
class IntervalEstimate:
    """An estimate as results print it and files hold it: the mean over prompts, and its confidence interval.

    >>> IntervalEstimate.of(Estimate(np.array([0.5, 0.75, 1.0, 0.25, 0.5])))
    IntervalEstimate(value=0.6, low=0.28..., high=0.91..., standard_error=0.127..., prompts=5)
    >>> print(IntervalEstimate.of(Estimate(np.array([0.5]))))
    0.500
    """

    value: float
    low: float | None
    """Lower end of the interval for the mean over all prompts like these, clustered by prompt; None from one prompt."""
    high: float | None
    standard_error: float | None
    prompts: int

    @classmethod
    def of(cls, estimate: Estimate, level: float = 0.95) -> "IntervalEstimate":
        """Compute the interval by the bootstrap over prompts."""
        prompts = len(estimate.per_prompt)
        if prompts < 2:
            return cls(estimate.value, None, None, None, prompts)
        low, high = estimate.interval(level)
        return cls(estimate.value, low, high, estimate.standard_error, prompts)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "IntervalEstimate":
        """Read the fields that a JSON file holds; ValueError if one is not a finite number."""
        for name, number in fields.items():
            finite = isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number)
            if not finite and (number is not None or name in ("value", "prompts")):
                raise ValueError(f"an estimate has finite numbers, got {name}={number!r}")
        return cls(**fields)

    def clip(self, least: float, most: float) -> "IntervalEstimate":
        """Keep the estimate and its interval within what is possible: a stretched bootstrap may go further.

        >>> print(IntervalEstimate(0.9, 0.7, 1.1, 0.1, 5).clip(0.0, 1.0))
        0.900 [0.700, 1.000]
        >>> print(IntervalEstimate(1.02, 0.8, 0.9, 0.1, 5).clip(0.0, 1.0))
        1.000 [0.800, 1.000]
        """
        value = min(max(self.value, least), most)
        if self.low is None or self.high is None:
            return replace(self, value=value)
        low, high = min(max(self.low, least), value), max(min(self.high, most), value)
        return replace(self, value=value, low=low, high=high)

    def excludes(self, value: float) -> bool:
        """Tell whether the interval leaves a value out; never true without an interval, or for one without width.

        >>> ends = (0.1, 0.3), (0.0, 0.3), (None, None), (0.2, 0.2)
        >>> [IntervalEstimate(0.2, low, high, 0.1, 30).excludes(0.0) for low, high in ends]
        [True, False, False, False]
        """
        if self.low is None or self.high is None or self.exact:
            return False
        return self.low > value or self.high < value

    @property
    def exact(self) -> bool:
        """True if the interval has no width: a value that is known, or all prompts agree on."""
        return self.low is not None and self.high is not None and self.high - self.low <= NO_WIDTH

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None or self.exact else f" [{self.low:.3f}, {self.high:.3f}]")


RatesByJudge = Mapping[str, Mapping[str, IntervalEstimate]]
"""By the scorer that judges, then by the procedure's repr."""


def estimate_columns(per_prompt: Float[np.ndarray, "P columns"], level: float = 0.95) -> list[IntervalEstimate]:
    """Estimate each column as `IntervalEstimate.of(Estimate(column))` does, from one set of resampled prompts.

    >>> estimate_columns(np.array([[0.5, 0.0], [0.75, 0.0], [1.0, 0.5], [0.25, 0.5], [0.5, 0.25]]))[0]
    IntervalEstimate(value=0.6, low=0.28..., high=0.91..., standard_error=0.127..., prompts=5)
    """
    columns, prompts = [Estimate(column) for column in per_prompt.T], len(per_prompt)
    if prompts < 2:
        return [IntervalEstimate.of(column) for column in columns]
    tail, means = (1 - level) / 2, per_prompt.mean(axis=0)
    ends = np.quantile(resample_means(per_prompt), [tail, 1 - tail], axis=0)
    lows, highs = (means + small_sample_factor(prompts, level) * (ends - means)).tolist()
    return [
        IntervalEstimate(column.value, low, high, column.standard_error, prompts)
        for column, low, high in zip(columns, lows, highs, strict=True)
    ]


def resample_means(per_prompt: Float[np.ndarray, "P columns"]) -> Float[np.ndarray, "resamples columns"]:
    """Compute the means of columns over resampled prompts, the same prompts for all columns."""
    prompts, resampled = len(per_prompt), []
    for drawn in _resamples(prompts, seed=0):
        # A mean needs no more than how often each prompt is drawn.
        cells = drawn + prompts * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=prompts * len(drawn)).reshape(-1, prompts)
        resampled.append(times.astype(np.float64) @ per_prompt / prompts)
    return np.concatenate(resampled)


def from_json(kind: Any, content: Any) -> Any:
    """Build a dataclass, or any type that its fields are annotated with, from what `asdict` and JSON made of it."""
    if kind is IntervalEstimate:
        return IntervalEstimate.from_json(content)
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: from_json(kinds[name], each) for name, each in content.items()})
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if content is None else from_json(parts[0], content)
    if origin is tuple:
        return tuple(from_json(parts[0], each) for each in content)
    return {name: from_json(parts[1], each) for name, each in content.items()} if origin is Mapping else content
