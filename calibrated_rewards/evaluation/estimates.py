"""Estimates over prompts: the responses they come from, and their errors.

Responses are noisy within a prompt, and prompts are a sample themselves; an `Estimate` has an error for each.

>>> Estimate(np.array([0.5, 0.75, 1.0]))
Estimate(0.750 ± 0.144 over 3 prompts)

Intervals of many estimates over the same prompts: the prompts are drawn again once, for all of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, nan, sqrt
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from scipy.special import ndtri, stdtrit

Array: TypeAlias = npt.NDArray[np.float64]
FEW = 20
"""Prompts below which intervals cover less than they say where per-prompt values are skewed."""


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Samples:
    """The responses of one policy: for each prompt a pool of scores, by which the procedure selects and a judge judges.

    Both are P rows, of one length or ragged; `judge` is `select` itself unless given. Make one object of a policy's
    responses and hand it to every comparison: `difference` then knows that they are shared.

    >>> Samples(select=[[0.1, 0.4], [0.3]], judge=[[2.0, 5.0], [3.0]])
    Samples(P=2, m=1..2)
    """

    select: tuple[Array, ...]
    judge: tuple[Array, ...]

    def __init__(self, select: Iterable[npt.ArrayLike], judge: Iterable[npt.ArrayLike] | None = None) -> None:
        selecting = _rows("select", select)
        judging = selecting if judge is None else _rows("judge", judge)
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


def _rows(name: str, scores: Iterable[npt.ArrayLike]) -> tuple[Array, ...]:
    rows = tuple(np.array(row, np.float64) for row in scores)
    if not rows:
        raise ValueError(f"Samples needs at least one prompt, got {name} without rows.")
    for prompt, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise ValueError(f"Samples needs one axis of scores a prompt, got shape {row.shape} in {name}[{prompt}].")
        if not np.isfinite(row).all():
            at = int(np.argmin(np.isfinite(row)))
            raise ValueError(f"Samples needs finite scores, got {row[at]} in {name}[{prompt}][{at}].")
    return rows


@dataclass(frozen=True, eq=False)
class Influence:
    """The estimate for each prompt without each response of `samples` in turn, up to a constant, prompts end to end."""

    samples: Samples
    without: Float[np.ndarray, " responses"]


@dataclass(frozen=True, repr=False, eq=False)
class Estimate:
    """An average over prompts, with its two errors.

    `standard_error` is for the average over all prompts like these, and contains the noise of the responses;
    `sampling_error` for these very prompts, had the responses been others. The latter is a jackknife: on average never
    too small, and too large where N is near m (by 7 % at N = 4 of m = 16, by a third at 7 of 8), when it can exceed the
    former. What the data cannot tell is nan: the former from one prompt, the latter without a jackknife or where a pool
    is no larger than the procedure's draws.
    """

    per_prompt: Float[np.ndarray, " P"]
    influences: tuple[Influence, ...] = ()

    @property
    def value(self) -> float:
        """The estimate: the mean over prompts."""
        return float(self.per_prompt.mean())

    @property
    def standard_error(self) -> float:
        """By the spread between prompts: they are the clusters in which responses are drawn."""
        prompts = len(self.per_prompt)
        return float(self.per_prompt.std(ddof=1)) / sqrt(prompts) if prompts > 1 else nan

    @cached_property
    def sampling_error(self) -> float:
        """By the jackknife: each response left out in turn, in every place where its pool occurs at once."""
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
        """Confidence interval for the average over all prompts like these.

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
            ends = np.quantile(_resampled_means(self.per_prompt, seed), [tail, 1 - tail])
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
    """How much wider than its percentiles the bootstrap's interval of a mean has to be: t / z * sqrt(n / (n - 1)).

    Resampled means vary by (n - 1) / n of what the variance is estimated to be, and their percentiles are those of a
    variance that is known: of normal values this makes the interval Student's t, at any number of prompts.

    >>> round(small_sample_factor(5), 2), round(small_sample_factor(24), 2), round(small_sample_factor(500), 2)
    (1.58, 1.08, 1.0)
    """
    tail = (1 - level) / 2
    return float(stdtrit(prompts - 1, 1 - tail) / ndtri(1 - tail) * sqrt(prompts / (prompts - 1)))


def _resampled_means(values: Float[np.ndarray, " P"], seed: int, resamples: int = 10_000) -> Float[np.ndarray, " B"]:
    """Means of prompts drawn with replacement, in chunks of at most a million draws."""
    rng = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // len(values))
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    return np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])


def difference(a: Estimate, b: Estimate) -> Estimate:
    """How much larger a is than b on the same prompts in the same order: paired, so what prompts share cancels.

    Responses count as shared where both estimates were made from the same `Samples` object, else as independent.
    """
    if len(a.per_prompt) != len(b.per_prompt):
        raise ValueError(f"difference needs the same prompts, got {len(a.per_prompt)} and {len(b.per_prompt)}.")
    negated = tuple(Influence(influence.samples, -influence.without) for influence in b.influences)
    known = a.influences and b.influences
    return Estimate(a.per_prompt - b.per_prompt, a.influences + negated if known else ())


@dataclass(frozen=True)
class Stated:
    """An estimate as reports state and files keep it: the mean over prompts, and how far off it may be.

    >>> Stated.of(Estimate(np.array([0.5, 0.75, 1.0, 0.25, 0.5])))
    Stated(value=0.6, low=0.28..., high=0.91..., standard_error=0.127..., prompts=5)
    >>> print(Stated.of(Estimate(np.array([0.5]))))
    0.500
    """

    value: float
    low: float | None
    """The interval for the mean over all prompts like these, clustered by prompt; None from a single prompt."""
    high: float | None
    standard_error: float | None
    prompts: int

    @classmethod
    def of(cls, estimate: Estimate, level: float = 0.95) -> "Stated":
        """By the bootstrap over prompts."""
        prompts = len(estimate.per_prompt)
        if prompts < 2:
            return cls(estimate.value, None, None, None, prompts)
        low, high = estimate.interval(level)
        return cls(estimate.value, low, high, estimate.standard_error, prompts)

    @classmethod
    def read(cls, says: Mapping[str, Any]) -> "Stated":
        """What JSON has of one; a ValueError unless it is numbers."""
        for name, number in says.items():
            known = isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number)
            if not known and (number is not None or name in ("value", "prompts")):
                raise ValueError(f"an estimate has finite numbers, got {name}={number!r}")
        return cls(**says)

    def within(self, least: float, most: float) -> "Stated":
        """The same with an interval that ends where the values do: a stretched bootstrap may go further.

        >>> print(Stated(0.9, 0.7, 1.1, 0.1, 5).within(0.0, 1.0))
        0.900 [0.700, 1.000]
        """
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")


def stated(per_prompt: Float[np.ndarray, "P columns"], level: float = 0.95) -> list[Stated]:
    """Each column as `Stated.of(Estimate(column))` has it, in the time of a few.

    >>> stated(np.array([[0.5, 0.0], [0.75, 0.0], [1.0, 0.5], [0.25, 0.5], [0.5, 0.25]]))[0]
    Stated(value=0.6, low=0.28..., high=0.91..., standard_error=0.127..., prompts=5)
    """
    columns = [Estimate(column) for column in per_prompt.T]
    if len(per_prompt) < 2:
        return [Stated.of(column) for column in columns]
    tail, means = (1 - level) / 2, per_prompt.mean(axis=0)
    ends = np.quantile(_means(per_prompt), [tail, 1 - tail], axis=0)
    lows, highs = (means + small_sample_factor(len(per_prompt), level) * (ends - means)).tolist()
    return [
        Stated(column.value, low, high, column.standard_error, len(per_prompt))
        for column, low, high in zip(columns, lows, highs, strict=True)
    ]


def _means(
    per_prompt: Float[np.ndarray, "P columns"], seed: int = 0, resamples: int = 10_000
) -> Float[np.ndarray, "resamples columns"]:
    """As `Estimate.interval` draws them: how often each prompt is drawn is all that a mean needs."""
    prompts, rng = len(per_prompt), np.random.default_rng(seed)
    chunk, means = max(1, 1_000_000 // prompts), []
    for done in range(0, resamples, chunk):
        size = min(chunk, resamples - done)
        drawn = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        means.append(times.astype(np.float64) @ per_prompt / prompts)
    return np.concatenate(means)
