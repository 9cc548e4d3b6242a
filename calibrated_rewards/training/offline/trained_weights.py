"""The weights that a run trains: which they are, their checkpoints, and a factor on their difference to the start.

Every factor alpha is a policy, with the weights start + alpha (trained - start): 0 is the reference, 1 the trained one,
and its KL rises with alpha. `find_factor` finds the alpha of a KL.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibrated_rewards.files import write_file
from calibrated_rewards.training.loop import make_head_contiguous, prepare_model
from calibrated_rewards.training.offline.frozen_layers import freeze_lower_layers
from calibrated_rewards.training.run_folder import LAST_WRITTEN, RunFolder

HALVES = (torch.bfloat16, torch.float16)
# The KL of a factor is near enough to the one asked for, as a part of it.
NEAR = 0.02
# Beyond so many times the trained difference, a KL says little: more steps are what is missing.
LARGEST_FACTOR = 2.0
MOST_TRIALS = 16


def select_weights(model: Any, layers: int, rank: int, lora_layers: int) -> Any:
    """Choose what is trained: LoRA adapters, the last so many layers with the norm behind them, or all weights."""
    if rank:
        return prepare_model(model, rank, lora_layers)
    make_head_contiguous(model)
    freeze_lower_layers(model, layers)
    return model


@dataclass(eq=False)
class TrainedWeights:
    """The weights that are trained, as they were at the start and as they are; of a model in 16 bits, in float32.

    A step of a weight in 16 bits is mostly rounded away. So copies in float32 are trained, and the model has them
    rounded.
    """

    model: Any
    masters: dict[str, Tensor]
    """What is trained: the model's own weights, or their copies in float32."""
    start: dict[str, Tensor]
    """A copy; of LoRA none is needed, whose adapters begin with a difference of 0."""

    @classmethod
    def of(cls, model: Any, keep_start: bool = True) -> "TrainedWeights":
        """Take the weights of a model that is not trained yet; its start is needed to scale the difference to it."""
        masters = {
            name: weight.detach().float().requires_grad_() if weight.dtype in HALVES else weight
            for name, weight in named_trainable(model)
        }
        kept = keep_start and not is_adapter(model)
        return cls(model, masters, {name: each.detach().clone() for name, each in masters.items()} if kept else {})

    def collect_gradients(self) -> None:
        """Move the model's gradients to the weights in float32, where there are such."""
        for name, weight in named_trainable(self.model):
            if weight is not self.masters[name]:
                self.masters[name].grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None

    def check(self) -> None:
        """Raise FloatingPointError unless all are finite numbers."""
        if not all(bool(weight.isfinite().all()) for weight in self.masters.values()):
            raise FloatingPointError("trained weights are finite numbers, got others: a smaller --lr")

    @torch.no_grad()
    def publish(self) -> None:
        """Round the weights in float32 into the model."""
        for name, weight in named_trainable(self.model):
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the difference to the start."""
        for name, weight in self.masters.items():
            if self.start:
                # Rounded once, in the dtype of the weight.
                before = self.start[name].double()
                weight.copy_(before + factor * (weight.double() - before))
            elif "lora_B" in name or "lora_embedding_B" in name:
                weight.mul_(factor)
        self.publish()

    @torch.no_grad()
    def widen(self) -> None:
        """Turn a model in 16 bits into float32, with the weights as they were trained: for saving."""
        if any(weight is not self.masters[name] for name, weight in named_trainable(self.model)):
            self.model.float()
            for name, weight in named_trainable(self.model):
                weight.copy_(self.masters[name])


def is_adapter(model: Any) -> bool:
    """Tell if a model has LoRA adapters."""
    return hasattr(model, "peft_config")


def named_trainable(model: Any) -> list[tuple[str, Tensor]]:
    """List the weights that are trained, by name."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def find_factor(measure: Callable[[float], float], target: float, kl: float) -> tuple[float, float]:
    """Find the factor whose KL is the target, by the KL of factor 1; return it and its KL.

    A KL is nearly a power of the factor, at first the square, which makes the next guess. Where `LARGEST_FACTOR` is not
    enough, that is it. A KL may be infinite, of a policy that is too far away to measure it.

    >>> find_factor(lambda factor: 0.2 * factor**2, 0.05, 0.2)
    (0.5, 0.05)
    """
    low, high, factor, power = 0.0, LARGEST_FACTOR, 1.0, 2.0
    for _ in range(MOST_TRIALS):
        if abs(kl - target) <= NEAR * target or (factor == LARGEST_FACTOR and kl < target):
            break
        low, high = (factor, high) if kl < target else (low, factor)
        guess = min(factor * (target / max(kl, 1e-12)) ** (1 / power), LARGEST_FACTOR)
        guess = factor / 10 if kl == inf else guess
        guess = guess if low < guess < high or guess == high == LARGEST_FACTOR else (low + high) / 2
        before, kl = kl, measure(guess)
        if 0 < kl < inf and 0 < before < inf:
            power = min(max(log(kl / before) / log(guess / factor), 0.5), 8.0)
        factor = guess
    return factor, kl


def build_optimizer(weights: TrainedWeights, kind: str, rate: float, momentum: float) -> torch.optim.Optimizer:
    """Build SGD with momentum or AdamW without decay, for the weights that are trained."""
    trained = list(weights.masters.values())
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=rate, momentum=momentum)
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


def save_checkpoint(folder: RunFolder, step: int, weights: TrainedWeights, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and the optimizer's state after so many steps; older checkpoints are removed."""
    place = folder.checkpoints / f"checkpoint-{step}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    own = {name: each.detach().contiguous() for name, each in weights.masters.items()}
    state = optimizer.state_dict()["state"]
    tensors = {f"{at}.{name}": torch.as_tensor(each) for at, parts in state.items() for name, each in parts.items()}
    try:
        save_file(own, place / "weights.safetensors")
        save_file(tensors, place / "optimizer.safetensors")
    except SafetensorError as error:  # of a full disk
        raise OSError(f"{place} cannot be written: {error}") from error
    # The last file: without it the checkpoint does not count.
    write_file(place / LAST_WRITTEN, json.dumps({"step": step}))
    for each in folder.checkpoints.glob("checkpoint-*"):
        if each != place:
            shutil.rmtree(each)


@torch.no_grad()
def load_checkpoint(place: str, weights: TrainedWeights, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_checkpoint` wrote; return the number of steps that were done."""
    try:
        files = [load_file(Path(place) / name) for name in ("weights.safetensors", "optimizer.safetensors")]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{place} cannot be read ({error}): remove it, and the run begins again") from error
    for name, saved in files[0].items():
        weights.masters[name].copy_(saved)
    weights.publish()
    state: dict[int, dict[str, Tensor]] = {}
    for name, each in files[1].items():
        at, _, key = name.partition(".")
        state.setdefault(int(at), {})[key] = each
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(json.loads((Path(place) / LAST_WRITTEN).read_text())["step"])
