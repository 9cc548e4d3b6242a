"""Policies on the line from the reference's weights to trained ones, read on rollouts and brought to a KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.held_out import check_log_ratios
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.trained_weights import find_factor, named_trainable


@dataclass(frozen=True, eq=False)
class Line:
    """The policies reference + factor (trained - reference), read on the rollouts of some prompts."""

    policy: Any
    start: Mapping[str, torch.Tensor]
    """The reference's weights, of those that are trained."""
    trained: Mapping[str, torch.Tensor]
    tokens: Sequence[Any]
    reference: Sequence[torch.Tensor]
    """The reference's log-probabilities of the rollouts."""
    scores: Samples

    @torch.no_grad()
    def set(self, factor: float) -> None:
        """Set the model's weights to those at a factor."""
        for name, weight in named_trainable(self.policy.model):
            weight.copy_(self.start[name] + factor * (self.trained[name] - self.start[name]))

    def read(self, factor: float) -> np.ndarray:
        """Read the log-ratios of the rollouts at a factor."""
        self.set(factor)
        most = max(len(known) for known in self.reference)
        reader = GroupReader(self.policy.model.eval(), self.policy.decoding.temperature, most)
        read = zip(reader.read(self.tokens), self.reference, strict=True)
        return np.stack([(own.cpu() - known).double().numpy() for own, known in read])

    def measure_kl(self, log_ratios: np.ndarray) -> float:
        """Measure the KL of log-ratios on the rollouts; infinite if the policy is too far away."""
        try:
            return check_log_ratios(log_ratios, self.scores).kl.value
        except FloatingPointError:
            return np.inf

    def stretch(self, kl: float) -> tuple[float, np.ndarray]:
        """Find the factor of a KL; return it and its log-ratios."""
        read = {1.0: self.read(1.0)}

        def measure(factor: float) -> float:
            read[factor] = self.read(factor)
            return self.measure_kl(read[factor])

        factor, _ = find_factor(measure, kl, self.measure_kl(read[1.0]))
        return factor, read[factor]
