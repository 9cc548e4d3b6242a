"""Weights of pairs of rollouts, with which a judge's win rate has nearly no bias.

In quantiles the optimum for a transform has a known law, and so has what a procedure makes of it: a density A. A
rollout's quantile is not known, but its rank among others is: of M others, j below it have the binomial law. Numbers
a with sum_j binom(M, j) u^j (1 - u)^(M - j) a_j = A(u) have therefore the mean A(u), whatever the quantile u. Such
numbers exist where A is a polynomial of degree M; others are near it, the nearer the larger M: win rates are off by
.004 at K = 100 and .044 at K = 16 (benchmarks/reweighted.py, KL 1).

A pair of rollouts is one of the policy and one of the reference. The reference's is the best of N if N - 1 others are
below it. The policy's has the weight a_j by the rank among the others that are left, so that the two factors are
independent, and their product has the mean A(u) N v^(N - 1). The mean over all choices of the N - 1 is a sum of
products of binomial coefficients: a weight for each pair of ranks, the same for all prompts.

>>> from calibrated_rewards.theory.tilted_policy import win_rate
>>> from calibrated_rewards.theory.transforms import Exponential
>>> weights = weigh_pairs(Exponential(2.0), 0.5, BestOf(4), K=32)
>>> judge_that_agrees = compare_pairs(weights, np.arange(32)[None])
>>> print(judge_that_agrees.round(6), round(win_rate(Exponential(2.0), 0.5, BestOf(4)), 6))
[0.963763] 0.963763
"""

from math import log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Real
from scipy.special import betaln, binom, log_expit

from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import policy_law
from calibrated_rewards.theory.transforms import Transform

Array: TypeAlias = npt.NDArray[np.float64]
# More rounds leave less bias and more noise: after 30, a density that K = 100 can resolve is reproduced.
ROUNDS = 30
# Of more rollouts there are too many pairs, and half of them show well enough what all are short of.
MOST_ROLLOUTS = 512


def draw_chances(procedure: CalibratedProcedure) -> dict[int, float]:
    """Return the chance of each number of draws, of which the best or the worst is taken; empty for what is neither.

    >>> draw_chances(WorstOf(4)), draw_chances(BestOfUpTo(2))
    ({4: 1.0}, {1: 0.666..., 2: 0.333...})
    """
    if isinstance(procedure, BestOfUpTo):
        return dict(enumerate(procedure.chances.tolist(), start=1))
    return {procedure.draws: 1.0} if isinstance(procedure, Standard | BestOf | WorstOf) else {}


def weigh_pairs(transform: Transform, beta: float, procedure: CalibratedProcedure, K: int) -> Float[np.ndarray, "K K"]:
    """Weigh each pair of ranks, first the policy's, then the reference's, both under the procedure; the sum is 1."""
    law = policy_law(transform, beta, procedure)
    output, worst = law.mass * procedure.tilt(law), isinstance(procedure, WorstOf)
    logits = -law.grid.s if worst else law.grid.s
    weights = np.zeros((K, K))
    for draws, chance in draw_chances(procedure).items():
        weights += chance * _weigh_best(_solve_density(logits, output / output.sum(), K - 1 - draws), draws)
    return weights[::-1, ::-1] if worst else weights


def compare_pairs(weights: Float[np.ndarray, "K K"], ranks: Real[np.ndarray, "P K"]) -> Float[np.ndarray, " P"]:
    """Compute each prompt's win rate by a judge's ranks of its rollouts, which ascend by the score that selects."""
    lead, wins = weights - weights.T, np.full(len(ranks), weights.sum() / 2)
    for gap in range(1, ranks.shape[1]):
        wins += np.sign(ranks[:, gap:] - ranks[:, :-gap]) @ np.diagonal(lead, -gap) / 2
    return wins


def _solve_density(logits: Float[np.ndarray, " nodes"], output: Float[np.ndarray, " nodes"], M: int) -> Array:
    """Solve for the numbers a of the ranks among M others, whose mean at each quantile is the output's density.

    With a Beta(l + 1, M - l + 1) for each rank l, means of the density have to agree with means of what a gives: a is
    moved by their difference. These are Durrmeyer's operators, whose eigenvalues are in (0, 1].
    """
    ranks = np.arange(M + 1)
    log_beta = betaln(ranks + 1, M - ranks + 1)
    log_density = ranks[:, None] * log_expit(logits) + (M - ranks)[:, None] * log_expit(-logits) - log_beta[:, None]
    means = np.exp(log_density) @ output
    both = ranks[:, None] + ranks
    reproduced = np.exp(betaln(both + 1, 2 * M - both + 1) - log_beta[:, None] - log_beta - log(M + 1))
    a = means
    for _ in range(ROUNDS):
        a = a + means - reproduced @ a
    return np.asarray(a)


def _weigh_best(a: Array, draws: int) -> Array:
    """Average a over all choices of the draws - 1 others that the reference's rollout is the best of."""
    others, K = draws - 1, len(a) + draws
    policy, reference = np.arange(K)[:, None], np.arange(K)[None]
    # Below the policy's rollout, all of the others are below it too.
    left = policy - draws
    weights = np.where(reference < policy, binom(reference, others) * a[np.maximum(left, 0)] * (left >= 0), 0.0)
    between = reference - policy - 1
    for below in range(others + 1):
        left = policy - below
        rest = a[np.clip(left, 0, len(a) - 1)] * ((left >= 0) & (left < len(a)))
        weights += np.where(between >= 0, binom(policy, below) * rest * binom(between, others - below), 0.0)
    return np.asarray(weights * draws / (binom(K - 2, others) * K * (K - 1)))
