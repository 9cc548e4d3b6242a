"""Win rates from samples, with their errors, and win rates predicted from references alone (Def. 4).

Nothing is simulated: a procedure's `pool_weights` are the exact probabilities that each response of a pool is selected,
so the estimate is the two-sample U-statistic: unbiased, and less noisy than any split of the pools into blocks of N.
(`Calibrated` alone normalises its weights itself, and is biased by O(1/m).)

>>> from calibrated_rewards.theory.procedures import BestOf
>>> policy = Samples([[0.2, 0.9, 0.6], [0.7, 0.8, 0.1]])
>>> reference = Samples([[0.3, 0.1, 0.5], [0.4, 0.95, 0.2]])
>>> win_rate(policy, reference, BestOf(2))
Estimate(0.667 ± 0.333 over 2 prompts, ± 0.333 from sampling)
"""

from dataclasses import dataclass
from math import nan
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.evaluation.estimates import Estimate, Influence, Samples
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
