"""Losses of offline training: what a policy's log-ratios should be on rollouts whose rewards are known.

For a rollout, d = log pi(y) - log pi_ref(y), summed over its tokens, and omega = e^{Phi / beta} / Z is the density
ratio of the optimum pi* = pi_ref omega. A loss takes the d of a prompt's K rollouts with `LossInputs`, and returns a
scalar; with leading axes, one for each prompt. Squares are halved, so that near the reference the gradient of
`ControlVariate` and of `Regression` is the same (d - log omega) / K, and `Centred` has it without its mean.

| name | minimised by | of |
|---|---|---|
| weighted, control-variate, regression, centred, pairs | pi* | any transform and beta |
| ipo:2 | pi* of the identity, whatever the transform | beta |
| ipo, bonbon, top-1 | another policy, which goes by n | n, the rollouts that compete: 8 in ipo:8 |

>>> rewards = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
>>> inputs = LossInputs.from_rewards(rewards, beta=0.5)
>>> [round(float(loss(inputs.targets, inputs)), 9) for loss in (WeightedLikelihood(), ControlVariate(), Centred())]
[0.0, 0.0, 0.0]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int

LOSS_NAMES = (
    "weighted, control-variate, regression, regression:exact, centred, pairs, ipo, bonbon or top-1; "
    "the last three with a number of rollouts that compete, such as ipo:2 or top-1:8, else all of a prompt compete"
)


@dataclass(frozen=True, eq=False)
class LossInputs:
    """What is known of the rollouts of a prompt, or of several prompts with as many each.

    The rollouts may be a part of a prompt's K: `log_z` is that of all K then.
    """

    rewards: Float[torch.Tensor, "*P K"]
    """Phi of each rollout."""
    beta: float
    log_z: Float[torch.Tensor, "*P"] | float
    """The prompt's own partition, log (1/K) sum_j e^{Phi_j / beta}: right with ties as well."""
    tokens: Int[torch.Tensor, "*P K"] | None = None
    """The number of tokens of each rollout; no loss of this file reads it."""
    logprobs: Float[torch.Tensor, "*P K"] | None = None
    """log pi_ref of each rollout, summed over its tokens; no loss of this file reads it."""
    exact_log_z: Float[torch.Tensor, "*P"] | float | None = None
    """`theory.finite_k.log_partition`: the mean of Z over references, for scores that do not tie."""

    def __post_init__(self) -> None:
        if not (isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"LossInputs needs a finite beta > 0, got beta={self.beta!r}.")

    @classmethod
    def from_rewards(
        cls,
        rewards: Float[torch.Tensor, "*P K"],
        beta: float,
        tokens: Int[torch.Tensor, "*P K"] | None = None,
        logprobs: Float[torch.Tensor, "*P K"] | None = None,
        exact_log_z: Float[torch.Tensor, "*P"] | float | None = None,
    ) -> "LossInputs":
        """Compute log Z from the rewards of all rollouts of each prompt."""
        log_z = torch.logsumexp(rewards / beta, -1) - log(rewards.shape[-1])
        return cls(rewards, beta, log_z, tokens, logprobs, exact_log_z)

    @property
    def targets(self) -> Float[torch.Tensor, "*P K"]:
        """The log-ratios of the optimum, log omega = Phi / beta - log Z."""
        return self.compute_targets(self.log_z)

    @property
    def weights(self) -> Float[torch.Tensor, "*P K"]:
        """The optimum's share of each rollout, omega / K: softmax(Phi / beta) if all rollouts of a prompt are here."""
        return self.targets.exp() / self.rewards.shape[-1]

    def compute_targets(self, log_z: Float[torch.Tensor, "*P"] | float) -> Float[torch.Tensor, "*P K"]:
        """Return Phi / beta - log Z for a given partition."""
        own = torch.as_tensor(log_z, dtype=self.rewards.dtype, device=self.rewards.device)
        return self.rewards / self.beta - own[..., None]


@runtime_checkable
class Loss(Protocol):
    """A loss of the log-ratios of a prompt's rollouts, with their rewards: a scalar, or one for each prompt."""

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the loss, with its gradient for the log-ratios."""


@dataclass(frozen=True)
class WeightedLikelihood:
    """Weighted maximum likelihood, the mean of omega (log omega - d): an estimate of KL(pi* || pi).

    Reward-weighted regression (Peters and Schaal 2007; Peng et al. 2019, arXiv 1910.00177, Eq. 7), with the prompt's
    own weights. Optimum: pi* as K grows. With finite K it is the weighted sample itself, so completions that were not
    drawn lose all their probability.
    """

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over rollouts."""
        targets = inputs.targets
        return (targets.exp() * (targets - log_ratios)).mean(-1)


@dataclass(frozen=True)
class ControlVariate:
    """Weighted maximum likelihood with its control variate, whose gradient is the mean of (e^d - omega) grad d.

    E[e^d grad d] is 0 under pi_ref, and its estimate on the same rollouts takes away the noise that weighted likelihood
    fits: at d = log omega the gradient of each rollout is 0. The value is the generalised Kullback-Leibler divergence
    omega (log omega - d) - omega + e^d, which is >= 0 (Csiszar 1991; e^d and omega as unnormalised densities).
    Optimum: pi*, where nothing is clamped. omega is clamped at `most_omega`, which moves the optimum to
    pi_ref min(omega, most_omega), normalised; e^d is clamped in the gradient at `most_ratio`, which bounds the step of
    a rollout that has become far too likely, and moves nothing while the optimum stays below it. `inf` clamps nothing.
    """

    most_ratio: float = 10.0
    most_omega: float = 8.0

    def __post_init__(self) -> None:
        if not (0 < self.most_omega < self.most_ratio or self.most_ratio == self.most_omega == inf):
            raise ValueError(
                "ControlVariate needs 0 < most_omega < most_ratio, since a target above the largest ratio is never "
                f"reached, got most_omega={self.most_omega!r} and most_ratio={self.most_ratio!r}."
            )

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over rollouts; beyond the clamp e^d goes on as a line of the same slope."""
        targets, end = inputs.targets.clamp(max=log(self.most_omega)), log(self.most_ratio)
        ratios = log_ratios.clamp(max=end).exp() * (1 + (log_ratios - end).clamp(min=0))
        return (targets.exp() * (targets - log_ratios - 1) + ratios).mean(-1)


@dataclass(frozen=True)
class Regression:
    """Regression to the optimum's log-ratio, the mean of (d - Phi / beta + log Z)^2 / 2.

    QRPO (Matrenok et al. 2025, arXiv 2507.08068): its loss (Phi - beta log Z - beta d)^2 is this times 2 beta^2.
    Optimum: pi*, for rollouts of any law that has full support. `partition` is the prompt's own Z, or the exact mean of
    Z over references, which is off for each prompt by O(1 / sqrt K), and by more where scores tie.
    """

    partition: Literal["own", "exact"] = "own"

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over rollouts."""
        log_z = inputs.log_z if self.partition == "own" else inputs.exact_log_z
        if log_z is None:
            raise ValueError("Regression(partition='exact') needs LossInputs with an exact_log_z, got None.")
        return (log_ratios - inputs.compute_targets(log_z)).square().mean(-1) / 2


@dataclass(frozen=True)
class Centred:
    """Regression within the group of a prompt, the mean of ((d - mean d) - (Phi - mean Phi) / beta)^2 / 2.

    GVPO (Zhang et al. 2025, arXiv 2504.19599): its sum over the group is this times 2 K beta^2. It needs no Z, and a
    constant added to the rewards changes nothing. Optimum: pi*, for rollouts of any law that has full support.
    """

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over rollouts."""
        return (log_ratios - inputs.rewards / inputs.beta).var(-1, correction=0) / 2


@dataclass(frozen=True)
class Pairs:
    """Regression of the gap of every two rollouts of a prompt, the mean of (d_a - d_b - (Phi_a - Phi_b) / beta)^2 / 2.

    REBEL (Gao et al. 2024, arXiv 2404.16767, Eq. 1), whose eta is 1 / beta. Over all pairs of a group it is `Centred`
    times 2 K / (K - 1). Optimum: pi*, for rollouts of any law that has full support.
    """

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over pairs; 0 for a single rollout."""
        pairs = torch.combinations(torch.arange(log_ratios.shape[-1], device=log_ratios.device))
        gaps, reward_gaps = (each[..., pairs[:, 0]] - each[..., pairs[:, 1]] for each in (log_ratios, inputs.rewards))
        return regress_gaps(gaps, reward_gaps / inputs.beta).sum(-1) / max(1, len(pairs))


@dataclass(frozen=True)
class IPO:
    """Identity preference optimisation, the mean of (d_best - d_worst - 1 / (2 beta))^2 / 2 over blocks of n rollouts.

    IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17), with log-ratios summed over tokens: TRL's "ipo" averages over
    tokens, which is another objective. A block without a best has the gap 0. Optimum: pi* of the identity for n = 2,
    with the same beta, whatever the transform; for n > 2 another policy, which the pairs' law decides.
    """

    n: int | None = None
    """How many rollouts compete; None for all of a prompt."""

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over blocks."""
        gaps, differ = choose_pairs(log_ratios, inputs.rewards, self.n)
        return regress_gaps(gaps, differ / (2 * inputs.beta)).mean(-1)


@dataclass(frozen=True)
class Top1:
    """Supervised fine-tuning on the best of each block of n rollouts, the mean of -d_best.

    The best that tie share the block. RAFT (Dong et al. 2023, arXiv 2304.06767), best-of-n distillation. Optimum: the
    law of the best of n, which is pi* of Log with beta = 1 / (n - 1) where scores do not tie, whatever the transform
    and beta.
    """

    n: int | None = None
    """How many rollouts compete; None for all of a prompt."""

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over blocks."""
        rewards, own = (split_blocks(each, self.n) for each in (inputs.rewards, log_ratios))
        best = rewards == rewards.amax(-1, keepdim=True)
        return -((own * best).sum(-1) / best.sum(-1)).mean(-1)


@dataclass(frozen=True)
class BoNBoN:
    """Best-of-n alignment, alpha (-d_best) + (1 - alpha) (d_best - d_worst - (n - 1) H_{n-1})^2 over blocks of n.

    BoNBoN (Gui et al. 2024, arXiv 2406.00832): IPO, not halved, whose 1 / (2 beta) is the mean gap of the best-of-n
    policy, (n - 1) H_{n-1}, so beta* = 1 / (2 (n - 1) H_{n-1}), together with `Top1`. Optimum: that of neither
    part, near the law of the best of n, whatever the transform and beta.
    """

    alpha: float = 0.005
    n: int | None = None
    """How many rollouts compete; None for all of a prompt."""

    def __call__(self, log_ratios: Float[torch.Tensor, "*P K"], inputs: LossInputs, /) -> Float[torch.Tensor, "*P"]:
        """Return the mean over blocks."""
        n = self.n or log_ratios.shape[-1]
        gaps, differ = choose_pairs(log_ratios, inputs.rewards, n)
        gap = (n - 1) * sum(1 / i for i in range(1, n))
        squares = 2 * regress_gaps(gaps, gap * differ).mean(-1)
        return self.alpha * Top1(n)(log_ratios, inputs) + (1 - self.alpha) * squares


def regress_gaps(gaps: Float[torch.Tensor, "*n"], targets: Float[torch.Tensor, "*n"]) -> Float[torch.Tensor, "*n"]:
    """Return (d_a - d_b - target)^2 / 2 for pairs of any data set: REBEL, or IPO with the target 1 / (2 beta)."""
    return (gaps - targets).square() / 2


def split_blocks(values: Float[torch.Tensor, "*P K"], n: int | None) -> Float[torch.Tensor, "*P B n"]:
    """Split the rollouts of each prompt into blocks of n, in order, without what is left over."""
    size = values.shape[-1]
    n = size if n is None else n
    if n > size:
        raise ValueError(f"Blocks of n={n} rollouts need at least as many of each prompt, got K={size}.")
    return values[..., : size // n * n].reshape(*values.shape[:-1], size // n, n)


def choose_pairs(
    log_ratios: Float[torch.Tensor, "*P K"], rewards: Float[torch.Tensor, "*P K"], n: int | None
) -> tuple[Float[torch.Tensor, "*P B"], Float[torch.Tensor, "*P B"]]:
    """Return d_best - d_worst of each block of n rollouts, and 1 where their rewards differ, 0 where all tie.

    Of rollouts that tie, the first is the best and the last the worst: they are in random order.
    """
    blocks, own = (split_blocks(each, n) for each in (rewards, log_ratios))
    best = blocks.argmax(-1, keepdim=True)
    worst = blocks.shape[-1] - 1 - blocks.flip(-1).argmin(-1, keepdim=True)
    gaps = own.gather(-1, best) - own.gather(-1, worst)
    return gaps[..., 0], (blocks.gather(-1, best) > blocks.gather(-1, worst))[..., 0].to(gaps)


# With a number after the name, how many rollouts compete.
WITH_NUMBER: dict[str, Callable[[int | None], Loss]] = {
    "ipo": IPO,
    "bonbon": lambda n: BoNBoN(n=n),
    "top-1": Top1,
}
NAMED: dict[str, Loss] = {
    "weighted": WeightedLikelihood(),
    "control-variate": ControlVariate(),
    "regression": Regression(),
    "regression:exact": Regression("exact"),
    "centred": Centred(),
    "pairs": Pairs(),
}


@dataclass(frozen=True, eq=False)
class LogProbabilityLoss:
    """A prompt's part of the mean loss, as a function of the log-probabilities of its completions."""

    loss: Loss
    inputs: LossInputs
    reference: Float[torch.Tensor, " K"]
    prompts: int

    def __call__(self, logprobs: Float[torch.Tensor, " K"]) -> Float[torch.Tensor, ""]:
        """Compute it."""
        return self.loss(logprobs - self.reference, self.inputs) / self.prompts


def parse_loss(name: str) -> Loss:
    """Parse the name of a loss, as the command line has it.

    >>> parse_loss("regression:exact"), parse_loss("ipo"), parse_loss("top-1:8")
    (Regression(partition='exact'), IPO(n=None), Top1(n=8))
    """
    kind, *numbers = name.split(":")
    if name in NAMED:
        return NAMED[name]
    if kind in WITH_NUMBER and not numbers:
        return WITH_NUMBER[kind](None)
    if kind in WITH_NUMBER and len(numbers) == 1 and numbers[0].isdecimal() and int(numbers[0]) > 1:
        return WITH_NUMBER[kind](int(numbers[0]))
    raise argparse.ArgumentTypeError(f"a loss is {LOSS_NAMES}; got {name!r}")
