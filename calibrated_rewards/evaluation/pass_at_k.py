"""Unbiased pass@k, best@k and worst@k from n >= k samples of each prompt, averaged over prompts with their errors.

The best of a random k of a prompt's n samples is an order statistic: of the binom(n, k) subsets, binom(i - 1, k - 1)
have the i-th smallest as their best. The mean over all subsets is unbiased for k fresh samples. A bootstrap draws k of
the n with replacement, some twice and others never, so its best is too low: of 1 pass in 4 its best@4 is .684, not 1.

>>> solved = Samples([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
>>> pass_at_k(solved, 2)
Estimate(0.444 ± 0.242 over 3 prompts)
>>> round(float(best_at_k(Samples([[1, 0, 0, 0]]), 4)), 3)
1.0
>>> round(float(best_at_k(Samples([[1, 0, 0, 0]]), 4, replacement=True)), 3)
0.684
"""

from numbers import Real
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.evaluation.estimates import Estimate, Samples
from calibrated_rewards.theory.procedures import best_of_subset, check_count, share_ties

Array: TypeAlias = npt.NDArray[np.float64]


def pass_at_k(samples: Samples, k: int, *, threshold: float = 1.0) -> Estimate:
    """Estimate the chance that one or more of k samples pass, by scores of at least `threshold`.

    The judging scores decide. With c of n passed it is 1 - binom(n - c, k) / binom(n, k), prompt by prompt.
    """
    _check("pass_at_k", samples, k)
    if not isinstance(threshold, Real) or not np.isfinite(threshold):
        raise ValueError(f"pass_at_k needs a finite threshold, got threshold={threshold!r}.")
    passed = np.array([int((row >= threshold).sum()) for row in samples.judge])
    return Estimate(chance_to_pass(samples.sizes, passed, k))


def chance_to_pass(n: npt.ArrayLike, passed: npt.ArrayLike, k: int) -> Array:
    """Compute 1 - binom(n - passed, k) / binom(n, k): the chance of a pass among a random k of n samples.

    The logarithms of k factors are added: rounding does not grow with n, and small chances keep all their digits.

    >>> chance_to_pass([10, 1_000_000], [3, 1], 5).round(6).tolist()
    [0.916667, 5e-06]
    """
    total, right = np.broadcast_arrays(np.asarray(n, np.float64), np.asarray(passed, np.float64))
    check_count("chance_to_pass", k=k)
    if not ((right >= 0) & (right <= total) & (total >= k)).all():
        raise ValueError(f"chance_to_pass needs 0 <= passed <= n and n >= k={k}, got n={n!r}, passed={passed!r}.")
    left = total[..., None] - np.arange(k)
    # A factor of 0, where fewer samples fail than are drawn, is a chance of 1.
    ratio = np.minimum(right[..., None] / left, 1.0)
    with np.errstate(divide="ignore"):
        return np.asarray(-np.expm1(np.log1p(-ratio).sum(axis=-1)))


def best_at_k(samples: Samples, k: int, *, replacement: bool = False) -> Estimate:
    """Estimate the judge's mean score of the sample that the selecting score picks as the best of k.

    Without a judge that is the expected maximum of k. `replacement=True` is the limit of a bootstrap that draws with
    replacement from the n samples, as validation metrics of verl do: too low, and by more the nearer k is to n.
    """
    _check("best_at_k", samples, k)
    rows = zip(samples.select, samples.judge, strict=True)
    return Estimate(np.array([_weights(select, k, replacement) @ judge for select, judge in rows]))


def worst_at_k(samples: Samples, k: int, *, replacement: bool = False) -> Estimate:
    """Estimate the judge's mean score of the sample that the selecting score picks as the worst of k."""
    _check("worst_at_k", samples, k)
    rows = zip(samples.select, samples.judge, strict=True)
    return Estimate(np.array([_weights(-select, k, replacement) @ judge for select, judge in rows]))


def _weights(select: Float[np.ndarray, " m"], k: int, replacement: bool) -> Float[np.ndarray, " m"]:
    """Compute the chance of each sample to be the best of k, ties shared."""
    m = len(select)
    by_rank = np.diff((np.arange(m + 1) / m) ** k) if replacement else best_of_subset(m, k)
    return share_ties(select, by_rank)


def _check(name: str, samples: Samples, k: int) -> None:
    check_count(name, k=k)
    fewest = int(np.argmin(samples.sizes))
    if samples.sizes[fewest] < k:
        raise ValueError(
            f"{name} needs k={k} samples or more of each prompt, got {samples.sizes[fewest]} of prompt {fewest}."
        )
