"""Weights of pairs of rollouts: against theory where the judge agrees, an integral where it does not, and two loops."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.objectives import Fixed, Transformed
from calibrated_rewards.evaluation.pair_weights import compare_pairs, weigh_pairs
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.optimum import optimal_transform
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity, Log


@pytest.mark.parametrize("procedure", [Standard(), BestOf(4), WorstOf(4), BestOfUpTo(6)], ids=repr)
@pytest.mark.parametrize("K", [16, 100])
def test_a_judge_that_agrees_sees_what_theory_says(procedure, K):
    """Ranks alone decide the win rate then, so that it must be theory's in each prompt, for any transform."""
    for transform in Identity(), Log(), Exponential(10.0), Exponential(-5.0):
        beta = beta_for_kl(transform, 0.5)
        weights = weigh_pairs(transform, beta, procedure, K)
        assert weights.sum() == pytest.approx(1.0, abs=1e-9)
        rate = compare_pairs(weights, np.arange(K)[None])[0]
        assert rate == pytest.approx(win_rate(transform, beta, procedure), abs=2e-3)


@pytest.mark.parametrize("correlation", [0.6, 0.9])
def test_by_another_judge_it_is_the_integral(correlation):
    """Normal scores with a correlation, the optimum at KL 1, K = 32: no bias beyond the noise of 4,000 prompts."""
    procedure, kl, grid = BestOf(4), 1.0, (np.arange(2000) + 0.5) / 2000
    transform = optimal_transform(procedure, kl=kl)
    heights = transform(grid)
    cdf = np.cumsum(np.exp((heights - heights.max()) / beta_for_kl(transform, kl)))
    ours = np.diff((cdf / cdf[-1]) ** 4, prepend=0.0)
    theirs = np.diff((np.arange(1, 2001) / 2000) ** 4, prepend=0.0)
    x = ndtri(grid)
    truth = ours @ ndtr(correlation * (x[:, None] - x) / np.sqrt(2 * (1 - correlation**2))) @ theirs
    scores, noise = np.random.default_rng(0).normal(size=(2, 4000, 32))
    samples = Samples(scores, correlation * scores + np.sqrt(1 - correlation**2) * noise)
    found = estimate_frontier(samples, {"best": Fixed(Transformed(transform))}, [kl], [procedure]).points[0]
    rate = found.win_rates["judge"][repr(procedure)]
    assert abs(rate.value - truth) < 3 * rate.standard_error + 0.002
    assert found.corrected


def test_pairs_are_compared_as_two_loops_would():
    """All pairs of different rollouts, the judge's ties for one half."""
    rng = np.random.default_rng(0)
    weights = rng.random((7, 7))
    np.fill_diagonal(weights, 0.0)
    ranks = rng.integers(4, size=(3, 7))
    for row, wins in zip(ranks, compare_pairs(weights, ranks), strict=True):
        pairs = [weights[i, j] * (1 + np.sign(row[i] - row[j])) / 2 for i in range(7) for j in range(7)]
        assert wins == pytest.approx(sum(pairs))
