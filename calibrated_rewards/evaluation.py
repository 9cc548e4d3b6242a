"""Win rates from samples, with their errors, and the win rate predicted from references alone (Def. 4).

Nothing is simulated: a procedure's `pool_weights` are the exact probabilities that each response of a pool comes out,
so the estimate is the two-sample U-statistic: unbiased, and less noisy than any split of the pools into blocks of N.
(`Calibrated` alone normalises its weights itself, and is biased by O(1/m).)

>>> from calibrated_rewards.procedures import BestOf
>>> policy = Samples([[0.2, 0.9, 0.6], [0.7, 0.8, 0.1]])
>>> reference = Samples([[0.3, 0.1, 0.5], [0.4, 0.95, 0.2]])
>>> win_rate(policy, reference, BestOf(2))
Estimate(0.667 ± 0.333 over 2 prompts, ± 0.333 from sampling)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import nan, sqrt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from scipy.special import stdtrit

from calibrated_rewards.procedures import Calibrated, CalibratedProcedure, Procedure

Array: TypeAlias = npt.NDArray[np.float64]


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
    `sampling_error` for these very prompts, had the responses been others. What the data cannot tell is nan: the former
    from one prompt, the latter without a jackknife or where a pool is no larger than the procedure's draws.
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

        "bootstrap": percentiles over resampled prompts; "normal": `standard_error` and Student's t with P - 1 degrees
        of freedom. Below some twenty prompts the bootstrap is too narrow; where all of them agree both have no width.
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
            low, high = np.quantile(_resampled_means(self.per_prompt, seed), [tail, 1 - tail])
            return float(low), float(high)
        raise ValueError(f'interval needs method "bootstrap" or "normal", got method={method!r}.')

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        prompts = len(self.per_prompt)
        spread = "" if np.isnan(self.standard_error) else f" ± {self.standard_error:.3f}"
        noise = "" if np.isnan(self.sampling_error) else f", ± {self.sampling_error:.3f} from sampling"
        return f"Estimate({self.value:.3f}{spread} over {prompts} prompt{'s' * (prompts > 1)}{noise})"


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


def win_rate(
    policy: Samples, reference: Samples, procedure: Procedure, base: Procedure | None = None, *, jackknife: bool = True
) -> Estimate:
    """How often the policy under its procedure beats the reference under its own (`base`, by default the same one).

    The judging scores decide, ties one half. A procedure that looks at the score itself (`SoftBestOf`,
    `RewindAndRepeat`) needs calibrated selecting scores, and computes its weights anew for every response left out;
    `jackknife=False` spares that and leaves `sampling_error` unknown.
    """
    if len(policy) != len(reference):
        raise ValueError(
            f"win_rate needs the same prompts on both sides, got {len(policy)} of the policy and "
            f"{len(reference)} of the reference."
        )
    ours = _Side("the policy", policy, procedure)
    theirs = _Side("the reference", reference, procedure if base is None else base)
    values, without = [], []
    for prompt, (a, b) in enumerate(zip(policy.judge, reference.judge, strict=True)):
        p, q = ours.weights(prompt), theirs.weights(prompt)
        wins = _standing(a, b, q)
        values.append(p @ wins)
        if jackknife:
            without.append((ours.without(prompt, wins), theirs.without(prompt, 1 - _standing(b, a, p))))
    pools = zip((policy, reference), zip(*without, strict=True), strict=True) if jackknife else ()
    return Estimate(np.array(values), tuple(Influence(samples, np.concatenate(rows)) for samples, rows in pools))


def _standing(
    scores: Float[np.ndarray, " m"], pool: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """Share of the weighted pool that each score beats, ties one half (Def. 1), in O((m + n) log n)."""
    order = np.argsort(pool)
    ordered, upto = pool[order], np.concatenate([[0.0], np.cumsum(weights[order])])
    return np.asarray((upto[np.searchsorted(ordered, scores)] + upto[np.searchsorted(ordered, scores, "right")]) / 2)


@dataclass(frozen=True)
class _Side:
    """One policy's responses and the procedure that chooses among them."""

    name: str
    samples: Samples
    procedure: Procedure

    def __post_init__(self) -> None:
        # Only a procedure of Def. 6 is a function of the rank; any other reads the score, as a quantile.
        if isinstance(self.procedure, CalibratedProcedure):
            return
        for prompt, row in enumerate(self.samples.select):
            if row.min() < 0 or row.max() > 1:
                raise ValueError(
                    f"{self.procedure} needs calibrated selecting scores in [0, 1], "
                    f"got {row[np.argmax(np.abs(row - 0.5))]:.6g} for prompt {prompt} of {self.name}."
                )

    def weights(self, prompt: int) -> Array:
        """Chance of each response to come out."""
        try:
            return self.procedure.pool_weights(self.samples.select[prompt])
        except ValueError as error:
            raise ValueError(f"{error} (Prompt {prompt} of {self.name}.)") from error

    def without(self, prompt: int, outcome: Array) -> Array:
        """The weighted mean of `outcome` without each response in turn; nan where the pool can spare none."""
        select = self.samples.select[prompt]
        fewest = 1 if isinstance(self.procedure, Calibrated) else self.procedure.draws
        if len(select) <= fewest:
            return np.full(len(select), nan)
        if isinstance(self.procedure, CalibratedProcedure):
            return _without_each(select, outcome, self.procedure.pool_weights(np.arange(len(select) - 1)))
        others = ~np.eye(len(select), dtype=bool)
        return np.array([self.procedure.pool_weights(select[rest]) @ outcome[rest] for rest in others])


def _without_each(
    select: Float[np.ndarray, " m"], outcome: Float[np.ndarray, " m"], by_rank: Float[np.ndarray, " rest"]
) -> Float[np.ndarray, " m"]:
    """Weighted mean of the outcome over the m - 1 that remain, for all m at once: those above move one rank down.

    Tied scores have the same chance of each of their ranks, so a tied group counts with its mean outcome.
    """
    _, group, size = np.unique(select, return_inverse=True, return_counts=True)
    end, total = np.cumsum(size), np.bincount(group, outcome)
    start, upto = end - size, np.concatenate([[0.0], np.cumsum(by_rank)])
    kept = np.cumsum((upto[np.minimum(end, len(by_rank))] - upto[start]) * total / size)
    moved = np.cumsum((upto[end - 1] - upto[np.maximum(start - 1, 0)]) * total / size)
    below = np.concatenate([[0.0], kept])[group]
    tied = (upto[end - 1] - upto[start])[group] * (total[group] - outcome) / np.maximum(size[group] - 1, 1)
    return np.asarray(below + tied + moved[-1] - moved[group])


@dataclass(frozen=True)
class Prediction:
    """A win rate known before any training, and the number of references that it rests on.

    `ess` is 1 / sum A_i^2 of the policy's mass, or of the base's where that is smaller. It is small where an output
    law leaves the references behind, and the prediction then falls short of the truth: with proxy and judge correlated
    normals it was off by up to .15 below an ess of 1.5, and by at most .01 from 5 on.
    """

    win_rate: Estimate
    ess: float

    @property
    def reliable(self) -> bool:
        """Whether ess >= 5."""
        return self.ess >= 5


def predict(references: Samples, policy_mass: npt.ArrayLike, base_mass: npt.ArrayLike) -> Prediction:
    """The win rate under the judge of a policy that does not exist yet, from K references a prompt alone.

    `references.select` are the proxy's scores, on which the policy will be trained; `policy_mass[i]` is the mass that
    its output's law (of theory, in quantiles of the reference) has between i/K and (i+1)/K; `base_mass` the base's.
    The i-th smallest reference stands for its bin, and no reference for both sides at once:
    W = sum_{i != j} A_i B_j w(i, j) / sum_{i != j} A_i B_j.

    >>> references = Samples(select=[[0.3, 0.1, 0.7, 0.5]], judge=[[1.0, 2.0, 3.0, 4.0]])
    >>> predict(references, [0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25])
    Prediction(win_rate=Estimate(0.833 over 1 prompt), ess=2.0)
    """
    a, b = _mass("policy_mass", policy_mass), _mass("base_mass", base_mass)
    for prompt, size in enumerate(references.sizes):
        if not len(a) == len(b) == size:
            raise ValueError(
                f"predict needs K masses for K references, got {len(a)} and {len(b)} for the {size} of prompt {prompt}."
            )
    if 1 - a @ b < 1e-9:
        raise ValueError(f"predict needs mass in two bins or more, got all of both sides in one of {len(a)}.")
    values = [_predicted(*rows, a, b) for rows in zip(references.select, references.judge, strict=True)]
    return Prediction(Estimate(np.array(values)), ess=float(1 / max(a @ a, b @ b)))


def _mass(name: str, mass: npt.ArrayLike) -> Array:
    bins = np.asarray(mass, np.float64)
    if bins.ndim != 1 or not (np.isfinite(bins).all() and (bins >= 0).all() and abs(bins.sum() - 1) < 1e-6):
        raise ValueError(f"predict needs a {name} of K numbers >= 0 that sum to 1, got {mass!r:.80}.")
    return np.asarray(bins / bins.sum())


def _predicted(select: Array, judge: Array, policy_mass: Array, base_mass: Array) -> float:
    # The i-th mass goes to the i-th smallest; tied ones share theirs.
    _, group, size = np.unique(select, return_inverse=True, return_counts=True)
    start = np.cumsum(size) - size
    a, b = ((np.add.reduceat(mass, start) / size)[group] for mass in (policy_mass, base_mass))
    same = a @ b
    return float((a @ _standing(judge, judge, b) - same / 2) / (1 - same))
