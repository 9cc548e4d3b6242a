"""Log-probabilities of tokens from the last hidden states, without holding the logits of all tokens at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
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
        logprobs = self._score(hidden[mask], targets)
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).sum(1)

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probability of each target, without holding all logits."""
        some = max(1, self.cells // int(self.layer.weight.shape[0]))
        if not torch.is_grad_enabled() or (hidden.requires_grad and not self._is_trained):
            # Less than could be held: what stays in the processor's caches is faster.
            few = max(1, some // 8)
            parts = list(zip(torch.split(hidden, few), torch.split(targets, few), strict=True))
            score: Any = FrozenHead.apply
            return score(hidden, parts, self.compute_logits)  # type: ignore[no-any-return]
        parts = list(zip(torch.split(hidden, some), torch.split(targets, some), strict=True))
        if len(parts) > 1:
            return torch.cat([checkpoint(self._score_part, *part, use_reentrant=False) for part in parts])
        return self._score_part(hidden, targets)

    def _score_part(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.compute_logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

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


class FrozenHead(torch.autograd.Function):
    """Log-probabilities behind a head that is not trained: of each only its gradient by the hidden state is held."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, parts: list[tuple[Tensor, Tensor]], compute: Callable[..., Tensor]) -> Tensor:
        """Compute the values, and their gradients where they are needed, part by part."""
        values, slopes, needed = [], [], ctx.needs_input_grad[0]
        for some, targets in parts:
            leaf = some.detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                logits = compute(leaf)
            work = logits.detach().log_softmax(-1)
            values.append(work.gather(1, targets[:, None])[:, 0])
            if needed:
                # The derivative by a logit is one for the target's, less the probability.
                work.exp_().scatter_add_(1, targets[:, None], -torch.ones_like(work[:, :1]))
                slopes.append(torch.autograd.grad(logits, leaf, work)[0].neg_())
        if needed:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Multiply each gradient by that of its value."""
        (slopes,) = ctx.saved_tensors
        return gradient[:, None].to(slopes.dtype) * slopes, None, None
