"""The model that a recipe trains, whole or by LoRA, and the reference, which stays as it was."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibrated_rewards.files import Message, setting as given


def place_of(policy: str | os.PathLike[str]) -> str:
    """A path, absolute because an adapter says where its base is, or an id of the Hub."""
    place = os.fspath(policy)
    return os.path.abspath(place) if os.path.exists(place) else place


def lora(model: Any, rank: int, layers: int = 0) -> Any:
    """PEFT's settings: all linear layers but the head, alpha twice the rank, and no dropout.

    Of the last `layers` layers only, if there are any to be named: gradients then go no further back than those.
    Dropout would make of the policy that is trained another one than the one that wrote.
    """
    from peft import LoraConfig

    where: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if layers:
        most = model.config.get_text_config().num_hidden_layers
        if layers > most:
            raise ValueError(Message(f"the model has {most} layers to adapt, got {given('lora_layers', str(layers))}"))
        where["layers_to_transform"] = list(range(most - layers, most))
        where["target_modules"] = sorted(linear_names(model))
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **where)


def linear_names(model: Any) -> set[str]:
    """The last words of the names of linear layers, but for the head's."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = ((name, own) for name, own in model.named_modules() if own is not head)
    return {name.rpartition(".")[2] for name, own in found if isinstance(own, torch.nn.Linear | Conv1D)}


def trainable(model: Any, rank: int, layers: int = 0) -> Any:
    """The model itself, of which all weights are trained; or with adapters of a rank, in float32 whatever it is in."""
    contiguous_head(model)
    if rank == 0:
        return model
    from peft import get_peft_model

    with quiet():
        return get_peft_model(model, lora(model, rank, layers))


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and TRL ask models by a name that transformers is about to drop, which is nobody's business here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def contiguous_head(model: Any) -> None:
    """On a CPU and in half precision, a head that is given part of a row is hundreds of times slower: copy it first."""
    if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)


def _contiguous(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[0].contiguous(), *given[1:])


@dataclass(frozen=True, eq=False)
class WithoutAdapter:
    """What a model with an adapter is without: the reference, for no further memory."""

    model: Any

    def __call__(self, **given: Any) -> Any:
        """The forward pass of the model below."""
        with self.model.disable_adapter():
            return self.model(**given)


def reference_of(model: Any) -> Any:
    """The model as it is now, for ever: a copy, or below a new adapter itself."""
    from peft import PeftModel

    return WithoutAdapter(model) if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False)
