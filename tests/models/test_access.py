"""Access to a model: its readers give what its own forward gives, and each knows what the ones before found out."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_batches import Memory
from tiny import PAD, VOCABULARY, causal, classifier, texts, tokenizer
from torch import Tensor

from calibrated_rewards.models.parts import lock_of
from calibrated_rewards.models.reader import ModelReader
from calibrated_rewards.models.shared_prefix import ModuleHead, Row
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.implicit import ImplicitReward

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
