"""How alike the policy gradients of several rewards are on the same rollouts, before any training.

At the reference the gradient of a reward R is the mean over prompts of Cov(R, grad log pi), so two rewards that rank
alike pull the weights in nearly one direction, whatever their transforms: what tells them apart is of higher order.
`compare_gradients` measures that on rollouts of a calibration. The cosine on the same rollouts contains their noise,
which two rewards share; two halves of each prompt's rollouts give the cosine of what is not noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from calibrated_rewards.evaluation.wording import format_table
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.log_probabilities import GroupReader


@dataclass(frozen=True, eq=False)
class GradientComparison:
    """Cosines of rewards' policy gradients, with the correlation of the rewards themselves; rows as in `names`."""

    names: tuple[str, ...]
    correlations: Float[np.ndarray, "A A"]
    """Mean within-prompt correlation of the rewards."""
    cosines: Float[np.ndarray, "A A"]
    """Of the gradients on all rollouts, noise included."""
    without_noise: Float[np.ndarray, "A A"]
    """Of the expected gradients, from halves; nan where a reward's halves do not agree. It may exceed 1 by chance."""

    agreement: Float[np.ndarray, " A"]
    """The cosine of each reward's gradients on the two halves: 0 is noise alone, 1 none."""

    def __str__(self) -> str:
        first = self.names[0]
        columns = {
            f"correlation with {first}": self.correlations[0],
            "cosine of the gradients": self.cosines[0],
            "without noise": self.without_noise[0],
            "halves agree": self.agreement,
        }
        cells = {head: [f"{each:.2f}" for each in column] for head, column in columns.items()}
        return "\n".join(format_table(self.names, cells))


def compare_gradients(
    reader: GroupReader, groups: Sequence[Group], rewards: Mapping[str, Sequence[Float[np.ndarray, " K"]]]
) -> GradientComparison:
    """Compare the policy gradients of rewards of the same rollouts, by the weights of the model that require them.

    `rewards` has for each name a row for each group, with a number for each completion; their scale is of no account.
    Two gradients of each reward are held in memory. The model's own gradients are cleared.
    """
    rows = {name: [np.asarray(row, np.float64) for row in each] for name, each in rewards.items()}
    sizes = [len(group.completions) for group in groups]
    for name, each in rows.items():
        if [len(row) for row in each] != sizes:
            raise ValueError(f"rewards[{name!r}] needs a number for each completion of each group, got other lengths.")
    if not rows or not sizes or min(sizes) < 4:
        raise ValueError(
            "compare_gradients needs a reward, and groups of 4 completions or more, for each half has a covariance, "
            f"got {len(rows)} rewards and groups of {min(sizes, default=0)}."
        )
    halves: list[list[Tensor]] = [[], []]
    for each in rows.values():
        for half, gradients in enumerate(halves):
            gradients.append(compute_gradient(reader, groups, each, half))
    first, second = map(torch.stack, halves)
    whole = first + second
    products = (whole @ whole.T).double().cpu().numpy()
    across = (first @ second.T).double().cpu().numpy()
    lengths = np.sqrt(np.diag(products))
    signal = np.diag(across)
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes_of_signal = np.sqrt(np.where(signal > 0, signal, np.nan))
        own = [torch.linalg.vector_norm(each, dim=1).double().cpu().numpy() for each in (first, second)]
        return GradientComparison(
            names=tuple(rows),
            correlations=_correlate(list(rows.values())),
            cosines=products / np.outer(lengths, lengths),
            without_noise=(across + across.T) / 2 / np.outer(sizes_of_signal, sizes_of_signal),
            agreement=signal / (own[0] * own[1]),
        )


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """A sum of log-probabilities, whose gradient is that of a policy with these rewards."""

    weights: Float[np.ndarray, " K"]

    def __call__(self, logprobs: Tensor) -> Tensor:
        """Compute the sum."""
        return (torch.as_tensor(self.weights, dtype=logprobs.dtype, device=logprobs.device) * logprobs).sum()


def compute_gradient(
    reader: GroupReader, groups: Sequence[Group], rewards: Sequence[Float[np.ndarray, " K"]], half: int
) -> Tensor:
    """Compute the mean over groups of Cov(reward, grad log pi) on every other completion, as one vector."""
    trained: list[Any] = [weight for weight in reader.model.parameters() if weight.requires_grad]
    reader.model.zero_grad(set_to_none=True)
    some, sums = [], []
    for group, row in zip(groups, rewards, strict=True):
        at = list(range(half, len(row), 2))
        some.append(group.take(at))
        sums.append(WeightedSum((row[at] - row[at].mean()) / (len(at) - 1) / len(groups)))
    reader.accumulate_gradients(some, sums)
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    gradient = torch.cat([part.detach().float().flatten() for part in parts])
    reader.model.zero_grad(set_to_none=True)
    return gradient


def _correlate(rewards: Sequence[Sequence[Float[np.ndarray, " K"]]]) -> Float[np.ndarray, "A A"]:
    """Average the correlation of the rewards of a prompt over the prompts where none is constant."""
    prompts = [np.stack(rows) for rows in zip(*rewards, strict=True)]
    several = [np.atleast_2d(np.corrcoef(rows)) for rows in prompts if (np.ptp(rows, axis=1) > 0).all()]
    return np.asarray(np.mean(several, axis=0)) if several else np.full((len(rewards),) * 2, np.nan)
