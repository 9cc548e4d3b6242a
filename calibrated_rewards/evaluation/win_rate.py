"""Win rates from samples with their errors, and without training: predicted, and of rollouts with weights (Def. 4).

Nothing is simulated: a procedure's `pool_weights` are the exact probabilities that each response of a pool is selected,
so the estimate is the two-sample U-statistic: unbiased, and less noisy than any split of the pools into blocks of N.
(`Calibrated` alone normalises its weights itself, and is biased by O(1/m).)

>>> from calibrated_rewards.theory.procedures import BestOf
>>> policy = Samples([[0.2, 0.9, 0.6], [0.7, 0.8, 0.1]])
>>> reference = Samples([[0.3, 0.1, 0.5], [0.4, 0.95, 0.2]])
>>> win_rate(policy, reference, BestOf(2))
Estimate(0.667 ± 0.333 over 2 prompts, ± 0.333 from sampling)

K rollouts of a prompt stand for the reference with weights 1/K, and for any other policy with weights of their own: its
KL, its output under a procedure and its win rates are exact sums (`WeightedPools`). Rows of unequal length are padded
with places of no weight; scores, values and weights are all (P, K).

>>> pools = WeightedPools(Samples(select=[[0.3, 0.1, 0.7]]))
>>> pools.output(pools.uniform, BestOf(2)).round(3)  # 5/9 of all pairs, drawn with replacement, hold the largest
array([[0.333, 0.111, 0.556]])
"""

from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log, nan, sqrt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from calibrated_rewards.evaluation.estimates import Estimate, Influence, Samples
from calibrated_rewards.table.search import tie_spans
from calibrated_rewards.theory.procedures import Calibrated, CalibratedProcedure, Procedure, share_ties

Array: TypeAlias = npt.NDArray[np.float64]


def win_rate(
    policy: Samples, reference: Samples, procedure: Procedure, base: Procedure | None = None, *, jackknife: bool = True
) -> Estimate:
    """Estimate how often the policy under its procedure beats the reference under `base`, by default the same one.

    The judging scores decide, ties one half. A procedure that reads the score itself (`SoftBestOf`, `RewindAndRepeat`)
    needs calibrated selecting scores, and computes its weights anew for every response left out; `jackknife=False`
    saves that time and leaves `sampling_error` unknown.
    """
    if not (isinstance(policy, Samples) and isinstance(reference, Samples)):
        raise TypeError(f"win_rate needs Samples(scores), got {type(policy).__name__}, {type(reference).__name__}.")
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
        wins = _share_beaten(a, b, q)
        values.append(p @ wins)
        if jackknife:
            without.append((ours.without(prompt, wins), theirs.without(prompt, 1 - _share_beaten(b, a, p))))
    pools = zip((policy, reference), zip(*without, strict=True), strict=True) if jackknife else ()
    return Estimate(np.array(values), tuple(Influence(samples, np.concatenate(rows)) for samples, rows in pools))


def _share_beaten(
    scores: Float[np.ndarray, " m"], pool: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """Compute the share of the weighted pool that each score beats, ties one half (Def. 1), in O((m + n) log n)."""
    order = np.argsort(pool)
    ordered, upto = pool[order], np.concatenate([[0.0], np.cumsum(weights[order])])
    return np.asarray((upto[np.searchsorted(ordered, scores)] + upto[np.searchsorted(ordered, scores, "right")]) / 2)


@dataclass(frozen=True)
class _Side:
    """The responses of one policy and the procedure that selects among them."""

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
        """Compute each response's probability of being selected."""
        try:
            return self.procedure.pool_weights(self.samples.select[prompt])
        except ValueError as error:
            raise ValueError(f"{error} (Prompt {prompt} of {self.name}.)") from error

    def without(self, prompt: int, outcome: Array) -> Array:
        """Compute the weighted mean of `outcome` without each response in turn; nan where the pool can spare none."""
        select = self.samples.select[prompt]
        fewest = 1 if isinstance(self.procedure, Calibrated) else self.procedure.draws
        if len(select) <= fewest:
            return np.full(len(select), nan)
        if isinstance(self.procedure, CalibratedProcedure):
            return _leave_one_out(select, outcome, self.procedure.pool_weights(np.arange(len(select) - 1)))
        others = ~np.eye(len(select), dtype=bool)
        return np.array([self.procedure.pool_weights(select[rest]) @ outcome[rest] for rest in others])


def _leave_one_out(
    select: Float[np.ndarray, " m"], outcome: Float[np.ndarray, " m"], by_rank: Float[np.ndarray, " rest"]
) -> Float[np.ndarray, " m"]:
    """Compute the weighted mean over the m - 1 that remain, for all m at once: those above move one rank down.

    Tied scores have the same chance of each of their ranks, so a tied group counts with its mean outcome.
    """
    _, group, size = np.unique(select, return_inverse=True, return_counts=True)
    end, total = np.cumsum(size), np.bincount(group, outcome)
    start, upto = end - size, np.concatenate([[0.0], np.cumsum(by_rank)])
    unmoved = np.cumsum((upto[np.minimum(end, len(by_rank))] - upto[start]) * total / size)
    moved = np.cumsum((upto[end - 1] - upto[np.maximum(start - 1, 0)]) * total / size)
    below = np.concatenate([[0.0], unmoved])[group]
    tied = (upto[end - 1] - upto[start])[group] * (total[group] - outcome) / np.maximum(size[group] - 1, 1)
    return np.asarray(below + tied + moved[-1] - moved[group])


@dataclass(frozen=True)
class Prediction:
    """A win rate predicted before any training, and the effective sample size that it rests on.

    `ess` is 1 / sum A_i^2 of the policy's mass, or of the base's where that is smaller. It is small where an output
    law leaves the references behind, and the prediction then falls short of the truth: with proxy and judge correlated
    normals it was off by up to .15 below an ess of 1.5, and by at most .01 from 5 on.
    """

    win_rate: Estimate
    ess: float

    @property
    def reliable(self) -> bool:
        """True from an effective sample size of 5 on."""
        return self.ess >= 5


def predict(references: Samples, policy_mass: npt.ArrayLike, base_mass: npt.ArrayLike) -> Prediction:
    """Predict the judge's win rate for a policy that is not trained yet, from K references a prompt alone.

    `references.select` are the proxy's scores, on which the policy will be trained; `policy_mass[i]` is the mass that
    its output's law (of theory, in quantiles of the reference) has between i/K and (i+1)/K; `base_mass` the base's.
    `theory.bin_masses` computes both; with beta = infinity it is the reference's own, hence the base's.
    The i-th smallest reference stands for its bin, and no reference for both sides at once:
    W = sum_{i != j} A_i B_j w(i, j) / sum_{i != j} A_i B_j.

    >>> references = Samples(select=[[0.3, 0.1, 0.7, 0.5]], judge=[[1.0, 2.0, 3.0, 4.0]])
    >>> predict(references, [0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25])
    Prediction(win_rate=Estimate(0.833 over 1 prompt), ess=2.0)
    """
    a, b = _check_mass("policy_mass", policy_mass), _check_mass("base_mass", base_mass)
    for prompt, size in enumerate(references.sizes):
        if not len(a) == len(b) == size:
            raise ValueError(
                f"predict needs K masses for K references, got {len(a)} and {len(b)} for the {size} of prompt {prompt}."
            )
    if 1 - a @ b < 1e-9:
        raise ValueError(f"predict needs mass in two bins or more, got all of both sides in one of {len(a)}.")
    values = [_predict_prompt(*rows, a, b) for rows in zip(references.select, references.judge, strict=True)]
    return Prediction(Estimate(np.array(values)), ess=float(1 / max(a @ a, b @ b)))


def _check_mass(name: str, mass: npt.ArrayLike) -> Array:
    bins = np.asarray(mass, np.float64)
    if bins.ndim != 1 or not (np.isfinite(bins).all() and (bins >= 0).all() and abs(bins.sum() - 1) < 1e-6):
        raise ValueError(f"predict needs a {name} of K numbers >= 0 that sum to 1, got {mass!r:.80}.")
    return np.asarray(bins / bins.sum())


def _predict_prompt(select: Array, judge: Array, policy_mass: Array, base_mass: Array) -> float:
    a, b = share_ties(select, policy_mass), share_ties(select, base_mass)
    same = a @ b
    return float((a @ _share_beaten(judge, judge, b) - same / 2) / (1 - same))


@dataclass(frozen=True, eq=False)
class Standings:
    """Order and ties of each prompt's responses by one score."""

    order: Int[np.ndarray, "P K"]
    below: Int[np.ndarray, "P K"]
    """Number of responses that each one beats."""
    upto: Int[np.ndarray, "P K"]
    """The same with itself and those that it ties with."""

    @classmethod
    def of(cls, scores: Float[np.ndarray, "P K"]) -> "Standings":
        """Sort each row and find its ties."""
        order = np.argsort(scores, axis=1, kind="stable")
        first, last = tie_spans(np.take_along_axis(scores, order, 1))
        below, upto = np.empty_like(order), np.empty_like(order)
        np.put_along_axis(below, order, first, 1)
        np.put_along_axis(upto, order, last, 1)
        return cls(order, below, upto)

    def shares(self, mass: Float[np.ndarray, "P K"]) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, "P K"]]:
        """Return the mass below each response, and the mass at or below it."""
        running = np.cumsum(np.take_along_axis(mass, self.order, 1), axis=1)
        running = np.minimum(np.hstack([np.zeros((len(mass), 1)), running]), 1.0)
        return np.take_along_axis(running, self.below, 1), np.take_along_axis(running, self.upto, 1)

    def beaten(self, mass: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        """Return the share of the mass that each response beats, ties one half."""
        below, upto = self.shares(mass)
        return np.asarray((below + upto) / 2)


@dataclass(frozen=True, eq=False)
class WeightedPools:
    """Rollouts of the reference, a row a prompt, to be given weights."""

    samples: Samples

    @cached_property
    def there(self) -> Bool[np.ndarray, "P K"]:
        """Mask of the rollouts: False in padding."""
        return np.arange(self.samples.sizes.max()) < self.samples.sizes[:, None]

    def filled(self, values: Float[np.ndarray, " responses"], rest: float) -> Float[np.ndarray, "P K"]:
        """Arrange values of all rollouts, prompts end to end, as padded rows."""
        out = np.full(self.there.shape, rest)
        out[self.there] = values
        return out

    @cached_property
    def uniform(self) -> Float[np.ndarray, "P K"]:
        """Weights of the reference itself, 1/K for each rollout."""
        return np.asarray(self.there / self.samples.sizes[:, None])

    @cached_property
    def by_select(self) -> Standings:
        """Standings by the score that procedures select by."""
        return Standings.of(self.filled(np.concatenate(self.samples.select), inf))

    @cached_property
    def by_judge(self) -> Standings:
        """Standings by the judge's score."""
        return Standings.of(self.filled(np.concatenate(self.samples.judge), inf))

    def tilted(
        self, values: Float[np.ndarray, "P K"], beta: float
    ) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, " P"]]:
        """Compute weights ~ e^{values / beta}, and their KL from the reference, prompt by prompt."""
        exponent = np.where(self.there, values - np.max(values, axis=1, where=self.there, initial=-inf)[:, None], 0.0)
        exponent /= beta
        mass = np.exp(exponent) * self.there
        total = mass.sum(axis=1)
        weights = mass / total[:, None]
        moved = np.sum(weights * np.where(mass > 0, exponent, 0.0), axis=1)
        return weights, np.maximum(moved - np.log(total / self.samples.sizes), 0.0)

    def check_reach(self, kl: float, most: float | None = None) -> None:
        """Refuse a KL of `most` or more, by default log K: that of all weight on one rollout."""
        most = float(np.log(self.samples.sizes).mean()) if most is None else most
        if not 0 < kl < most * (1 - 1e-9):
            raise ValueError(
                f"these rollouts, K >= {self.samples.sizes.min()}, reach a KL between 0 and {most:.3g}, got kl={kl!r}."
            )

    def most_kl(self, values: Float[np.ndarray, "P K"]) -> float:
        """Compute the limit of the KL as beta falls to 0: all weight on the largest values of each prompt."""
        top = np.max(values, axis=1, where=self.there, initial=-inf)[:, None]
        return float(np.log(self.samples.sizes / np.sum((values == top) & self.there, axis=1)).mean())

    def beta_for_kl(self, values: Float[np.ndarray, "P K"], kl: float) -> float:
        """Solve for the beta at which the mean KL is `kl`: it falls as beta rises."""
        self.check_reach(kl, self.most_kl(values))
        spread = float(np.sqrt(np.sum(self.uniform * self._centred(values) ** 2, axis=1)).mean())
        x = log(spread / sqrt(2 * kl))  # the answer for normal values
        for _ in range(30):  # Newton's method on log KL, which is nearly straight in log beta
            weights, kls = self.tilted(values, exp(x))
            reached = max(float(kls.mean()), 1e-300)
            centre = np.sum(weights * values, axis=1, keepdims=True)
            variance = float(np.sum(weights * np.where(self.there, values - centre, 0.0) ** 2, axis=1).mean())
            step = log(reached / kl) * reached * exp(2 * x) / max(variance, 1e-300)
            if abs(step) < 1e-11 * max(1.0, abs(x)):
                return exp(x)
            if not abs(step) < 3.0:
                break
            x += step
        return self._bracket_beta(values, kl, log(spread))

    def _bracket_beta(self, values: Float[np.ndarray, "P K"], kl: float, start: float) -> float:
        """Solve between two betas, where Newton's method strays."""
        from scipy.optimize import brentq

        low = high = start
        while self._excess_kl(low, values, kl) < 0:
            low -= 2.0
        while self._excess_kl(high, values, kl) > 0:
            high += 2.0
        return exp(brentq(self._excess_kl, low, high, args=(values, kl), xtol=1e-12, rtol=1e-12))

    def _excess_kl(self, log_beta: float, values: Float[np.ndarray, "P K"], kl: float) -> float:
        return float(self.tilted(values, exp(log_beta))[1].mean()) - kl

    def _centred(self, values: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
        padded = np.where(self.there, values, 0.0)
        return np.where(self.there, padded - np.sum(padded * self.uniform, axis=1)[:, None], 0.0)

    def output(self, weights: Float[np.ndarray, "P K"], procedure: CalibratedProcedure) -> Float[np.ndarray, "P K"]:
        """Compute the law of the procedure's output: its draws are independent, and ties are broken at random.

        A group of ties takes the integral of g over its share of the quantiles (Def. 6): F^N - F'^N for the best of N.
        Gauss's rule is exact for polynomials, and ties go by weight, so that no weight is divided by.
        """
        below, upto = self.by_select.shares(weights)
        width, above = upto - below, 1.0 - upto
        nodes, shares = np.polynomial.legendre.leggauss((procedure.draws + 1) // 2)
        tilt = np.zeros_like(weights)
        for x, share in zip((nodes + 1) / 2, shares / 2, strict=True):
            tilt += share * procedure.density(below + x * width, above + (1 - x) * width)
        mass = weights * tilt
        return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def win_rates_of(
    policy: Float[np.ndarray, "P K"], base: Float[np.ndarray, "P K"], beaten: Float[np.ndarray, "P K"], itself: bool
) -> Float[np.ndarray, " P"]:
    """Compute each prompt's win rate of the policy's output over the base's, of which a response beats `beaten`.

    By the score that selects, a rollout stands for its bin of quantiles, in which two responses are a fair match: it
    meets `itself` too, for one half; the midpoint rule, off by O(1/K^2) where weights depend on the rank alone. By
    another judge, one rollout says nothing of two responses in its bin, so none meets itself, as in
    `evaluation.predict`: sum_{i != j} A_i B_j w(i, j) / sum_{i != j} A_i B_j, nan where all of both is one rollout.
    """
    wins = np.sum(policy * beaten, axis=1)
    if itself:
        return np.asarray(wins)
    same = np.sum(policy * base, axis=1)
    return np.asarray((wins - same / 2) / np.where(1 - same > 1e-9, 1 - same, np.nan))
