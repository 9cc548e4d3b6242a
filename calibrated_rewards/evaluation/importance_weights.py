"""Win rates of a policy from rollouts of the reference and importance weights, without the bias of random weights.

A policy's log-ratios d = log pi(y|x) - log pi_ref(y|x) make weights w = e^d, under which rollouts of the reference
stand for the policy. The best of N of the policy is then the best of N different rollouts, weighted by the product of
their weights, against the best of N others. The average over all such choices has no bias: each weight has the mean 1,
is independent of the others, and occurs once in a product. `WeightedPools` makes a distribution function of the weights
first, in whose Nth power a weight meets itself. That is right where weights are a function of the rank, as of an
optimum, and too low by .01 to .04 for the best of 4 where they are those of a trained network (Jensen).

>>> log_ratios, scores = [np.log([0.5, 1.5, 1.0, 1.0])] * 2, [[1.0, 4.0, 2.0, 3.0]] * 2
>>> weighted_win_rate(log_ratios, Samples(scores), Standard()).value
0.625
>>> weighted_win_rate([[0.0] * 4] * 2, Samples(scores), BestOf(2)).value
0.5
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from scipy.special import gammaln

from calibrated_rewards.evaluation.estimates import Estimate, Samples
from calibrated_rewards.evaluation.win_rate import WeightedPools
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

Array: TypeAlias = npt.NDArray[np.float64]
HeldOutProcedure: TypeAlias = Standard | BestOf | WorstOf
Normalisation: TypeAlias = Literal["pooled", "prompt"]
# Tied scores are taken in so many orders: random ones, each forwards and backwards.
TIE_ORDERS = 8
# Numbers that are held at once.
CELLS = 2**21
# Names of the scorer that selects and of the one that judges.
SELECT, JUDGE = "select", "judge"
DECILES = 10
# Steps of the function of u whose KL is compared with the whole.
U_STEPS = 20
# A KL below this is rounding.
NO_KL = 1e-6


class PolicyTooFarError(ValueError):
    """Log-ratios so far from 0 that their weights cannot be held in double precision: the policy has moved too far."""


def weighted_win_rate(
    log_ratios: Iterable[npt.ArrayLike],
    samples: Samples,
    procedure: HeldOutProcedure,
    normalise: Normalisation = "pooled",
) -> Estimate:
    """Estimate a policy's win rate over the reference under a procedure, from its log-ratios on reference rollouts.

    `samples` are the scores of the rollouts, by the scorer that selects and by the one that judges. The estimate is a
    sum of weighted wins over the sum of the weights. "pooled" adds up both over all prompts, which leaves a bias of
    O(1 / prompts); it needs log-ratios that are right as they are. "prompt" divides within each prompt: the estimate
    does not change with constants within a prompt and varies less, but has a bias of O(N^2 / K).
    """
    rows = check_log_ratio_rows("log_ratios", log_ratios, samples)
    wins, weights = _sum_wins(rows, samples, procedure)
    if normalise == "prompt":
        return Estimate(np.exp(wins - weights))
    if normalise != "pooled":
        raise ValueError(f'weighted_win_rate normalises "pooled" or by "prompt", got normalise={normalise!r}.')
    highest = weights.max()
    return divide(np.exp(wins - highest), np.exp(weights - highest))


def divide(numerators: Float[np.ndarray, " P"], denominators: Float[np.ndarray, " P"]) -> Estimate:
    """Estimate the ratio of two means over prompts; each prompt's value is its part in it, to first order.

    >>> divide(np.array([1.0, 3.0]), np.array([2.0, 2.0]))
    Estimate(1.000 ± 0.500 over 2 prompts)
    """
    mean = denominators.mean()
    ratio = numerators.mean() / mean
    return Estimate(np.asarray(ratio + (numerators - ratio * denominators) / mean))


def check_log_ratio_rows(name: str, rows: Iterable[npt.ArrayLike], samples: Samples) -> list[Array]:
    """Return log-ratios as arrays; ValueError unless each rollout has one that is finite."""
    arrays = [np.asarray(row, np.float64) for row in rows]
    if len(arrays) != len(samples):
        raise ValueError(f"{name} needs a row for each prompt of the samples, got {len(arrays)} for {len(samples)}.")
    for prompt, (row, size) in enumerate(zip(arrays, samples.sizes.tolist(), strict=True)):
        if row.shape != (size,):
            raise ValueError(f"{name} needs one number a rollout, got shape {row.shape} for {size} in row {prompt}.")
        if not np.isfinite(row).all():
            at = int(np.argmin(np.isfinite(row)))
            raise ValueError(f"{name} needs finite numbers, got {row[at]} in {name}[{prompt}][{at}].")
    return arrays


def _sum_wins(rows: list[Array], samples: Samples, procedure: HeldOutProcedure) -> tuple[Array, Array]:
    """Average weighted wins, and weights, over all choices of rollouts of each prompt; both as logarithms."""
    if not isinstance(procedure, HeldOutProcedure):
        raise TypeError(f"weighted_win_rate needs Standard, BestOf or WorstOf, got {procedure!r}.")
    n, sizes = procedure.draws, samples.sizes
    if sizes.min() < 2 * n:
        raise ValueError(f"{procedure!r} of both sides needs {2 * n} rollouts a prompt, got {sizes.min()}.")
    wins, weights = np.empty(len(rows)), np.empty(len(rows))
    for size in np.unique(sizes):
        prompts = np.flatnonzero(sizes == size)
        some = max(1, CELLS // int(size * n))
        for part in (prompts[at : at + some] for at in range(0, len(prompts), some)):
            d, select, judge = (np.stack([of[i] for i in part]) for of in (rows, samples.select, samples.judge))
            level = d.max(axis=1)
            w = np.exp(d - level[:, None])
            share, each = np.zeros(len(part)), w.mean(axis=1)
            orders = list(_order(-select if isinstance(procedure, WorstOf) else select))
            for order in orders:
                mass, judged = (np.take_along_axis(of, order, 1) for of in (w / each[:, None], judge))
                won, total = count_wins(mass, judged, n)
                share += won / len(orders)
            if total.min() == 0:
                at = int(part[np.argmin(total)])
                raise PolicyTooFarError(
                    f"log_ratios need weight on {n} rollouts of each prompt, got numbers {np.ptp(rows[at]):.3g} nats "
                    f"apart in row {at}, of which e^d rounds to 0 beside the largest."
                )
            with np.errstate(divide="ignore"):  # a policy that never wins has a share of 0
                wins[part], weights[part] = np.log(share), np.log(total)
            scale = n * (level + np.log(each))
            wins[part], weights[part] = wins[part] + scale, weights[part] + scale
    return wins, weights


def _order(scores: Float[np.ndarray, "P K"]) -> Iterator[Int[np.ndarray, "P K"]]:
    """Sort each row; where scores tie, in several orders, of which each is a random tie-break."""
    ordered = np.sort(scores, axis=1)
    if not (ordered[:, 1:] == ordered[:, :-1]).any():
        yield np.argsort(scores, axis=1)
        return
    rng = np.random.default_rng(0)
    for _ in range(TIE_ORDERS // 2):
        shuffled = np.argsort(rng.random(scores.shape), axis=1)
        for each in (shuffled, shuffled[:, ::-1]):
            yield np.take_along_axis(each, np.argsort(np.take_along_axis(scores, each, 1), axis=1, kind="stable"), 1)


def count_wins(
    weights: Float[np.ndarray, "P K"], judge: Float[np.ndarray, "P K"], n: int
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Average, over all pairs of n rollouts and n others, the product of the first's weights, and that times a win.

    Rollouts are sorted: the last of n is selected. For i, the last of the first n, and j, the last of the others:
    e_{n-1} of the weights below i, times the choices of the others below j. If j < i, m of the first n lie below j and
    take their places, so that it is a sum over m of e_m below j, e_{n-1-m} between j and i, and binom(j - m, n - 1),
    with j rollouts below. Time is O(K^2 n). Weights are scaled by n / K, and choices counted by their share.

    >>> count_wins(np.ones((1, 5)), np.array([[3.0, 1.0, 4.0, 2.0, 5.0]]), 2)
    (array([0.5]), array([1.]))
    """
    prompts, size = weights.shape
    w = weights * n / size
    whole = _log_choices(size, n) + n * np.log(n / size)  # e_n of equal weights 1
    below = np.zeros((prompts, size + 1, n))  # e_m of the weights of the first i, m < n
    below[:, 0, 0] = 1.0
    for i in range(size):
        below[:, i + 1] = below[:, i]
        below[:, i + 1, 1:] += w[:, i, None] * below[:, i, :-1]
    left = np.arange(size)[:, None] - np.arange(n)  # rollouts below j that are free, of which n - 1 are chosen
    choices = np.exp(_log_choices(left, n - 1) - _log_choices(size - n, n))
    above = np.exp(_log_choices(np.arange(size) - n, n - 1) - _log_choices(size - n, n))
    opposite = below[:, :-1] * choices
    between = np.zeros((prompts, size, n))  # e_m of the weights between j and i
    won, total = np.zeros(prompts), np.zeros(prompts)
    for i in range(size):
        beats = (judge[:, i, None] > judge) + (judge[:, i, None] == judge) / 2
        own = w[:, i] * below[:, i, n - 1]
        lower = np.einsum("pjm,pjm,pj->p", opposite[:, :i], between[:, :i, ::-1], beats[:, :i])
        won += w[:, i] * lower + own * (beats[:, i + 1 :] @ above[i + 1 :, None])[:, 0]
        total += own
        between[:, :i, 1:] += w[:, i, None, None] * between[:, :i, :-1]
        between[:, i, 0] = 1.0
    return won * np.exp(-whole), total * np.exp(-whole)


def _log_choices(n: npt.ArrayLike, k: int) -> Array:
    """Return log binom(n, k), -inf where k are too many."""
    n = np.asarray(n, np.float64)
    there = n >= k
    top = np.where(there, n, k)
    return np.where(there, gammaln(top + 1) - gammaln(k + 1) - gammaln(top - k + 1), -np.inf)


@dataclass(frozen=True, eq=False)
class HeldOutPolicy:
    """A policy's log-ratios on rollouts with scores, and estimates from them, each with a value for each prompt."""

    log_ratios: Sequence[Float[np.ndarray, " K"]]
    pools: WeightedPools
    normalise: Normalisation = "pooled"

    @classmethod
    def of(
        cls, log_ratios: Iterable[npt.ArrayLike], samples: Samples, normalise: Normalisation = "pooled"
    ) -> "HeldOutPolicy":
        """Check log-ratios against the samples; ValueError unless each rollout has a finite one."""
        return cls(check_log_ratio_rows("log_ratios", log_ratios, samples), WeightedPools(samples), normalise)

    @cached_property
    def weights(self) -> Float[np.ndarray, "P K"]:
        """Weights w = e^d, 0 in padding; with `normalise="prompt"` they have the mean 1 within each prompt."""
        d = self.pools.filled(np.concatenate(self.log_ratios), -np.inf)
        if self.normalise == "prompt":
            d = d - d.max(axis=1, keepdims=True)
        with np.errstate(over="ignore"):
            weights = np.exp(d)
        if self.normalise == "prompt":
            weights = weights / np.sum(weights * self.pools.uniform, axis=1, keepdims=True)
        if not np.isfinite(weights).all():
            raise PolicyTooFarError(f"log_ratios need to be below 700, where e^d is finite, got {d.max():.4g}.")
        return np.asarray(weights)

    @property
    def mean_weight(self) -> Estimate:
        """Mean importance weight over the rollouts, which is 1 for exact log-ratios."""
        return Estimate(np.sum(self.weights * self.pools.uniform, axis=1))

    @property
    def kl(self) -> Estimate:
        """KL of the policy from the reference, the mean of w log w - w + 1, which is never negative."""
        w = self.weights
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(w > 0, w * np.log(w), 0.0) - w + 1
        return Estimate(np.sum(terms * self.pools.uniform, axis=1))

    @cached_property
    def _normalised(self) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, " P"]]:
        return self.pools.tilted(self.pools.filled(np.concatenate(self.log_ratios), 0.0), 1.0)

    @property
    def kl_normalised(self) -> Estimate:
        """The KL of weights that add up to 1 within a prompt from 1/K."""
        return Estimate(self._normalised[1])

    @property
    def ess(self) -> float:
        """Effective sample size, the harmonic mean over prompts."""
        return float(1 / np.sum(self._normalised[0] ** 2, axis=1).mean())

    def correlate(self, targets: Sequence[Float[np.ndarray, " K"]]) -> Float[np.ndarray, " P"]:
        """Compute each prompt's correlation of log-ratio and target; nan where either is constant."""
        pairs = zip(self.log_ratios, targets, strict=True)
        return np.array([_correlate(d, target) for d, target in pairs])

    def win_rate(self, procedure: HeldOutProcedure, judge: str = SELECT) -> Estimate:
        """Estimate the win rate over the reference, by the score that selects or by the judge."""
        samples = self.pools.samples
        by = Samples(samples.select) if judge == SELECT else samples
        return weighted_win_rate(self.log_ratios, by, procedure, self.normalise)

    def win_rates(self, procedures: Sequence[HeldOutProcedure]) -> dict[tuple[str, str], Estimate]:
        """Estimate the win rates by each judge under each procedure."""
        samples = self.pools.samples
        judges = [SELECT] if samples.judge is samples.select else [SELECT, JUDGE]
        return {(judge, repr(each)): self.win_rate(each, judge) for judge in judges for each in procedures}

    def _steps(self, steps: int) -> Int[np.ndarray, "P K"]:
        """Return the step of u, of so many equal ones, that each rollout's rank among those of its prompt is in."""
        standings = self.pools.by_select
        u = (standings.below + standings.upto) / 2 / self.pools.samples.sizes[:, None]
        return np.asarray(np.minimum((u * steps).astype(int), steps - 1))

    def density_ratios(self, steps: int = DECILES) -> list[tuple[float, Estimate] | None]:
        """Estimate the policy's share of equal steps of u over the reference's, each with the reference's own share.

        None for a step without rollouts, and for all where each weight rounds to 0.
        """
        ratios: list[tuple[float, Estimate] | None] = []
        step, weights = self._steps(steps), self.pools.uniform * self.weights
        if not weights.any():
            return [None] * steps
        for each in range(steps):
            theirs = np.sum(self.pools.uniform * (step == each), axis=1)
            mass = float(theirs.mean())
            if mass == 0:
                ratios.append(None)
                continue
            # A ratio of means over prompts, whose denominator is a mean over prompts as well: to first order.
            ours = divide(np.sum(weights * (step == each), axis=1), weights.sum(axis=1))
            ratio = ours.value / mass
            ratios.append((mass, Estimate(np.asarray((ours.per_prompt - ratio * (theirs - mass)) / mass))))
        return ratios

    def share_by_u(self) -> float | None:
        """Estimate the share of the KL that one function of u has: that of its law in steps, less what is noise."""
        kl, explained = self.kl.value, 0.0
        if kl < NO_KL:
            return None
        for mass, ratio in filter(None, self.density_ratios(U_STEPS)):
            if ratio.value > 0:
                error = ratio.standard_error if len(self.log_ratios) > 1 else 0.0
                explained += mass * (ratio.value * np.log(ratio.value) - error**2 / (2 * ratio.value))
        return float(np.clip(explained / kl, 0.0, 1.0))


def _correlate(a: Float[np.ndarray, " K"], b: Float[np.ndarray, " K"]) -> float:
    """Compute a correlation; nan where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return nan
    return float(np.corrcoef(a, b)[0, 1])
