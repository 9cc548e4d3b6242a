"""A reward's mean and its optimal value under the reference policy, prompt by prompt: known before anything is trained.

The references of a table are an exact sample of the policy that training starts from, so E_ref[Phi] and the partition
Z = E_ref[e^{Phi / beta}] are known. At the optimum pi_ref(y) e^{Phi(y) / beta} / Z the reward less beta times the
log-ratio is beta log Z for every completion: its *optimal value*, and a baseline without any variance there.

>>> from calibrated_rewards import ReferenceTable
>>> from calibrated_rewards.testing.suites import NumberScorer
>>> table = ReferenceTable.build([("untied", [0.0, 1.0, 2.0, 3.0]), ("tied", [0.0, 0.0, 0.0, 1.0])])
>>> reward = CalibratedReward(NumberScorer(), table)
>>> values = compute_reference_values(reward, [Asked("untied"), Asked("tied")], beta=0.5)
>>> values.mean, values.optimal.round(3)
(array([0.5, 0.5]), array([0.619, 0.554]))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.special import logsumexp

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.prompts import start_of
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.theory.finite_k import log_partition, values
from calibrated_rewards.theory.scale import scaled


@dataclass(frozen=True, eq=False)
class ReferenceValues:
    """Means and optimal values of a reward under the reference policy, a number for each prompt."""

    mean: Float64[np.ndarray, " P"]
    """E_ref[Phi]."""
    optimal: Float64[np.ndarray, " P"]
    """beta log Z, the most that E[Phi] - beta KL can be."""


def compute_reference_values(reward: CalibratedReward, prompts: Sequence[Asked], beta: float) -> ReferenceValues:
    """Compute E_ref[Phi] and beta log Z of each prompt.

    Without ties among a prompt's references a new completion falls into each of the K + 1 gaps between them with equal
    probability, on average: Z is `theory.finite_k.log_partition`. With ties, and for rewards that are not ranks, both
    are means over the prompt's own references. ValueError for a prompt without references.
    """
    rows = reward.rows([each.prompt for each in prompts], [each.id for each in prompts])
    if (rows < 0).any():
        unknown = prompts[int(np.argmin(rows))].prompt
        raise ValueError(f"values under the reference need the prompt's references, got none for {start_of(unknown)}")
    mean, optimal = np.empty(len(rows)), np.empty(len(rows))
    by_rank = isinstance(reward.calibration, EmpiricalCDF) and not reward.calibration.tolerance
    transform = scaled(reward.transform, reward.scale)
    for at, scores in reward.table.blocks(rows):
        own, K = reward.from_scores(rows[at], scores), scores.shape[1]
        mean[at], optimal[at] = own.mean(axis=1), beta * (logsumexp(own / beta, axis=1) - np.log(K))
        tied = (np.diff(scores, axis=1) == 0).any(axis=1)  # rows of a table are sorted
        if by_rank and not tied.all():
            mean[at[~tied]] = values(transform, K, reward.estimator)[::2].mean()
            optimal[at[~tied]] = beta * log_partition(transform, beta, K, reward.estimator)
    return ReferenceValues(mean, optimal)
