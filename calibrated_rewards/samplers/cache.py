"""A cache of keys and values for many rows: taken from one row or more, and with room for what is yet to come."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

# Room for at least so many tokens more, and for this part of what is there, whenever there is no room left.
ROOM, PART = 32, 4


class Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a layer, in tensors that are longer than they: DynamicLayer copies all for each token."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, layer.is_initialized
        self._space: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the others, and return all."""
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.keys.shape[-2]
        needed = length + key_states.shape[-2]
        if self._space is None or self._space[0].shape[-2] < needed:
            size = needed + max(ROOM, needed // PART)
            self._space = (_longer(self.keys, size), _longer(self.values, size))
        for space, states in zip(self._space, (key_states, value_states), strict=True):
            space[..., length:needed, :] = states
        self.keys, self.values = self._space[0][..., :needed, :], self._space[1][..., :needed, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Some of the rows, in the order given, in tensors of their own."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._space = None


def roomy(cache: Any) -> Any:
    """The cache, with room in the layers that keep all keys and values; others (windows, states) stay as they are."""
    if layers := layers_of(cache):
        layers[:] = [Roomy(layer) if _holds_all(layer) else layer for layer in layers]
    return cache


def layers_of(cache: Any) -> list[Any]:
    """The layers of a decoder's cache; none of what is no cache."""
    if isinstance(cache, EncoderDecoderCache):  # BERT and its kin as decoders: nothing is kept of an encoder
        cache = cache.self_attention_cache
    return cache.layers if isinstance(cache, Cache) else []


def _holds_all(layer: Any) -> bool:
    """Whether it keeps all keys and values; MiniMax has layers of that class which stay empty."""
    return type(layer) is DynamicLayer and layer.is_initialized


def is_roomy(cache: Any) -> bool:
    """Whether every layer keeps all keys and values."""
    layers = layers_of(cache)
    return bool(layers) and all(type(layer) is Roomy for layer in layers)


def choose(cache: Cache, rows: Tensor) -> None:
    """Keep these rows of the cache, in this order; a row may be there many times."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def bytes_of(cache: Any) -> int:
    """How much memory the keys and values take; 0 where that cannot be said."""
    layers = layers_of(cache)
    kept = [tensor for layer in layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept if isinstance(tensor, torch.Tensor))


def _longer(tensor: Tensor, size: int) -> Tensor:
    space = tensor.new_empty((*tensor.shape[:-2], size, tensor.shape[-1]))
    space[..., : tensor.shape[-2], :] = tensor
    return space
