"""PEFT's adapters: which are active, what they are set to, and which weights are theirs."""

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from torch import Tensor

# Where an adapter came from, and whether it may be trained.
NOT_OF_THE_SCORES = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}


def active_adapters(model: Any) -> list[str]:
    """The adapters that a forward would go through now; none for a model without, or with adapters disabled."""
    if not hasattr(model, "peft_config"):
        return []
    off = any(getattr(layer, "disable_adapters", False) is True for layer in adapter_layers(model).values())
    names = model.active_adapters  # a property of PEFT's models, a method of those that transformers gave adapters
    return [] if off else list(names() if callable(names) else names)


def adapter_layers(model: Any) -> dict[str, Any]:
    """The layers that hold adapters' weights, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    parts = dict(model.named_modules())
    return {name: part for name, part in parts.items() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)}


def weights_with(model: Any, adapters: set[str]) -> dict[str, Tensor]:
    """The weights of the base and of some adapters, named as if there were no others."""
    others = set(model.peft_config) - adapters
    left_out = {
        f"{name}.{kind}.{other}"
        for name, layer in adapter_layers(model).items()
        for kind in (*layer.adapter_layer_names, *layer.other_param_names)
        for other in others
    }
    kept = [(name, weight) for name, weight in model.state_dict().items() if not left_out & _beginnings(name)]
    return {re.sub(r"\.(base_layer|original_module)\b", "", name): weight for name, weight in kept}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A digest of an adapter's settings: its scale, for one, is in no weight."""
    # A set has no order.
    told = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    kept = {name: value for name, value in told.items() if name not in NOT_OF_THE_SCORES}
    return blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _beginnings(name: str) -> set[str]:
    """ "a.b.c": "a", "a.b" and "a.b.c"."""
    return {name[: dot.start()] for dot in re.finditer(r"\.|$", name)}
