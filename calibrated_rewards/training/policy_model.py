"""The model that a run trains, whole or by LoRA adapters, and the reference policy, which stays as it was."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibrated_rewards.files import Message, setting


def resolve_policy(policy: str | os.PathLike[str]) -> str:
    """Make a path absolute, because an adapter names its base by it; an id of the Hub stays."""
    place = os.fspath(policy)
    return os.path.abspath(place) if os.path.exists(place) else place


def prepare_model(model: Any, rank: int, layers: int = 0) -> Any:
    """Return the model itself, to train all weights, or with LoRA adapters of a rank, in float32 whatever it is in."""
    make_head_contiguous(model)
    if rank == 0:
        return model
    from peft import get_peft_model

    with ignore_peft_warning():
        return get_peft_model(model, build_lora_config(model, rank, layers))


def list_trainable(model: Any) -> list[Any]:
    """List the weights that are trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def build_reference(model: Any) -> Any:
    """Fix the model as it is now: a frozen copy, or with a new adapter the model below it, for no further memory."""
    from peft import PeftModel

    return WithoutAdapter(model) if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False)


@dataclass(frozen=True, eq=False)
class WithoutAdapter:
    """The model below an adapter."""

    model: Any

    def __call__(self, **inputs: Any) -> Any:
        """Run the forward pass without the adapter."""
        with self.model.disable_adapter():
            return self.model(**inputs)


def build_lora_config(model: Any, rank: int, layers: int = 0) -> Any:
    """Choose PEFT's settings: all linear layers but the head, alpha twice the rank, and no dropout.

    With `layers`, only the last so many layers: gradients then go no further back. Dropout would make the policy that
    is trained another one than the one that wrote.
    """
    from peft import LoraConfig

    where: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if layers:
        most = model.config.get_text_config().num_hidden_layers
        if layers > most:
            number = setting("lora_layers", str(layers))
            raise ValueError(Message(f"the model has {most} layers to adapt, got {number}"))
        where["layers_to_transform"] = list(range(most - layers, most))
        where["target_modules"] = sorted(list_linear_layers(model))
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **where)


def list_linear_layers(model: Any) -> set[str]:
    """List the last parts of the names of linear layers, without the head's."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers = ((name, module) for name, module in model.named_modules() if module is not head)
    return {name.rpartition(".")[2] for name, module in layers if isinstance(module, torch.nn.Linear | Conv1D)}


@contextmanager
def ignore_peft_warning() -> Iterator[None]:
    """Silence a warning: PEFT and TRL ask models for an attribute by a name that transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def make_head_contiguous(model: Any) -> None:
    """Copy the head's input first, on a CPU in half precision: part of a row takes hundreds of times as long."""
    if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
        model.get_output_embeddings().register_forward_pre_hook(_copy_input)


def _copy_input(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
