"""A small network that bends the curve for each prompt: it learns what is not linear in the features."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from calibrated_rewards.amortised.curve import Curve
from calibrated_rewards.amortised.sample import Sample

# The levels whose quantiles it moves.
LEVELS = (np.arange(25) + 0.5) / 25
HIDDEN, DROPOUT, WEIGHT_DECAY, LEARNING_RATE = 32, 0.1, 0.01, 5e-3
# How many of the coordinates it reads: what is best is found out.
WIDTHS = (8, 32, 128)
# Prompts in a step at most, steps in an epoch at least, and how many of a prompt's scores are drawn for a step.
BATCH, STEPS, DRAWS = 256, 8, 8
# Epochs at most, and without an improvement; what improves is the loss on this part of the prompts, kept aside.
EPOCHS, PATIENCE, KEPT_ASIDE = 300, 20, 1 / 8


@dataclass(frozen=True, eq=False)
class Network:
    """Two hidden layers, in numpy: torch is needed to train it and no more.

    Its answer for a prompt are quantiles that ascend, whatever its weights: the lowest, and steps that are positive.
    """

    quantiles: Float[np.ndarray, " S"]
    """What it starts from: the common curve at `LEVELS`."""
    first: Float[np.ndarray, "d H"]
    first_bias: Float[np.ndarray, " H"]
    second: Float[np.ndarray, "H H"]
    second_bias: Float[np.ndarray, " H"]
    last: Float[np.ndarray, "H S"]
    last_bias: Float[np.ndarray, " S"]

    def __call__(self, features: Float[np.ndarray, "P d"]) -> Float[np.ndarray, "P S"]:
        """The prompt's quantiles at `LEVELS`, on the common curve's scale."""
        hidden = _silu(features @ self.first + self.first_bias)
        told = _silu(hidden @ self.second + self.second_bias) @ self.last + self.last_bias
        start = self.quantiles[0] + told[:, :1]
        steps = np.logaddexp(0, _before_softplus(self.quantiles) + told[:, 1:])
        return np.hstack([start, start + np.cumsum(steps, axis=1)])


def trained(coordinates: Float[np.ndarray, "P r"], standard: Sample, curve: Curve, seed: int) -> Network:
    """The network of least pinball loss, which is half of CRPS, on standardised scores; stopped early.

    Of networks that read more and more of the coordinates, the leading ones first, it is the best: with many of them it
    learns its prompts by heart. It is trained on the CPU, from a seed: the same machine gives the same network.
    """
    import torch

    size = max(float(coordinates.std(axis=0).max()), 1e-12)
    inputs = torch.tensor(coordinates / size, dtype=torch.float32)
    quantiles, width = curve.icdf(LEVELS), inputs.shape[1]
    least, kept = np.inf, list[Any]()
    with torch.random.fork_rng(devices=[]):
        for first in sorted({min(first, width) for first in WIDTHS}):
            torch.manual_seed(seed)
            trainer = _Trainer(inputs[:, :first], standard, quantiles, np.random.default_rng(seed))
            loss, weights = trainer.best()
            if loss < least:
                least, kept = loss, weights
    entry, *rest = (np.ascontiguousarray(weight.double().numpy().T) for weight in kept)
    entry = np.vstack([entry / size, np.zeros((width - len(entry), HIDDEN))])
    return Network(quantiles, entry, *rest)


class _Trainer:
    """One training: the layers, the prompts to learn from, and those kept aside."""

    def __init__(self, inputs: Any, standard: Sample, quantiles: Any, rng: np.random.Generator) -> None:
        import torch
        from torch import nn

        self.inputs, self.rng, self.counts = inputs, rng, standard.counts
        self.scores = torch.tensor(standard.scores, dtype=torch.float32)
        self.starts = np.cumsum(standard.counts) - standard.counts
        self.start = float(quantiles[0])
        self.before = torch.tensor(_before_softplus(quantiles), dtype=torch.float32)
        self.levels = torch.tensor(LEVELS, dtype=torch.float32)
        width, marks = inputs.shape[1], len(quantiles)
        hidden = [nn.Linear(width, HIDDEN), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(HIDDEN, marks))
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)  # the common curve, to start with

    def best(self) -> tuple[float, list[Any]]:
        """The least loss on the prompts kept aside, and the weights that have it."""
        import torch

        order = self.rng.permutation(len(self.counts))
        aside, learnt = np.split(order, [max(1, int(len(order) * KEPT_ASIDE))])
        of_aside = self._drawn(aside, 8 * DRAWS)
        step = torch.optim.AdamW(self.net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        least, kept, since = float("inf"), self._weights(), 0
        for _ in range(EPOCHS):
            self._epoch(learnt, step)
            self.net.eval()
            with torch.no_grad():
                found = float(self._loss(aside, of_aside))
            since = 0 if found < least else since + 1
            if found < least:
                least, kept = found, self._weights()
            if since == PATIENCE:
                break
        return least, kept

    def _epoch(self, learnt: Any, step: Any) -> None:
        self.net.train()
        shuffled = self.rng.permutation(learnt)
        for batch in np.array_split(shuffled, max(min(STEPS, len(shuffled)), len(shuffled) // BATCH)):
            step.zero_grad()
            self._loss(batch, self._drawn(batch, DRAWS)).backward()
            step.step()

    def _drawn(self, prompts: Any, draws: int) -> Any:
        """Some scores of each prompt."""
        at = (self.rng.random((len(prompts), draws)) * self.counts[prompts][:, None]).astype(np.int64)
        return self.scores[self.starts[prompts][:, None] + at]

    def _loss(self, prompts: Any, scores: Any) -> Any:
        import torch

        told = self.net(self.inputs[prompts])
        steps = torch.nn.functional.softplus(self.before + told[:, 1:])
        start = self.start + told[:, :1]
        quantiles = torch.cat([start, start + steps.cumsum(1)], 1)
        gaps = scores[:, :, None] - quantiles[:, None, :]
        return torch.maximum(self.levels * gaps, (self.levels - 1) * gaps).mean()

    def _weights(self) -> list[Any]:
        return [parameter.detach().clone() for parameter in self.net.parameters()]


def _before_softplus(quantiles: Float[np.ndarray, " S"]) -> Float[np.ndarray, " _"]:
    """What softplus makes the steps between quantiles of; ties are drawn apart a little."""
    steps = np.maximum(np.diff(quantiles), 1e-3 * (quantiles[-1] - quantiles[0]) + 1e-9)
    return np.asarray(steps + np.log(-np.expm1(-steps)))


def _silu(values: Float[np.ndarray, "P H"]) -> Float[np.ndarray, "P H"]:
    return np.asarray(values * expit(values))
