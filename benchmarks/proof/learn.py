"""Train a policy on the rollouts of a tree to an arm's targets, and measure exactly what came of it.

The loss is the forward KL with its control variate (`training.offline.losses.ControlVariate`), whose gradient is the
mean of (e^d - omega) grad d over the rollouts. Each step takes all rollouts: a completion that was drawn often counts
as often. The weights that are kept are those with the least loss on the rollouts that are held out, so that no number
of what is measured decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from arms import Array, Point
from laws import Laws, Rollouts
from torch import Tensor
from tree import Inputs, Path, Tree

from calibrated_rewards.training.offline.trained_weights import find_factor

# Clamps of omega and of e^d in the gradient: wide, for the optimum for best of 16 has an omega of 10.
MOST_OMEGA, MOST_RATIO = 50.0, 100.0
KLS = (0.25, 0.5)
LARGEST_FACTOR = 4.0


@dataclass(frozen=True)
class Settings:
    """Settings of the training."""

    optimizer: str = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    steps: int = 80
    patience: int = 15
    """Steps without a lower held-out loss after which it ends."""


@dataclass(frozen=True, eq=False)
class Policy:
    """A model in training: its body, its output weights, and what of it is trained."""

    body: Any
    head: Tensor
    weights: Sequence[Tensor]
    tree: Tree
    laws: Laws
    inputs: Inputs | None = None
    start: list[Tensor] = field(default_factory=list)
    copy: Callable[[], None] = lambda: None
    """Called when the weights have changed, where a model has them in another precision."""

    def __post_init__(self) -> None:
        self.start[:] = [each.detach().clone() for each in self.weights]

    @torch.no_grad()
    def set_weights(self, values: Sequence[Tensor], factor: float = 1.0) -> None:
        """Set the weights to the start and so many times the difference to it."""
        for weight, first, value in zip(self.weights, self.start, values, strict=True):
            weight.copy_(first + factor * (value - first))
        self.copy()

    def log_ratios(self) -> Array:
        """Compute the log-ratios of all completions."""
        return self.tree.law(self.body, self.head, self.inputs) - self.laws.log_reference


@dataclass(frozen=True, eq=False)
class Batch:
    """All rollouts, as the loss takes them."""

    path: Path
    reference: Tensor
    omega: Tensor
    train: Tensor
    check: Tensor

    @classmethod
    def of(cls, policy: Policy, drawn: Any, targets: Array, train: Array, check: Array) -> Batch:
        """Take distinct completions with their targets, and their shares among rollouts, which are divided by P."""
        prompts = len(policy.laws.reference)
        reference = policy.laws.log_reference.ravel()[drawn]
        omega = np.minimum(np.exp(targets), MOST_OMEGA)
        own = (torch.from_numpy(each).float() for each in (reference, omega, train / prompts, check / prompts))
        return cls(policy.tree.path(drawn), *own)

    @classmethod
    def from_rollouts(cls, policy: Policy, rollouts: Rollouts, arm: str, kl: float) -> Batch:
        """Take K rollouts of each prompt."""
        targets = rollouts.targets(policy.laws, arm, kl)
        parts = (rollouts.weights(each) for each in (rollouts.train, rollouts.check))
        return cls.of(policy, rollouts.drawn, targets, *parts)

    @classmethod
    def from_law(cls, policy: Policy, arm: str, kl: float) -> Batch:
        """Take infinitely many rollouts: the law itself, which also tells when to stop."""
        targets = policy.laws.targets(arm, kl).log_ratios.ravel()
        law = policy.laws.reference.ravel()
        return cls.of(policy, np.arange(len(law)), targets, law, law)

    def log_ratios(self, policy: Policy) -> Tensor:
        """Compute the log-ratios, with gradients."""
        return policy.tree.log_probs(policy.body, policy.head, self.path, policy.inputs) - self.reference

    def loss(self, log_ratios: Tensor, shares: Tensor) -> Tensor:
        """Compute the mean of e^d - omega d, whose gradient is clamped where e^d is large."""
        ratio = log_ratios.exp()
        bounded = torch.where(log_ratios.detach() > np.log(MOST_RATIO), MOST_RATIO * log_ratios, ratio)
        return (shares * (bounded - self.omega * log_ratios)).sum()

    def accumulate_gradient(self, policy: Policy) -> tuple[float, float]:
        """Add the gradient of the training loss to the weights'; return both losses."""
        d = self.log_ratios(policy)
        loss = self.loss(d, self.train)
        torch.autograd.backward(loss)
        with torch.no_grad():
            return float(loss.detach()), float(self.loss(d.detach(), self.check))


def train(policy: Policy, batch: Batch, settings: Settings, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    """Train from the reference on; return the weights with the least held-out loss, and the losses by step."""
    torch.manual_seed(seed)
    policy.set_weights(policy.start)
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            list(policy.weights), lr=settings.rate, momentum=settings.momentum
        )
    else:
        optimizer = torch.optim.Adam(list(policy.weights), lr=settings.rate, betas=(0.9, 0.99))
    began, losses = time.process_time(), []
    best, kept, at = np.inf, list(policy.start), 0
    for step in range(settings.steps + 1):
        optimizer.zero_grad()
        losses.append(batch.accumulate_gradient(policy))
        if losses[-1][1] < best:
            best, at = losses[-1][1], step
            kept = [each.detach().clone() for each in policy.weights]
        if step - at > settings.patience or not np.isfinite(losses[-1][0]):
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min((step + 1) / 5, 1.0, 0.1 + 0.9 * (1 - step / settings.steps))
        torch.nn.utils.clip_grad_norm_(list(policy.weights), 4.0)
        optimizer.step()
        policy.copy()
    about = {"steps": len(losses) - 1, "kept": at, "seconds": round(time.process_time() - began, 1)}
    about |= {"losses": [[round(x, 5) for x in pair] for pair in losses[:: max(1, len(losses) // 20)]]}
    policy.set_weights(kept)
    return kept, about


def measure(policy: Policy, trained: Sequence[Tensor], arm: str, kls: Sequence[float] = KLS) -> dict[str, Any]:
    """Measure a trained policy exactly: as it is, and on its line at each KL that the line reaches."""
    policy.set_weights(trained)
    d = policy.log_ratios()
    own = policy.laws.point(1.0, d)
    found: dict[str, Any] = {"own": summarise(policy, own, d, arm), "at": {}}
    for kl in kls:
        factor, _ = find_factor(lambda x: _kl_at(policy, trained, x), kl, float(own.kl.mean()))
        points = [_point_at(policy, trained, x * factor) for x in (0.97, 1.03)]
        low, high = (float(each[0].kl.mean()) for each in points)
        if not low < kl < high:
            continue
        # The win rates are nearly straight lines between two KLs that are this near.
        t = (kl - low) / (high - low)
        policy.set_weights(trained, factor * (0.97 + 0.06 * t))
        d = policy.log_ratios()
        found["at"][str(kl)] = summarise(policy, policy.laws.point(factor * (0.97 + 0.06 * t), d), d, arm, kl)
    policy.set_weights(policy.start)
    return found


def _kl_at(policy: Policy, trained: Sequence[Tensor], factor: float) -> float:
    return float(_point_at(policy, trained, factor)[0].kl.mean())


def _point_at(policy: Policy, trained: Sequence[Tensor], factor: float) -> tuple[Point, Array]:
    policy.set_weights(trained, factor)
    d = policy.log_ratios()
    return policy.laws.point(factor, d), d


def summarise(policy: Policy, point: Point, log_ratios: Array, arm: str, kl: float = 0.5) -> dict[str, Any]:
    """Summarise a policy: KL, win rates of each prompt, correlation with the exact target, deciles."""
    targets = policy.laws.targets(arm, kl).log_ratios
    return {
        **point.to_json(),
        "correlation": float(policy.laws.correlate(log_ratios, targets).mean()),
        "deciles": policy.laws.density_ratios(log_ratios),
    }


@contextmanager
def at_weights(policy: Policy, values: Sequence[Tensor], factor: float = 1.0) -> Iterator[None]:
    """Set the weights for a while."""
    policy.set_weights(values, factor)
    try:
        yield
    finally:
        policy.set_weights(policy.start)


def compute_gradient(policy: Policy, batch: Batch) -> Tensor:
    """Compute the gradient of the training loss by all weights, as one vector."""
    for weight in policy.weights:
        weight.grad = None
    batch.accumulate_gradient(policy)
    vector = torch.cat([w.grad.ravel() if w.grad is not None else torch.zeros(w.numel()) for w in policy.weights])
    for weight in policy.weights:
        weight.grad = None
    return vector
