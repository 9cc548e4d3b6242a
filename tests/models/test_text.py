"""From a prompt and a completion to token ids: template, special tokens, EOS, truncation, each by a stated rule."""

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
from hypothesis import given, strategies as st
from tiny import BOS, EOS, TEMPLATE, texts, tokenizer

from calibrated_rewards.models.text import NO_LIMIT, Text, TruncationWarning, truncate

USER, ASSISTANT, END, SEP = 4, 5, 6, 7
TOOLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "{% if m.tool_call_id is defined %}({{ m.tool_call_id }}){% endif %};{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}{{ m.content }}{% endfor %}"
)


def letters(text: str) -> list[int]:
    """The ids of plain letters, which are one byte each."""
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def ids(text: Text, prompt: Any, completion: Any, limit: int = NO_LIMIT, **options: Any) -> list[int]:
    return text.encode(tokenizer(**options), [prompt], [completion], limit)[0]


def test_plain_text() -> None:
    """Prompt and completion are joined as they are; the tokenizer puts its BOS first."""
    assert ids(Text(), "ab", "cd") == [BOS, *letters("abcd")]
    assert ids(Text(), "ab", "") == [BOS, *letters("ab")]
    assert ids(Text(), "", "cd") == [BOS, *letters("cd")]
    assert ids(Text(), "", "") == [BOS]
    assert ids(Text(special_tokens=False), "ab", "cd") == letters("abcd")
    assert ids(Text(special_tokens=True), "ab", "cd") == [BOS, *letters("abcd")]


def test_chats() -> None:
    """The template writes the special tokens; a string completion is an assistant's message."""
    chat = [{"role": "user", "content": "ab"}]
    expected = [BOS, USER, *letters("ab"), END, ASSISTANT, *letters("cd"), END]

    assert ids(Text(), chat, "cd") == expected
    assert ids(Text(), chat, [{"role": "assistant", "content": "cd"}]) == expected
    assert ids(Text(chat=True), "ab", "cd") == expected
    assert ids(Text(), chat, []) == expected[:5]
    assert ids(Text(), chat, "") == [*expected[:6], END]
    assert Text().opening(tokenizer(), chat) == ("<s><|user|>ab<|end|><|assistant|>", True)
    assert Text().opening(tokenizer(), "ab") == ("ab", False)
    assert Text(chat=True).opening(tokenizer(), "ab") == ("<s><|user|>ab<|end|><|assistant|>", True)


def test_messages_of_every_kind() -> None:
    """Keys that Arrow filled with None are gone, text parts are joined, objects are read: the same text."""
    plain = [{"role": "user", "content": "ab"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    others = [
        [{"role": "user", "content": "ab", "tool_calls": None, "name": None}],
        [{"role": "user", "content": parts}],
        [SimpleNamespace(role="user", content="ab")],
        ({"role": "user", "content": "ab"},),
    ]
    template = "{{ messages | tojson }}"

    for other in others:
        assert Text(template=template).render(tokenizer(), other, "c") == (
            '[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]',
            True,
        )
        assert ids(Text(), other, "cd") == ids(Text(), plain, "cd")


def test_tool_calls() -> None:
    """Completions of several messages keep their calls and results, and the template sees no key that is None."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"z": 1.0, "b": None, "a": 2}}}
    completion = [
        {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None},
        {"role": "tool", "content": "3", "tool_calls": None, "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 3", "tool_calls": None},
    ]
    text = Text(template=TOOLS)
    rendered = 'user:1+2;assistant:[add {"z": 1.0, "a": 2}];tool:3(1);assistant:It is 3;'

    assert text.render(tokenizer(), [{"role": "user", "content": "1+2"}], completion) == (rendered, True)
    assert ids(text, [{"role": "user", "content": "1+2"}], completion) == letters(rendered)


def test_template_options() -> None:
    """They reach the template; so does the one given in place of the tokenizer's."""
    text = Text(template="{{ mood }} {{ messages[-1].content }}", template_options={"mood": "calm"})

    assert text.render(tokenizer(), [{"role": "user", "content": "a"}], "b") == ("calm b", True)
    assert text.render(tokenizer(template=None), [{"role": "user", "content": "a"}], "b") == ("calm b", True)


def test_a_template_that_is_missing() -> None:
    """Messages without a template are an error that says what to do; plain text needs none."""
    with pytest.raises(
        ValueError, match=r"no chat template.*2 messages \(user, assistant: 'cd'\).*Name a template with template="
    ):
        ids(Text(), [{"role": "user", "content": "ab"}], "cd", template=None)
    with pytest.raises(ValueError, match="no chat template"):
        ids(Text(chat=True), "ab", "cd", template=None)
    assert ids(Text(), "ab", "cd", template=None) == [BOS, *letters("abcd")]


def test_a_template_that_refuses() -> None:
    """Its own words, and the messages, are in the error."""
    chat = [{"role": "user", "content": "ab"}, {"role": "system", "content": "be kind"}]
    messages = r"3 messages \(user, system, assistant: 'cd'\)"
    with pytest.raises(ValueError, match=f"refuses {messages}.*System message must be at the beginning"):
        ids(Text(template=STRICT), chat, "cd")
    with pytest.raises(ValueError, match="the chat template refuses 3 messages"):
        ids(Text(template="{{ messages[0]['content'] + 1 }}"), chat, "cd")
    with pytest.raises(ValueError, match="the chat template refuses 3 messages"):
        ids(Text(template="{{ messages[0].nothing.at_all }}"), chat, "cd")


def test_prompts_and_completions_that_do_not_fit() -> None:
    """Messages behind text, or messages where text is asked for, are TypeErrors."""
    chat = [{"role": "user", "content": "ab"}]
    with pytest.raises(TypeError, match=r"needs a completion that is text, got 1 message .*Text\(chat=True\)"):
        ids(Text(), "ab", [{"role": "assistant", "content": "cd"}])
    with pytest.raises(TypeError, match=r"Text\(chat=False\) takes prompts that are text, got 1 message "):
        ids(Text(chat=False), chat, "cd")
    assert ids(Text(chat=True), "ab", [{"role": "assistant", "content": "cd"}]) == ids(Text(), chat, "cd")


def test_one_bos() -> None:
    """A template that writes BOS and a tokenizer that adds it make one; in a text, only the first two are looked at."""
    chat = [{"role": "user", "content": "ab"}]
    once = [BOS, USER, *letters("ab"), END, ASSISTANT, *letters("cd"), END]

    assert ids(Text(special_tokens=True), chat, "cd") == once
    assert ids(Text(), "<s>ab", "cd") == [BOS, *letters("abcd")]
    assert ids(Text(), "ab<s><s>", "cd") == [BOS, *letters("ab"), BOS, BOS, *letters("cd")]
    assert ids(Text(special_tokens=False), chat, "cd", bos=False) == once
    assert ids(Text(template=TEMPLATE.removeprefix("{{ bos_token }}")), chat, "cd") == once[1:]


def test_one_eos() -> None:
    """`append_eos` ends each input with EOS, and does not double it."""
    text = Text(append_eos=True)

    assert ids(text, "ab", "cd") == [BOS, *letters("abcd"), EOS]
    assert ids(text, "ab", "cd</s>") == [BOS, *letters("abcd"), EOS]
    assert ids(text, [{"role": "user", "content": "ab"}], "cd")[-2:] == [END, EOS]
    with pytest.raises(ValueError, match=r"Text\(append_eos=True\) needs a tokenizer with an EOS token"):
        ids(text, "ab", "cd", eos_token=None)


def test_ends_that_are_stripped() -> None:
    """Only from completions that are text, only at their end, as often as they stand there."""
    text = Text(strip=("<|end|>", "</s>", ""))

    assert ids(text, "a<|end|>", "b<|end|>c</s><|end|><|end|>") == [BOS, *letters("a<|end|>b<|end|>c")]
    assert ids(text, [{"role": "user", "content": "ab"}], "cd<|end|>")[-3:] == [*letters("cd"), END]
    assert ids(text, "a", "</s>") == [BOS, *letters("a")]
    assert Text().render(tokenizer(), "a", "b</s>") == ("ab</s>", False)


def test_nothing_at_all() -> None:
    """A text without a token cannot be scored, and is named."""
    with pytest.raises(ValueError, match="an input needs at least one token, got none for ''"):
        ids(Text(special_tokens=False), "", "")


def test_many_of_many_kinds() -> None:
    """Plain and rendered ones in one call: in order, each as alone."""
    chat = [{"role": "user", "content": "ab"}]
    prompts, completions = ["x", chat, "yz", chat], ["a", "b", "", [{"role": "assistant", "content": "c"}]]
    together = Text().encode(tokenizer(), prompts, completions)

    assert together == [ids(Text(), p, c) for p, c in zip(prompts, completions, strict=True)]
    assert Text().encode(tokenizer(), [], []) == []


def test_what_is_left_out() -> None:
    """BOS or CLS stays, then the last tokens: the beginning goes, the completion and its EOS stay; and it is said."""
    long = "abcdefgh"
    with pytest.warns(TruncationWarning, match=r"1 of 1 inputs are longer than max_length=5 \(longest: 9\)"):
        assert ids(Text(), long, "", 5) == [BOS, *letters("efgh")]
    with pytest.warns(TruncationWarning):
        assert ids(Text(append_eos=True), long, "", 5) == [BOS, *letters("fgh"), EOS]
    with pytest.warns(TruncationWarning):
        assert ids(Text(special_tokens=False), long, "", 5) == letters("defgh")
    with pytest.warns(TruncationWarning):
        assert ids(Text(), long, "", 5, bos_token="[SEP]", cls_token="<s>") == [BOS, *letters("efgh")]
    with pytest.warns(TruncationWarning):
        assert ids(Text(), [{"role": "user", "content": long}], "xy", 7) == [
            BOS,
            *letters("h"),
            END,
            ASSISTANT,
            *letters("xy"),
            END,
        ]


def test_what_is_not_left_out() -> None:
    """An input of exactly the limit is whole, without a word; `on_long="raise"` makes too long an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(Text(), "abcd", "", 5) == [BOS, *letters("abcd")]
    with pytest.raises(ValueError, match=r"2 of 3 inputs are longer than max_length=5 \(longest: 9\); shorten them"):
        Text(on_long="raise").encode(tokenizer(), ["abcdefgh", "a", "abcdefg"], ["", "", ""], 5)


@given(row=st.lists(st.integers(0, 3), min_size=1, max_size=12), limit=st.integers(2, 12))
def test_kept_tokens(row: list[int], limit: int) -> None:
    """At most the limit, a suffix of the row but for a first special token, and the row itself if it is short."""
    found = truncate(row, limit, tokenizer())

    assert len(found) == min(len(row), limit)
    assert found == row or found[-(limit - 1) :] == row[-(limit - 1) :]
    assert found == row or found[0] == (BOS if row[0] == BOS else row[-limit])


def test_limits() -> None:
    """The smallest of what model and tokenizer can read; a limit above the model's positions is an error."""
    short = tokenizer(model_max_length=50)

    assert Text().limit(tokenizer(), None) == NO_LIMIT
    assert Text().limit(tokenizer(), 100) == 100
    assert Text().limit(short, 100) == Text().limit(short, None) == 50
    assert Text().limit(short, 40) == 40
    assert Text(max_length=60).limit(short, 100) == 60
    assert Text(max_length=20).limit(tokenizer(), None) == 20
    with pytest.raises(ValueError, match="the model reads at most 100 tokens, got max_length=101"):
        Text(max_length=101).limit(tokenizer(), 100)


def test_the_longest_come_from_the_tokenizer_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer's own warning of long inputs is not ours: those are cut, or nothing is wrong with them."""
    made = tokenizer(model_max_length=5)

    assert len(Text().encode(made, ["abcdefgh"], ["ij"])[0]) == 11
    assert caplog.text == ""


def test_refused_settings() -> None:
    """They are named, with the rule and the value."""
    with pytest.raises(ValueError, match="Text needs max_length >= 2, got max_length=1"):
        Text(max_length=1)
    for name, value in {"max_length": "abc", "append_eos": 7, "chat": "yes", "special_tokens": "no"}.items():
        text = Text()
        object.__setattr__(text, name, value)
        with pytest.raises(TypeError, match=f"Text needs {name} to be .*, got {value!r}"):
            text.__post_init__()
    text = Text()
    object.__setattr__(text, "on_long", "quiet")
    with pytest.raises(ValueError, match="Text needs on_long to be 'warn' or 'raise', got on_long='quiet'"):
        text.__post_init__()


def test_the_fingerprint_has_every_setting() -> None:
    """Each is in it, but whether long inputs are an error, with the template that is really used; and it is JSON."""
    made = tokenizer()
    settings: dict[str, Any] = {
        "max_length": 10,
        "on_long": "raise",
        "chat": True,
        "template": "{{ messages }}",
        "template_options": {"a": 1},
        "special_tokens": True,
        "append_eos": True,
        "strip": ("x",),
        "today": "2026-01-31",
    }
    said = [json.dumps(Text(**{name: value}).fingerprint(made)) for name, value in settings.items()]

    assert set(settings) == set(Text.__dataclass_fields__)
    assert len({*said, json.dumps(Text().fingerprint(made))}) == len(settings)
    assert Text().fingerprint(made)["template"] == TEMPLATE
    assert Text().fingerprint(made) == Text(template=TEMPLATE).fingerprint(made)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_sides_do_not_matter(side: str) -> None:
    """Nor does its own truncation."""
    made = tokenizer(side=side, truncation_side=side, model_max_length=4)
    prompts = texts(5)

    assert Text().encode(made, prompts, ["a"] * 5) == Text().encode(tokenizer(), prompts, ["a"] * 5)


def test_templates_that_are_none() -> None:
    """A path in a template's place would be rendered as it is, and every completion would score alike."""
    with pytest.raises(ValueError, match=r"a template itself, in Jinja, got '/a/chat_template.jinja'"):
        Text(template="/a/chat_template.jinja")


def test_content_that_is_no_text() -> None:
    """An image would be written out as Python shows it, and scored."""
    image = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
    for content in ([image], [{"type": "text", "text": "a"}, image], b"ab", [object()]):
        with pytest.raises(ValueError, match="a scorer reads text, message 0 has content of another kind"):
            ids(Text(), [{"role": "user", "content": content}], "cd")


def test_text_that_is_no_unicode() -> None:
    """Half a character is named; the tokenizer alone would say something of its types."""
    with pytest.raises(ValueError, match=r"the tokenizer cannot read 'ab\\ud800'"):
        ids(Text(), "ab", "\ud800")


def test_a_template_that_writes_the_date() -> None:
    """It is always the same date, which is in the fingerprint and can be set."""
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}"

    assert Text(template=template).render(tokenizer(), [{"role": "user", "content": "a"}], "b")[0] == "26 Jul 2024 b"
    assert Text(template=template, today="2026-01-31").render(tokenizer(), [{"role": "user", "content": "a"}], "b")[
        0
    ] == ("31 Jan 2026 b")


@pytest.mark.parametrize("length", [-1, 0, 1, None])
def test_limits_that_nobody_means(length: int | None) -> None:
    """A tokenizer's own limit below 2 is no limit: the model's holds."""
    assert Text().limit(tokenizer(model_max_length=length), 64) == 64


def test_a_tokenizer_that_somebody_else_uses() -> None:
    """What another thread sets on it, padding and truncation, does not reach the ids."""
    made = tokenizer()
    expected = Text().encode(made, ["ab", "a"], ["cdefgh", "c"])
    made.backend_tokenizer.enable_padding(length=20)
    made.backend_tokenizer.enable_truncation(3)

    assert Text().encode(made, ["ab", "a"], ["cdefgh", "c"]) == expected


def test_every_call_that_cuts_says_so() -> None:
    """Under Python's own filters, each time: the default would show the same warning once."""
    code = "from calibrated_rewards.models.text import Text\nfor _ in range(3): Text().report([9, 3], 5)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stderr.count("1 of 2 inputs are longer than max_length=5 (longest: 9)") == 3


def test_ends_of_messages_are_stripped() -> None:
    """What sampling left at the end of an assistant's message goes, as it does from a text."""
    text, chat = Text(strip=("</s>",)), [{"role": "user", "content": "a"}]

    assert ids(text, chat, [{"role": "assistant", "content": "b</s></s>"}]) == ids(text, chat, "b")


def test_one_end_is_no_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text in its place would be taken for its letters."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(TypeError, match=r"a tuple of ends, such as \('</s>',\)"):
        Text(strip="</s>")  # type: ignore[arg-type]
