"""PEFT adapters in a model: where they are, which are active, and one of them, or none, active for a while."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrated_rewards.files import Message, setting


def active_adapters(model: Any) -> list[str]:
    """Name the adapters that a forward would go through now; none for a model without, or with adapters disabled."""
    if not hasattr(model, "peft_config"):
        return []
    off = any(getattr(layer, "disable_adapters", False) is True for layer in adapter_layers(model).values())
    names = model.active_adapters  # a property of PEFT's models, a method of those that transformers gave adapters
    return [] if off else list(names() if callable(names) else names)


def adapter_layers(model: Any) -> dict[str, Any]:
    """Find the layers that hold adapters' weights, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    parts = dict(model.named_modules())
    return {name: part for name, part in parts.items() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)}


@contextmanager
def activate(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Make one adapter alone active meanwhile, and enabled even within `disable_adapter()`; then restore all.

    None is for none of them: the base model, whatever adapters it carries.
    """
    layers = list(adapter_layers(model).values()) if hasattr(model, "peft_config") else []
    merged = sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(
            f"{'the base' if adapter is None else f'adapter {adapter!r}'} needs the base as it was, {merged} is merged "
            "into it: unmerge_adapter() first"
        )
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            # Not through set_adapter(): that also decides which parameters are trained, behind the optimiser's back.
            layer._active_adapter = [adapter] if adapter in layer._get_available_adapters() else []
            layer._disable_adapters = adapter is None
        yield
    finally:
        for layer, names, disabled in before:
            layer._active_adapter, layer._disable_adapters = names, disabled


@contextmanager
def ignore_peft_warning() -> Iterator[None]:
    """Silence a warning: PEFT and TRL ask models for an attribute by a name that transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def list_linear_layers(model: Any) -> list[str]:
    """List the last parts of the names of linear layers, but the output's; the experts of a mixture are none.

    Nor is a router that is a linear layer, as Llama 4's is: it returns two tensors, which PEFT does not expect.
    Of an adapted layer it is the layer itself, not what the adapter adds.
    """
    head, added = model.get_output_embeddings(), tuple(f"{at}." for at in adapter_layers(model))
    parts = ((at, part) for at, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D))
    layers = [at for at, part in parts if part is not head and not type(part).__name__.endswith("Router")]
    own = [at.removesuffix(".base_layer") for at in layers if at.endswith(".base_layer") or not at.startswith(added)]
    return sorted({at.rpartition(".")[2] for at in own})


def build_lora_config(model: Any, rank: int, layers: int = 0) -> Any:
    """Choose PEFT's settings: linear layers but the output and experts, alpha twice the rank, and no dropout.

    With `layers`, only the last so many layers: gradients then go no further back. Dropout would make the policy that
    is trained another one than the one that wrote.
    """
    from peft import LoraConfig

    where: dict[str, Any] = {"target_modules": list_linear_layers(model), "task_type": "CAUSAL_LM"}
    if layers:
        most = model.config.get_text_config().num_hidden_layers
        if layers > most:
            number = setting("lora_layers", str(layers))
            raise ValueError(Message(f"the model has {most} layers to adapt, got {number}"))
        where["layers_to_transform"] = list(range(most - layers, most))
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **where)
