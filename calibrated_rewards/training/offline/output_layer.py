"""Log-probabilities of tokens from the last hidden states, without holding the logits of all tokens at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calibrated_rewards.models.parts import lock_of
from calibrated_rewards.models.vocabulary_head import Logits, logits_of, output_layer

# Logits that are held at once in float32: 256 MB.
CELLS = 2**26


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """A causal model's output layer, at a temperature."""

    model: Any
    temperature: float = 1.0
    cells: int = CELLS

    def sum(self, hidden: Tensor, rows: Sequence[list[int]]) -> Tensor:
        """Sum the log-probabilities of each row's tokens, each predicted by the hidden state in its place."""
        mask = torch.arange(hidden.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        mask = mask.to(hidden.device)
        targets = torch.tensor([token for row in rows for token in row], device=hidden.device)
        logprobs = self.score(hidden[mask], torch.arange(len(targets), device=hidden.device), targets)
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).sum(1)

    def score(self, hidden: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probability of each target behind its source, without holding all logits.

        `sources` are numbers of hidden states. The logits of a state that has several targets are computed once.
        """
        some = max(1, self.cells // int(self.layer.weight.shape[0]))
        if not torch.is_grad_enabled() or (hidden.requires_grad and not self._is_trained):
            if torch.is_grad_enabled() and not self._is_plain:
                hidden, sources = hidden[sources], torch.arange(len(sources), device=sources.device)
            # Less than could be held: what stays in the processor's caches is faster.
            score: Any = FrozenHead.apply
            return score(hidden, sources, targets, self, max(1, some // 8))  # type: ignore[no-any-return]
        if len(hidden) <= some:
            return self.score_part(hidden, sources, targets)
        values, order = list[Tensor](), list[Tensor]()
        for part, at, places in split_states(hidden, sources, some):
            values.append(checkpoint(self.score_part, part, places, targets[at], use_reentrant=False))
            order.append(at)
        return values[0].new_zeros(len(targets)).index_copy(0, torch.cat(order), torch.cat(values))

    def score_part(self, hidden: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probability of each target behind its source."""
        logprobs: Tensor = self.compute_logits(hidden).log_softmax(-1)
        return logprobs[sources, targets]

    def compute_slopes(self, hidden: Tensor, sources: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Compute the gradient by the hidden states of a weighted sum of single logits."""
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logits = self.head.of(Chosen(self.layer, sources, targets), leaf).float() / self.temperature
        return torch.autograd.grad(logits, leaf, weights)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits in float32, divided by the temperature."""
        # A slice of a longer row is up to 1000 times slower in 16 bits on a CPU.
        logits = self.head.of(self.layer, hidden.contiguous()).float()
        return logits if self.temperature == 1 else logits / self.temperature

    @cached_property
    def head(self) -> Logits:
        """All that the model does to hidden states to make them logits: scaling, soft caps."""
        return logits_of(self.model, lock_of(self.model))

    @cached_property
    def layer(self) -> Any:
        """The module that turns hidden states into logits."""
        return output_layer(self.model)

    @property
    def _is_trained(self) -> bool:
        return any(weight.requires_grad for weight in self.layer.parameters())

    @property
    def _is_plain(self) -> bool:
        """Tell if the layer is a product with a matrix that is at hand: neither quantised nor offloaded."""
        return type(self.layer) is nn.Linear and self.layer.weight.device.type != "meta"


def split_states(hidden: Tensor, sources: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split hidden states into parts: each with the numbers of the targets behind it, and their sources in it."""
    for start in range(0, len(hidden), most):
        at = ((sources >= start) & (sources < start + most)).nonzero()[:, 0]
        yield hidden[start : start + most], at, sources[at] - start


class Chosen(nn.Module):
    """A linear layer of which one output is computed for each source: that of its target."""

    def __init__(self, layer: nn.Linear, sources: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.layer, self.sources, self.targets = layer, sources, targets

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the outputs, (targets)."""
        targets = self.targets.to(hidden.device)
        weight = self.layer.weight[targets].float()
        outputs = (hidden.float()[self.sources.to(hidden.device)] * weight).sum(1)
        return outputs if self.layer.bias is None else outputs + self.layer.bias[targets]


class FrozenHead(torch.autograd.Function):
    """Log-probabilities behind a head that is not trained: no logits are held, but one gradient for each hidden state.

    It is that of the state's first target; another target's differs from it by that of two single logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, sources: Tensor, targets: Tensor, output: OutputLayer, most: int) -> Tensor:
        """Compute the values, and the gradients where they are needed, part by part."""
        needed = ctx.needs_input_grad[0]
        values, slopes = hidden.new_zeros(len(targets), dtype=torch.float32), []
        # Of a state without targets, any will do.
        first = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        first[sources.flip(0)] = torch.arange(len(sources), device=hidden.device).flip(0)
        for (some, at, places), own in zip(split_states(hidden, sources, most), torch.split(first, most), strict=True):
            leaf = some.detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                logits = output.compute_logits(leaf)
            work = logits.detach().log_softmax(-1)
            values[at] = work[places, targets[at]]
            if needed:
                # The derivative by a logit is one for the target's, less the probability.
                work.exp_().scatter_add_(1, targets[own, None], -torch.ones_like(work[:, :1]))
                slopes.append(torch.autograd.grad(logits, leaf, work)[0].neg_())
        if needed:
            ctx.output = output
            ctx.save_for_backward(hidden, sources, targets, first, torch.cat(slopes))
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Multiply each gradient by that of its value."""
        hidden, sources, targets, first, slopes = ctx.saved_tensors
        total = gradient.new_zeros(len(hidden)).index_add(0, sources, gradient)
        result = total[:, None].to(slopes.dtype) * slopes
        if len(sources) > 1:
            several = (sources.bincount(minlength=len(hidden)) > 1)[sources].nonzero()[:, 0]
            if len(several):
                own = first[sources] == torch.arange(len(sources), device=sources.device)
                weights = gradient - total[sources] * own
                result = result + ctx.output.compute_slopes(
                    hidden, sources[several], targets[several], weights[several]
                )
        return result, None, None, None, None
