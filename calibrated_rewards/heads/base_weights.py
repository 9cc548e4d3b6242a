"""Recognise the model that a preference head was trained on by its weights, in whatever precision it is loaded.

A head keeps a digest of many of the weights in bfloat16, which is the same for float32 and bfloat16. A cast to float16
rounds in another way, so a head also keeps a few values of each weight as they were. Two models are the same if the
values of one, rounded to the coarser of both precisions, are those of the other.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrated_rewards.models.fingerprint import weights_digest, weights_with

# Values of each weight that the digest reads, and that are kept as they are.
SAMPLED, KEPT = 256, 8
# Precisions whose values can be compared; a quantised weight's mean nothing without its scales.
PRECISIONS = {
    str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
EXACT_IN_BFLOAT16 = {"float32", "bfloat16"}
# How far apart a number in bfloat16 and in float16 may be: 2^-8 + 2^-11 of it, and half a step near 0.
NEAR, NEAR_ZERO = 0.005, 1e-7


def digest_base(model: Any) -> str:
    """Digest a sample of a model's weights without adapters, in bfloat16: the same for float32 and bfloat16."""
    sampled = {}
    for name, weight in _base_weights(model).items():
        if weight.is_floating_point() and weight.device.type != "meta":
            flat = weight.detach().flatten()
            sampled[name] = flat[:: max(1, len(flat) // SAMPLED)].bfloat16()
    return weights_digest(sampled)


def sample_base(model: Any) -> dict[str, str]:
    """Take a few values of each of a model's weights, without adapters: a precision, and float32 as hexadecimal digits.

    >>> sample_base(torch.nn.LayerNorm(2).half())
    {'weight': 'float16 0000803f0000803f', 'bias': 'float16 0000000000000000'}
    """
    sample = {}
    for name, weight in _base_weights(model).items():
        precision = _precision(weight)
        if precision in PRECISIONS:
            sample[name] = f"{precision} {_pick(weight).numpy().astype('<f4').tobytes().hex()}"
    return sample


def find_other_weight(model: Any, digest: str | None, sample: Mapping[str, str] | None) -> str:
    """Return what of a model is not as `digest_base` and `sample_base` found it, a weight's name; "" for the same."""
    weights, sample = _base_weights(model), sample or {}
    kinds = {name: _precision(weight) for name, weight in weights.items()}
    quantised = getattr(model.config, "quantization_config", None) is not None or any(
        kinds[name] not in PRECISIONS for name in sample if name in kinds
    )
    for name, text in sample.items():
        if name in weights and not _is_same(text, weights[name]):
            return name
    if not quantised:
        names = {name for name, kind in kinds.items() if kind in PRECISIONS}
        if sample and (others := names ^ {*sample}):
            return min(others)
        known = {kind for kind in kinds.values() if kind in PRECISIONS}
        known |= {text.partition(" ")[0] for text in sample.values()}
        if digest and known <= EXACT_IN_BFLOAT16 and digest_base(model) != digest:
            return "a digest of all"
    return ""


def _is_same(text: str, weight: Tensor) -> bool:
    """Tell if values that were kept are those of a weight, as far as both precisions tell; a quantised one may be."""
    precision, _, digits = text.partition(" ")
    if _precision(weight) not in PRECISIONS:
        return True
    then, now = torch.from_numpy(np.frombuffer(bytes.fromhex(digits), "<f4").astype(np.float32)), _pick(weight)
    if len(then) != len(now):
        return False
    kinds = {PRECISIONS[precision], weight.dtype} & {torch.bfloat16, torch.float16}
    if len(kinds) == 2:  # neither holds what the other does
        return torch.allclose(then, now, rtol=NEAR, atol=NEAR_ZERO)
    for kind in kinds:
        then, now = then.to(kind), now.to(kind)
    return torch.equal(then, now)


def _pick(weight: Tensor) -> Tensor:
    """Pick evenly spread values of a weight, in float32 on the CPU."""
    flat = weight.detach().flatten()
    count = min(KEPT, len(flat))
    at = [i * (len(flat) - 1) // max(1, count - 1) for i in range(count)]
    return flat[torch.tensor(at, dtype=torch.long, device=flat.device)].float().cpu()


def _precision(weight: Tensor) -> str:
    """Name the precision of a weight; "meta" for one that is not in memory."""
    return "meta" if weight.device.type == "meta" else str(weight.dtype).removeprefix("torch.")


def _base_weights(model: Any) -> dict[str, Tensor]:
    """Collect the weights of a model without its adapters, named as without PEFT."""
    weights = weights_with(model, set()) if hasattr(model, "peft_config") else model.state_dict()
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
