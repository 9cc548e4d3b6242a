"""What ends a completion: tokens, texts, the limit; and what is left of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import EOS, tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from calibrated_rewards.samplers.policy import Draft, Endings, end_ids
from calibrated_rewards.samplers.protocol import Decoding


def ids(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def ended(tokens: list[int], stop: tuple[str, ...] = (), ends: frozenset[int] = frozenset([EOS])) -> Draft:
    """A draft that is written token by token, until something ends it."""
    endings, draft = Endings(tokenizer(), ends, stop), Draft()
    for token in tokens:
        draft.ids.append(token)
        endings.mark([draft])
        if draft.end is not None:
            break
    return draft


def finished(draft: Draft, stop: tuple[str, ...] = ()) -> Any:
    return Endings(tokenizer(), frozenset([EOS]), stop).rollouts([draft])[0]


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (None, (), {EOS}),
        (7, (), {EOS, 7}),
        ([7, 9], (11,), {EOS, 7, 9, 11}),
        ([], (EOS,), {EOS}),
        (torch.tensor(7), (), {EOS, 7}),
        (torch.tensor([7, 9]), (), {EOS, 7, 9}),
    ],
)
def test_end_ids_are_all_of_them(own: Any, asked: tuple[int, ...], expected: set[int]) -> None:
    """The generation config's, one or many, the tokenizer's, and those asked for."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))

    assert end_ids(model, tokenizer(), Decoding(5, stop_token_ids=asked)) == expected


def test_a_model_without_a_generation_config() -> None:
    """It may have none, and the tokenizer no end."""
    assert end_ids(SimpleNamespace(), tokenizer(eos_token=None), Decoding(5)) == frozenset()


def test_a_stop_text_that_is_a_token_of_its_own_ends_by_its_id() -> None:
    """Special ones are not in the text; a text that only begins with one is no token."""
    own = tokenizer()
    own.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    own.add_tokens(["<call>"])
    stop = ("<|im_end|>", "<call>", "</s>", "<call>x", "x")
    call, end = own.encode("<call><|im_end|>", add_special_tokens=False)
    found = Endings(own, end_ids(SimpleNamespace(), own, Decoding(9, stop=stop)), stop)
    draft = Draft([*ids("ab"), end])
    found.mark([draft])

    assert found.ids == {EOS, call, end}
    assert found.rollouts([draft])[0][:3] == ("ab", 3, "stop")


def test_an_end_token_ends_and_is_counted_but_not_written() -> None:
    """Whether it is special or not."""
    draft = ended([*ids("ab"), EOS, *ids("cd")])
    plain = ended(ids("ab!cd"), ends=frozenset(ids("!")))

    assert finished(draft)[:3] == ("ab", 3, "stop")
    assert (plain.end, finished(plain)[:3]) == ("token", ("ab", 3, "stop"))


def test_what_is_cut_says_so() -> None:
    """At the limit of tokens the finish is length, and nothing is taken off."""
    assert finished(ended(ids("abc")))[:3] == ("abc", 3, "length")


@pytest.mark.parametrize(
    ("text", "stop", "left", "tokens"),
    [
        ("one\ntwo\n\nthree", ("\n\n",), "one\ntwo", 9),
        ("the END of it", ("END",), "the ", 7),
        ("Ende ", ("END", "de"), "En", 4),
        ("überß und", ("ß u",), "über", 9),
        ("x" * 50 + "STOP!", ("STOP", "nothing"), "x" * 50, 54),
        ("ab", ("ab",), "", 2),
        ("xab", ("b", "ab"), "x", 3),
    ],
)
def test_a_stop_text_ends_it_where_it_is_whole(text: str, stop: tuple[str, ...], left: str, tokens: int) -> None:
    """The text that comes first is cut off, with what follows; its tokens are counted."""
    draft = ended(ids(text), stop)

    assert draft.end == "text"
    assert finished(draft, stop)[:3] == (left, tokens, "stop")
    # Not a token too early.
    assert not any(each in tokenizer().decode(draft.ids[:-1]) for each in stop)


def test_a_stop_text_is_looked_for_in_the_whole_text() -> None:
    """Some tokenizers write a token otherwise where a text begins with it, as the last tokens may."""
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}))
    backend.decoder = decoders.WordPiece()
    endings, draft = Endings(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset(), ("##b",)), Draft()
    for token in [0] + [1] * 30:
        draft.ids.append(token)
        endings.mark([draft])

    assert draft.end is None
    assert endings.rollouts([draft])[0].completion == "a" + "b" * 30


def test_special_tokens_are_left_out_of_the_text() -> None:
    """As trainers decode, and before stop texts are looked for."""
    draft = ended([*ids("a"), 4, *ids("bSTO"), 5, *ids("P")], ("STOP",))

    assert (draft.end, finished(draft, ("STOP",)).completion) == ("text", "ab")


def test_many_drafts_at_once() -> None:
    """Each has its own end."""
    endings = Endings(tokenizer(), frozenset([EOS]), ("!",))
    drafts = [Draft(ids("a!"), -1.0), Draft([*ids("b"), EOS], -2.0), Draft(ids("c"), -3.0)]
    endings.mark(drafts)

    assert [draft.end for draft in drafts] == ["text", "token", None]
    assert [tuple(each) for each in endings.rollouts(drafts)] == [
        ("a", 2, "stop", -1.0),
        ("b", 2, "stop", -2.0),
        ("c", 1, "length", -3.0),
    ]
