"""A cache with room: what DynamicLayer holds, however it grows and whichever rows are kept."""

import torch
from hypothesis import given, strategies as st
from tiny import causal
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from calibrated_rewards.samplers.generation import Roomy, add_room, bytes_of, has_room

# Grow by so many tokens, or keep these rows.
steps = st.lists(st.one_of(st.integers(1, 60), st.lists(st.integers(0, 1), min_size=2, max_size=3)), max_size=8)


def states(tokens: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, rows, 2, tokens, 3, generator=generator)
    return keys, values


@given(steps)
def test_it_holds_what_transformers_own_layer_holds(does: list[int | list[int]]) -> None:
    """After any growth, and any choice of rows: the same keys and values, and the same lengths."""
    generator, rows = torch.Generator().manual_seed(0), 2
    plain, cache = DynamicLayer(), DynamicCache()
    first = states(3, rows, generator)
    plain.update(*first)
    cache.update(*first, 0)
    cache = add_room(cache)
    for step in does:
        if isinstance(step, list):
            plain.reorder_cache(torch.tensor(step))
            cache.reorder_cache(torch.tensor(step))
            rows = len(step)
            continue
        new = states(step, rows, generator)
        for a, b in zip(plain.update(*new), cache.update(*new, 0), strict=True):
            assert torch.equal(a, b)
    assert isinstance(layer := cache.layers[0], Roomy)
    assert torch.equal(layer.keys, plain.keys)
    assert torch.equal(layer.values, plain.values)
    assert layer.get_mask_sizes(2) == plain.get_mask_sizes(2)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert bytes_of(cache) == 2 * 4 * plain.keys.numel()


def test_a_token_more_is_written_where_there_is_room() -> None:
    """Not copied with all the others: the tensors lie where they lay."""
    cache, generator = DynamicCache(), torch.Generator().manual_seed(0)
    cache.update(*states(3, 2, generator), 0)
    cache = add_room(cache)
    cache.update(*states(1, 2, generator), 0)
    at = cache.layers[0].keys.data_ptr()
    for _ in range(20):
        cache.update(*states(1, 2, generator), 0)

    assert cache.layers[0].keys.data_ptr() == at
    assert cache.get_seq_length() == 24


def test_windows_stay_windows() -> None:
    """Only layers that keep everything get room; of the rest, and of what is no cache, nothing changes."""
    model = causal()
    cache = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    cache.layers[1] = DynamicSlidingWindowLayer(4)

    assert [type(layer) for layer in add_room(cache).layers] == [Roomy, DynamicSlidingWindowLayer]
    assert not has_room(cache)
    assert has_room(add_room(model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values))
    assert add_room(None) is None
    assert bytes_of("state") == 0
