"""A cache with room: what DynamicLayer holds, however it grows and whichever rows are kept. Other tokens behind it."""

import pytest
import torch
from architectures import DECODERS
from hypothesis import given, strategies as st
from tiny import causal
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from calibrated_rewards.samplers.generation import Reader, Roomy, add_room, bytes_of, has_room

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


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("lengths", [(20, 20), (20, 13)], ids=["equal", "padded"])
def test_other_tokens_are_read_as_in_a_row_of_their_own(name: str, lengths: tuple[int, int]) -> None:
    """Behind any part of some rows, of any lengths; and the rows go on as if nothing else had been read."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DECODERS[name].config()).eval()
    reader, draw = Reader(model), torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 90, (n,), generator=draw).tolist() for n in (*lengths, 6, 3, 1, 6)]
    prompts, others = ids[:2], ids[2:]
    with torch.no_grad():
        rows = reader.open(prompts, [0, 1, 1])
        if not reader.can_read_others(rows):
            assert name not in {"Llama", "Qwen2", "Qwen3", "Gemma", "Phi3", "GPT2", "GPTNeoX", "Qwen3Moe"}
            return
        fed = torch.randint(5, 90, (2, 3, 1), generator=draw)
        rows = reader.next(rows, fed[0])
        whole = [prompts[of] + [int(token)] for of, token in zip((0, 1, 1), fed[0], strict=True)]
        at, kept = [2, 0, 2, 1], [14, 7, 3, 12]
        states = reader.read_others(rows, at, kept, others)
        for row, n, own, state in zip(at, kept, others, states, strict=True):
            alone = model(input_ids=torch.tensor([whole[row][:n] + own]), output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(state, alone[0, -1], atol=1e-5, rtol=1e-4)
        rows = reader.next(rows, fed[1])
        for row, token, logits in zip(whole, fed[1], rows.logits, strict=True):
            alone = model(input_ids=torch.tensor([[*row, int(token)]])).logits[0, -1]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
