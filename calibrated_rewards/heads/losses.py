"""Losses of a preference head on pairs, alone and beside cDPO and SFT, and decay towards the initial weights.

With scores r_w of the chosen and r_l of the rejected completion, label smoothing eps and s the logistic function:

    separable    -(1-eps) ln s(r_w) - eps ln s(-r_w) - (1-eps) ln s(-r_l) - eps ln s(r_l)
    contrastive  -(1-eps) ln s(r_w - r_l) - eps ln s(r_l - r_w)        eps = 0: Bradley-Terry, a reward model's loss
    cDPO         the contrastive loss of beta (d_w - d_l), d = log pi(y|x) - log pi_ref(y|x) summed over tokens

The separable loss is least at r_w = -r_l = ln((1-eps)/eps), the contrastive one at that margin, and cDPO where
beta (d_w - d_l) is that margin; with eps = 0 there is no least. Joint weights are 1, as in the paper.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from calibrated_rewards.files import Message, setting

KINDS = ("separable", "contrastive")


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 0.5:
        number = setting("smoothing", str(smoothing))
        raise ValueError(Message(f"label smoothing is the share of wrong labels, 0 <= eps < 0.5, got {number}"))


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a head's scores on pairs, with label smoothing and penalties on the scores."""

    kind: str = "separable"
    """separable pushes chosen up and rejected down; contrastive looks at their difference alone."""
    smoothing: float = 0.1
    """eps: the share of pairs that are taken to be labelled the wrong way round."""
    penalty: float = 0.0
    """The weight of r_w^2 + r_l^2."""
    centring: float = 0.0
    """The weight of (r_w + r_l)^2, TRL's `center_rewards_coefficient`: fixes what the contrastive loss leaves open."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(Message(f"a head's loss is {' or '.join(KINDS)}, got {setting('kind', self.kind)}"))
        _check_smoothing(self.smoothing)
        for name in ("penalty", "centring"):
            if not getattr(self, name) >= 0:
                raise ValueError(Message(f"a loss needs {name} >= 0, got {setting(name, str(getattr(self, name)))}"))

    def __call__(self, chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Return the loss of each pair."""
        if self.kind == "separable":
            loss = smoothed(chosen, self.smoothing) + smoothed(-rejected, self.smoothing)
        else:
            loss = smoothed(chosen - rejected, self.smoothing)
        if self.penalty:
            loss = loss + self.penalty * (chosen.square() + rejected.square())
        if self.centring:
            loss = loss + self.centring * (chosen + rejected).square()
        return loss

    def optimum(self) -> tuple[float, float]:
        """Return the scores of chosen and rejected at which a pair's loss is least, by symmetry r and -r.

        >>> HeadLoss("separable", 0.1).optimum(), HeadLoss("contrastive", 0.1).optimum()
        ((2.197..., -2.197...), (1.098..., -1.098...))
        """
        scale = 1 if self.kind == "separable" else 2
        if self.penalty == 0:
            root = log_odds(self.smoothing) / scale
            return root, -root
        # At r and -r the derivative in r is `slope`, for both kinds, and it rises in r.
        low, high = 0.0, 1 / self.penalty
        for _ in range(200):
            middle = (low + high) / 2
            slope = 2 / (1 + math.exp(-scale * middle)) - 2 * (1 - self.smoothing) + 4 * self.penalty * middle
            low, high = (middle, high) if slope < 0 else (low, middle)
        return low, -low


@dataclass(frozen=True)
class ConservativeDPO:
    """cDPO: DPO with label smoothing, on log-probabilities that are summed over the completion's tokens."""

    beta: float = 0.1
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        _check_smoothing(self.smoothing)
        if not self.beta > 0:
            raise ValueError(Message(f"cDPO needs beta > 0, got {setting('beta', str(self.beta))}"))

    def __call__(self, chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Return the loss of each pair from its log-ratios log pi(y|x) - log pi_ref(y|x)."""
        return smoothed(self.beta * (chosen - rejected), self.smoothing)

    def optimum(self) -> float:
        """Return the difference of log-ratios at which a pair's loss is least."""
        return log_odds(self.smoothing) / self.beta


@dataclass(frozen=True)
class JointLoss:
    """A head's loss, and beside it cDPO and the chosen completions' negative log-likelihood (SFT), with weights."""

    head: HeadLoss = HeadLoss()  # frozen
    dpo: ConservativeDPO = ConservativeDPO()  # frozen
    head_weight: float = 1.0
    dpo_weight: float = 0.0
    """1 in the paper's joint training; 0 trains the head alone."""
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("head_weight", "dpo_weight", "sft_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(Message(f"a loss needs {name} >= 0, got {setting(name, str(getattr(self, name)))}"))

    @property
    def needs_log_probabilities(self) -> bool:
        """True where the loss reads the model's log-probabilities too."""
        return self.dpo_weight > 0 or self.sft_weight > 0

    def __call__(
        self,
        scores: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
        log_ratios: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]] | None = None,
        nll: Float[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss of a batch and its parts, from scores, log-ratios and `sft_loss`, chosen and rejected."""
        parts = {"loss/head": self.head(*scores).mean()}
        total = self.head_weight * parts["loss/head"]
        if self.dpo_weight:
            if log_ratios is None:
                raise ValueError("cDPO needs the log-ratios of the completions, got none")
            parts["loss/dpo"] = self.dpo(*log_ratios).mean()
            total = total + self.dpo_weight * parts["loss/dpo"]
        if self.sft_weight:
            if nll is None:
                raise ValueError("SFT needs the log-likelihood of the chosen completions, got none")
            parts["loss/sft"] = nll
            total = total + self.sft_weight * nll
        return total, {name: part.detach() for name, part in parts.items()}


def smoothed(margin: Float[Tensor, "*n"], smoothing: float) -> Float[Tensor, "*n"]:
    """Compute -(1-eps) ln s(m) - eps ln s(-m): the cross-entropy of a label that is right with probability 1 - eps."""
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def sft_loss(logprobs: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]) -> Float[Tensor, ""]:
    """Average the negative log-likelihood over the tokens of a batch that the mask has."""
    return -(logprobs * mask).sum() / mask.sum().clamp(min=1)


def log_odds(smoothing: float) -> float:
    """Return ln((1-eps)/eps), infinite for eps = 0.

    >>> round(log_odds(0.1), 3)
    2.197
    """
    return math.inf if smoothing == 0 else math.log((1 - smoothing) / smoothing)


class PriorDecay:
    """Decay towards the initial weights, decoupled from the gradient: theta <- theta - lr lambda (theta - theta_0).

    It is AdamW's weight decay with theta_0 in the place of 0, for any optimiser of torch: lambda is what a parameter
    group has as `prior_decay`, lr what the scheduler says. theta_0 is a copy of the weights as they are now.

        decay = PriorDecay(backbone)
        optimizer = torch.optim.AdamW([{"params": backbone, "prior_decay": 0.1, "weight_decay": 0.0}, ...])
        decay.register(optimizer)
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.start = {weight: weight.detach().clone() for weight in weights}

    def register(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the rule before each step of an optimiser; ValueError if it decays weights without a start."""
        decayed = [weight for group in optimizer.param_groups if group.get("prior_decay") for weight in group["params"]]
        if not all(weight in self.start for weight in decayed):
            raise ValueError("weights that decay towards their start are noted first: PriorDecay(weights)")
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: Any, args: Any = (), options: Any = None) -> None:
        """Move the weights that have a gradient towards their start."""
        for group in optimizer.param_groups:
            share = group["lr"] * group.get("prior_decay", 0.0)
            for weight in group["params"] if share else ():
                if weight.grad is not None:
                    weight.lerp_(self.start[weight].to(weight.device), share)
