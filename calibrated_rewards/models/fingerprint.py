"""Fingerprint a model and its tokenizer by a few digests, which are the same wherever the files lie.

Of PEFT's adapters only the active ones count, by their weights and their settings.
"""

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.models.adapters import active_adapters, adapter_layers
from calibrated_rewards.models.parts import dtype_of, unwrap

# Settings of an adapter that no score depends on: where it came from, and whether it may be trained.
ADAPTER_PROVENANCE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
# Settings of a config that no score depends on: the file it came from, training, and what the weights tell already.
CONFIG_PROVENANCE = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version", "use_cache"),
}
# Values of each weight that the fingerprint reads: enough to tell any two checkpoints apart, in no time.
SAMPLED = 1024
# Any weight as whole numbers, by its bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Describe a model and its tokenizer: its class, its precision, and digests of what they hold."""
    model = unwrap(model)
    return {
        "model": type(model).__name__,
        "weights": weights_digest(weights_of(model)),
        "adapters": {name: settings_digest(model.peft_config[name].to_dict()) for name in active_adapters(model)},
        "config": config_digest(model.config),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "tokenizer": tokenizer_digest(tokenizer),
    }


def weights_with(model: Any, adapters: set[str]) -> dict[str, Tensor]:
    """Collect the weights of the base and of some adapters, named as if there were no others."""
    others = set(model.peft_config) - adapters
    left_out = {
        f"{name}.{kind}.{other}"
        for name, layer in adapter_layers(model).items()
        for kind in (*layer.adapter_layer_names, *layer.other_param_names)
        for other in others
    }
    rest = [(name, weight) for name, weight in model.state_dict().items() if not left_out & _beginnings(name)]
    return {re.sub(r"\.(base_layer|original_module)\b", "", name): weight for name, weight in rest}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest an adapter's settings: its scale, for one, is in no weight."""
    # A set has no order.
    ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return _json_digest({name: value for name, value in ordered.items() if name not in ADAPTER_PROVENANCE})


def _beginnings(name: str) -> set[str]:
    """List "a", "a.b" and "a.b.c" for "a.b.c"."""
    return {name[: dot.start()] for dot in re.finditer(r"\.|$", name)}


def weights_of(model: Any) -> dict[str, Tensor]:
    """Collect the weights that scores are made of: without those of PEFT adapters that are not active."""
    if hasattr(model, "peft_config"):
        return weights_with(model, set(active_adapters(model)))
    return model.state_dict()  # type: ignore[no-any-return]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest names, shapes, evenly spread values and the sum of all bits: the same on every device.

    The sum is of whole numbers, so that no order of adding changes it, and takes one pass over the memory.
    """
    digest = blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().contiguous().flatten().view(BITS[weight.element_size()])
            values = flat[:: max(1, flat.numel() // SAMPLED)].cpu()
            digest.update(values.contiguous().numpy().tobytes())
            digest.update(str(int(flat.sum(dtype=torch.int64))).encode())
    return digest.hexdigest()


def config_digest(config: Any) -> str:
    """Digest what a config adds to its class's defaults: rotary scaling, windows, padding id, ..."""
    return _json_digest({name: value for name, value in config.to_diff_dict().items() if name not in CONFIG_PROVENANCE})


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest all that a tokenizer does to text: vocabulary, merges, normaliser, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A fast tokenizer remembers how its last call padded and truncated: that is no part of it.
    parts = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    what = {**parts, "padding": None, "truncation": None} if isinstance(parts, dict) else parts
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    splits = bool(getattr(tokenizer, "split_special_tokens", False))
    return blake2b(f"{what} {special}{' split' * splits}".encode(), digest_size=16).hexdigest()


def _json_digest(settings: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
