"""The token at which a head reads: found in templates, and at the end of every input."""

from typing import Any

import pytest
import tiny

from calibrated_rewards.heads import TurnEnd, find_turn_end
from calibrated_rewards.heads.turn_end import encode_turns
from calibrated_rewards.models import Text

END = tiny.SPECIALS.index("<|end|>")
# As ChatML does, it writes a line break behind the token.
CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
WITHOUT_END = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text without special ones."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "token"),
    [(tiny.TEMPLATE, "<|end|>"), (CHATML, "<|end|>"), (WITHOUT_END, "</s>"), (None, "</s>")],
)
def test_the_token_is_the_templates_or_eos(template: str | None, token: str) -> None:
    """The first special token behind an answer is the end of the turn; without one, EOS."""
    end = find_turn_end(tiny.tokenizer(template=template))
    assert end.token == token
    assert end.id == tiny.SPECIALS.index(token)


@pytest.mark.parametrize("template", [tiny.TEMPLATE, CHATML, WITHOUT_END])
@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
@pytest.mark.parametrize("completion", ["yes", "yes<|end|>", "no\n", ""])
def test_every_input_ends_in_the_token(template: str, prompt: Any, completion: str) -> None:
    """Chats and plain text end in the token, once more than without it, behind their completion."""
    tokenizer = tiny.tokenizer(template=template)
    text, end = Text(strip=("<|end|>",)), find_turn_end(tokenizer)
    (row,) = encode_turns(tokenizer, text, end, [prompt], [completion])
    (whole,) = text.encode(tokenizer, [prompt], [completion])

    assert row[-1] == end.id
    assert row[:-1] == whole[: len(row) - 1]
    assert len(whole) - len(row) in (-1, 0, 1)
    content = ids_of(tokenizer, completion.removesuffix("<|end|>"))
    assert row[len(row) - 1 - len(content) : -1] == content or template == WITHOUT_END


def test_the_token_is_the_answers_not_the_users() -> None:
    """A template that does not end an answer would leave the user's token as the last one: it is added."""
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}<|end|>{% endif %}{% endfor %}"
    tokenizer = tiny.tokenizer(template=template)
    end = find_turn_end(tokenizer, token="<|end|>")
    (row,) = encode_turns(tokenizer, Text(), end, [[{"role": "user", "content": "ab"}]], ["cd"])
    assert row == [*ids_of(tokenizer, "ab"), END, *ids_of(tokenizer, "cd"), END]


def test_long_inputs_keep_their_end() -> None:
    """Of what is too long the beginning goes, with a warning; the token stays last."""
    tokenizer = tiny.tokenizer()
    with pytest.warns(UserWarning, match="1 of 1 inputs are longer than max_length=8"):
        (row,) = encode_turns(tokenizer, Text(), find_turn_end(tokenizer), ["a" * 30], ["b" * 5], limit=8)
    assert row == [tiny.BOS, *ids_of(tokenizer, "abbbbb"), END]


def test_a_token_that_is_none() -> None:
    """A name that the tokenizer does not know, and a tokenizer without EOS, are refused."""
    with pytest.raises(ValueError, match=r"that the tokenizer knows, got end_token=<\|im_end\|>"):
        find_turn_end(tiny.tokenizer(), token="<|im_end|>")
    with pytest.raises(ValueError, match="the tokenizer has no EOS"):
        find_turn_end(tiny.tokenizer(template=None, eos_token=None))
    assert find_turn_end(tiny.tokenizer(), token="</s>") == TurnEnd("</s>", tiny.EOS)
