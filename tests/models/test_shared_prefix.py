"""Decoders behind a shared prefix, and access to a model: the numbers are those of the model's own forward."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import DECODERS, HYBRIDS, Architecture
from memory import Memory
from tiny import PAD, VOCABULARY, causal, classifier, texts, tokenizer
from torch import Tensor, nn
from transformers import DynamicCache

from calibrated_rewards.models.batches import Budget
from calibrated_rewards.models.parts import body_of, lock_of
from calibrated_rewards.models.shared_prefix import (
    Decoder,
    ModelReader,
    ModuleHead,
    Row,
    Sharing,
    common_prefix,
    repeatable,
    repeated,
)
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.implicit import ImplicitReward

PREFIX = tokenizer()("the prompt that all completions have")["input_ids"]
SUFFIXES = tokenizer()(texts(6, seed=4), add_special_tokens=False)["input_ids"]
GROUP = [Row(PREFIX + suffix, [len(PREFIX) + len(suffix) - 1]) for suffix in SUFFIXES]

# As if groups of any length had been compared.
COMPARED: Any = {"checked": True, "prefix": 10**6, "longest": 10**6, "shortest": 0}


def decoder(model: Any, *, body: Any = None, tokens: int = 4096, **options: Any) -> Decoder:
    body = body_of(model) if body is None else body
    return Decoder(
        model, body, options.pop("head", ModuleHead(model.score)), Budget(tokens), show_progress=False, **options
    )


def alone(model: Any, rows: list[Row]) -> Tensor:
    """Body and head by hand, a row at a time: all its positions."""
    with torch.no_grad():
        states = [body_of(model)(input_ids=torch.tensor([row.ids])).last_hidden_state[0, row.read] for row in rows]
        return model.score(torch.cat(states))


def sd_apart(found: list[Tensor], expected: Tensor) -> float:
    return float(((torch.cat(found) - expected).abs() / expected.std(0)).max())


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2", "Bloom"])
def test_several_positions_of_a_row(name: str, shares: bool) -> None:
    """The head reads where it is told to, also in the first token behind the prefix; answers come row by row."""
    model = DECODERS[name].classifier(num_labels=3)
    places = [[len(row.ids) - 1, len(PREFIX), len(row.ids) - 2][: 1 + i % 3] for i, row in enumerate(GROUP)]
    rows = [Row(row.ids, [at for at in read if at >= len(PREFIX)]) for row, read in zip(GROUP, places, strict=True)]
    read = decoder(model, sharing=Sharing(shares))
    found = read(rows, [0] * 6)

    assert [tuple(numbers.shape) for numbers in found] == [(len(row.read), 3) for row in rows]
    assert len({len(row.read) for row in rows}) == 3
    assert sd_apart(found, alone(model, rows)) < 1e-4
    assert read.sharing == Sharing(shares, shares)


def test_positions_within_the_prefix() -> None:
    """What is read before the completions differ limits what is shared, and is right."""
    model = classifier()
    rows = [Row(row.ids, [20, row.read[0]]) for row in GROUP]
    read = decoder(model)

    assert sd_apart(read(rows, [0] * 6), alone(model, rows)) < 1e-4
    assert read._prefix(rows) == 20
    assert read._prefix(GROUP) >= len(PREFIX)


def test_what_follows() -> None:
    """A head is told the token after each position, and -1 at the end, on both routes."""
    seen = Following()
    rows = [Row(row.ids, [row.read[0] - 1, row.read[0]]) for row in GROUP]
    for shares in (True, False):
        found = decoder(classifier(), head=seen, sharing=Sharing(shares, **COMPARED))(rows, [0] * 6)
        assert [numbers[:, 0].tolist() for numbers in found] == [[row.ids[-1], -1] for row in rows]


class Following:
    """A head that answers the token that follows."""

    def __call__(self, hidden: Tensor, following: Tensor, /) -> Tensor:
        """As it is."""
        assert hidden.dtype == torch.float32
        return following[:, None].float()


def test_groups_of_many_kinds() -> None:
    """Groups that share, single rows and rows that begin differently, mixed: each row gets its own numbers."""
    model = classifier()
    other = [Row(row.ids[::-1], [len(row.ids) - 1]) for row in GROUP]
    rows = [row for pair in zip(GROUP, other, strict=True) for row in pair] + [GROUP[0]]
    groups = ["a", "b"] * 6 + ["c"]

    assert sd_apart(decoder(model)(rows, groups), alone(model, rows)) < 1e-4
    assert sd_apart(decoder(model)(rows, [0] * 13), alone(model, rows)) < 1e-4
    assert decoder(model)([], []) == []


def test_the_prefix_is_read_once() -> None:
    """Sharing does what it is for: the body sees the prefix's tokens once, after the first group's check."""
    model = classifier()
    read = decoder(model)
    read(GROUP, [0] * 6)
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(Memory(10**9, sizes))
    read(GROUP, [0] * 6)

    shared = common_prefix([row.ids for row in GROUP])
    assert sizes == [shared, 6 * (max(len(row.ids) for row in GROUP) - shared)]


def test_sharing_that_saves_little() -> None:
    """A prefix of a few tokens before long completions is read with each of them."""
    read = decoder(classifier())

    assert read._prefix([Row([1, 2, *range(4 + i, 60)], [20]) for i in range(6)]) == 0
    assert read._prefix(GROUP[:1]) == 0
    assert decoder(classifier(), sharing=Sharing(False))._prefix(GROUP) == 0


class Forgetful(nn.Module):
    """A body that drops the cache it is given: a bug that only a comparison shows."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **options: Any) -> Any:
        """As if the suffix were all there is."""
        if past_key_values is not None:
            options = {"use_cache": True}
        return self.body(input_ids=input_ids, **options)


def test_a_wrong_cache_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """The first group's check sees it, says so, and all groups take the plain route."""
    model = classifier()
    read = decoder(model, body=Forgetful(model.model))
    found = read(GROUP, [0] * 6)

    assert sd_apart(found, alone(model, GROUP)) < 1e-4
    assert read.sharing == Sharing(allowed=False, checked=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Forgetful gives other numbers" in caplog.text
    assert "not sharing" in caplog.text
    unchecked = decoder(model, body=Forgetful(model.model), sharing=Sharing(**COMPARED))(GROUP, [0] * 6)
    assert sd_apart(unchecked, alone(model, GROUP)) > 0.1


def test_a_cache_that_breaks_it(caplog: pytest.LogCaptureFixture) -> None:
    """A body that raises when it is given a cache is read without one."""
    model = classifier()
    read = decoder(model, body=Broken(model.model))

    assert sd_apart(read(GROUP, [0] * 6), alone(model, GROUP)) < 1e-4
    assert read.sharing == Sharing(allowed=False, checked=True)
    assert "Broken fails behind a shared prefix: not sharing" in caplog.text


class Broken(Forgetful):
    """A body that was written for another kind of cache."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **options: Any) -> Any:
        """As transformers 4.30 did."""
        if past_key_values is not None:
            past_key_values.to_legacy_cache()
        return self.body(input_ids=input_ids, **options)


def test_a_decoder_that_looks_ahead(caplog: pytest.LogCaptureFixture) -> None:
    """Bidirectional attention makes a prefix's states depend on what follows: found out as well."""
    options = {**DECODERS["Gemma3"].options, "use_bidirectional_attention": True}
    model = Architecture("Gemma3Text", options).classifier()
    read = decoder(model)

    assert sd_apart(read(GROUP, [0] * 6), alone(model, GROUP)) < 1e-4
    assert not read.sharing.allowed
    assert "not sharing" in caplog.text


def test_completions_that_are_all_the_same() -> None:
    """A first group without any spread does not turn sharing off; nor one whose completions differ in a token."""
    for rows in ([GROUP[0]] * 6, [Row([*GROUP[0].ids, i], [len(GROUP[0].ids)]) for i in (50, 50, 50, 50, 50, 51)]):
        model = classifier(hidden_size=128)
        read = decoder(model)
        read(rows, [0] * 6)
        assert read.sharing == Sharing(allowed=True, checked=True)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX", "OPT"])
def test_bfloat16_shares(name: str) -> None:
    """Rounding by the shape of a batch is no reason not to; the numbers are near those of rows alone."""
    model = DECODERS[name].classifier().to(torch.bfloat16)
    read = decoder(model, head=ModuleHead(nn.Linear(32, 1)))
    found = torch.cat(read(GROUP, [0] * 6))
    plain = torch.cat(decoder(model, head=read.head, sharing=Sharing(False))(GROUP, [0] * 6))

    assert read.sharing == Sharing(allowed=True, checked=True)
    assert found.dtype == torch.float32
    assert float((found - plain).abs().max() / plain.std()) < 0.2
    wrong = decoder(model, body=Forgetful(model.model), head=read.head) if name == "Llama" else None
    if wrong is not None:
        wrong(GROUP, [0] * 6)
        assert not wrong.sharing.allowed


def test_recurrent_states_alone() -> None:
    """A model without any keys and values has no cache to speak of: read whole, without an error."""
    options = {**HYBRIDS["Qwen3_5"].options, "layer_types": ["linear_attention"] * 2}
    model = Architecture("Qwen3_5Text", options).classifier(use_cache=False)
    read = decoder(model)

    assert sd_apart(read(GROUP, [0] * 6), alone(model, GROUP)) < 1e-4
    assert not read.sharing.allowed


def test_a_body_that_takes_no_cache() -> None:
    """Its signature says so: no probe, no warning, no sharing."""
    model = classifier()
    read = decoder(model, body=Cacheless(model.model))

    assert sd_apart(read(GROUP, [0] * 6), alone(model, GROUP)) < 1e-4
    assert read.sharing == Sharing(allowed=False, checked=True)


class Cacheless(nn.Module):
    """A body of an old kind."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        """Without positions either."""
        assert not use_cache
        return self.body(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("fits", [80, 130, 200])
def test_out_of_memory_behind_a_prefix(fits: int) -> None:
    """The suffixes are halved; the cached prefix stays, for the halves and for the next call."""
    model = classifier()
    read = decoder(model)
    read(GROUP, [0] * 6)
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(Full(fits), with_kwargs=True)
    found = read(GROUP, [0] * 6)
    hook.remove()

    assert sd_apart(found, alone(model, GROUP)) < 1e-4
    assert read.budget.tokens < 4096
    assert read.sharing.allowed


class Full:
    """An attention layer's hook: so many tokens fit, those in the cache included."""

    def __init__(self, fits: int) -> None:
        self.fits = fits

    def __call__(self, _: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Fail in the second layer, when the first has put its keys into the batch's view of the cache."""
        cache, states = options["past_key_values"], options["hidden_states"]
        held = cache.layers[0].keys.shape[0] * cache.layers[0].keys.shape[2] if cache is not None else states.shape[1]
        if held > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_view_of_a_cache(name: str) -> None:
    """Many rows' view takes no memory, and what is added to it is not added to the original."""
    body = body_of(DECODERS[name].classifier())
    with torch.no_grad():
        cache = body(input_ids=torch.tensor([PREFIX]), use_cache=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        many = repeated(cache, 5)
        assert many.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
        assert many.layers[0].keys.shape[0] == 5
        body(input_ids=torch.tensor([[5, 6]] * 5), past_key_values=many, use_cache=True)

    assert cache.get_seq_length() == len(PREFIX)
    assert many.get_seq_length() == len(PREFIX) + 2
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_caches_that_can_be_viewed() -> None:
    """Keys and values alone; not what a hybrid keeps, nor None."""
    ids = torch.tensor([PREFIX])
    for architecture in (*DECODERS.values(), *HYBRIDS.values()):
        body = body_of(architecture.classifier())
        with torch.no_grad():
            cache = body(input_ids=ids, use_cache=True).past_key_values
        assert repeatable(cache) == (architecture in DECODERS.values())
    assert repeatable(DynamicCache())
    assert not repeatable(None)


def test_common_prefixes() -> None:
    """As long as comparing token by token says."""
    torch.manual_seed(0)
    for _ in range(200):
        rows = torch.randint(0, 2, (int(torch.randint(1, 5, ())), 6)).tolist()
        rows = [row[: int(torch.randint(1, 7, ()))] for row in rows]
        columns = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
        assert common_prefix(rows) == (columns.index(False) if False in columns else len(columns))


def test_heads_that_are_modules() -> None:
    """What follows does not matter to them."""
    linear = nn.Linear(3, 2)
    hidden = torch.randn(4, 3)

    assert torch.equal(ModuleHead(linear)(hidden, torch.zeros(4)), linear(hidden))


IDS = [tokenizer()("a prompt that all share, " + text)["input_ids"] for text in texts(16, seed=3)]
ROWS = [Row(ids, [len(ids) - 1]) for ids in IDS]


def access(model: Any, text: Text | None = None, **options: Any) -> ModelReader:
    return ModelReader(model, tokenizer(), text or Text(), show_progress=False, **options)


def one_by_one(model: Any) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([ids])).logits for ids in IDS])


def locked_while(model: Any, run: Any) -> list[bool]:
    """Whether another thread finds the model's lock taken, at each of its embeddings' forwards while this runs."""
    found: list[bool] = []

    def free() -> bool:
        got = lock_of(model).acquire(blocking=False)
        if got:
            lock_of(model).release()
        return got

    with ThreadPoolExecutor(1) as other:
        hook = model.get_input_embeddings().register_forward_hook(
            lambda *_: found.append(not other.submit(free).result())
        )
        try:
            run()
        finally:
            hook.remove()
    return found


@pytest.mark.parametrize("shares", [True, False])
def test_readers_give_what_the_models_own_forward_gives(shares: bool) -> None:
    """Body and head, behind a shared prefix or not, and the whole model on padded rows."""
    model = classifier()
    given = access(model, share_prefixes=shares)
    expected = one_by_one(model)
    torch.testing.assert_close(
        torch.cat(given.decoder(ModuleHead(model.score))(ROWS, [0] * 16)), expected, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(given.own_forward(given.pad)(IDS), expected, atol=1e-4, rtol=0)
    assert (given.sharing.allowed, given.sharing.checked) == (shares, shares)
    assert given.padding.allowed
    assert len(given.padding.lengths) > 0


def test_the_next_reader_knows_what_the_last_found_out() -> None:
    """Where memory did not suffice for a batch, no later reader of either kind tries one so large again."""
    longest = max(map(len, IDS))
    fits = 2 * longest
    sizes: list[int] = []
    model = classifier()
    given = access(model, share_prefixes=False, batch_tokens=3 * longest)
    model.get_input_embeddings().register_forward_pre_hook(Memory(fits, sizes))
    expected = given.own_forward(PAD)(IDS)
    assert max(sizes) == 3 * longest
    sizes.clear()
    torch.testing.assert_close(
        torch.cat(given.decoder(ModuleHead(model.score))(ROWS, [0] * 16)), expected, atol=1e-4, rtol=0
    )
    given.own_forward(PAD)(IDS)
    assert max(sizes) <= fits


def test_what_was_checked_is_not_checked_again() -> None:
    """A second reader runs the model less often than the first."""
    model = classifier()
    given = access(model)
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(Memory(10**9, sizes))
    for run in (lambda: given.decoder(ModuleHead(model.score))(ROWS, [0] * 16), lambda: given.own_forward(PAD)(IDS)):
        counts = []
        for _ in range(2):
            sizes.clear()
            run()
            counts.append(len(sizes))
        assert counts[1] < counts[0]


@pytest.mark.parametrize(("pad", "usable"), [(PAD, True), (None, False), (-1, False), (VOCABULARY, False)])
def test_only_an_id_that_an_input_can_hold_pads(pad: int | None, usable: bool) -> None:
    """The model's padding id 0 is one; without any, rows are read one by one."""
    model = classifier()
    model.config.pad_token_id = pad
    given = access(model)
    assert given.pad == (pad if usable else None)
    assert given.own_forward(given.pad).one_by_one == (not usable)


def test_an_input_has_at_most_the_tokens_that_the_model_reads() -> None:
    """Its positions, or fewer if the text says so."""
    assert access(classifier(max_position_embeddings=64)).limit == 64
    assert access(classifier(max_position_embeddings=64), Text(max_length=32)).limit == 32


def test_a_model_is_read_under_its_own_lock() -> None:
    """One for all who use it: also as another's reference."""
    model, policy, reference = classifier(), causal(0), causal(1)
    given = access(model)
    for run in (lambda: given.decoder(ModuleHead(model.score))(ROWS, [0] * 16), lambda: given.own_forward(PAD)(IDS)):
        found = locked_while(model, run)
        assert found
        assert all(found)
    reward = ImplicitReward(policy, tokenizer(), reference, show_progress=False)
    for read in (policy, reference):
        found = locked_while(read, lambda: reward(["a", "b"], ["c", "d"]))
        assert found
        assert all(found)
