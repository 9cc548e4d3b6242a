"""Prompt keys: equal for what is the same prompt however it is written, different for everything else."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import OrderedDict
from enum import Enum
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from pydantic import BaseModel

from calibrated_rewards.prompts import as_key, canonical_chat, id_key, longest_prefix, prompt_key, start_of

# Every code point, lone surrogates included; those that JSON escapes are rare among them, and have a test of their own.
texts = st.text(st.characters(exclude_categories=()), max_size=12)
names = st.text(st.characters(exclude_categories=()), max_size=4)
# A whole float is written as an integer, and lists of content are flattened: both have tests of their own.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.floats(0.01, 0.99),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
messages = st.builds(
    lambda extra, role, content: {**extra, "role": role, "content": content},
    st.dictionaries(names, values, max_size=3),
    texts,
    texts,
)
chats = st.lists(messages, min_size=1, max_size=3)
plain_chats = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=3)


def without_none(value: object) -> object:
    """`value` with the None-valued names of all its mappings left out."""
    if isinstance(value, dict):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def rewritten(value: object) -> object:
    """The same prompt with other types, another order of names, and None where Arrow would fill it in."""
    if isinstance(value, dict):
        # np.str_ drops the NUL characters that a text ends in, so names with one stay str.
        named = [(name if "\0" in name else np.str_(name), item) for name, item in reversed(value.items())]
        turned = OrderedDict((name, rewritten(item)) for name, item in named)
        return {**turned, "filled in": None} if "filled in" not in value else turned
    if isinstance(value, list):
        array = np.empty(len(value), dtype=object)
        for place, item in enumerate(value):
            array[place] = rewritten(item)
        return array
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int) and abs(value) < 2**60:
        return np.int64(value)
    return np.float64(value) if isinstance(value, float) else value


def reference_key(tag: str, text: str) -> bytes:
    """A key by the letter of docs/reference/table_format.md."""
    return blake2b(f"{tag}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


@given(texts)
def test_text_key_is_the_documented_hash(text):
    """A text's key is the tagged hash of its UTF-8, lone surrogates, whitespace and all."""
    assert prompt_key(text) == reference_key("text", text)


@given(chats | plain_chats)
def test_chat_key_is_the_hash_of_canonical_json(chat):
    """The short way and the full writer agree with the standard library's sorted, compact JSON."""
    text = json.dumps(without_none(chat), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert canonical_chat(chat) == text
    assert prompt_key(chat) == prompt_key(tuple(chat)) == reference_key("chat", text)


@given(st.text('a"\\\n', max_size=9), st.text('u"\\\n\t\0\x1f\x7f/\u00e9\ud800', max_size=9))
def test_everything_that_json_escapes_is_escaped(role, content):
    """The short way escapes quotes, backslashes and newlines by itself, and leaves other control characters alone."""
    for message in ({"role": role, "content": content}, {"role": content, "content": role}):
        text = json.dumps([message], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        assert prompt_key([message]) == reference_key("chat", text)


@given(chats)
def test_other_types_are_the_same_prompt(chat):
    """numpy scalars, object arrays, another order of names and None filled in change nothing."""
    assert prompt_key(rewritten(chat)) == prompt_key(chat)


@given(plain_chats, plain_chats)
def test_different_chats_differ(one, other):
    """Keys are equal exactly where the messages are."""
    assert (prompt_key(one) == prompt_key(other)) == (one == other)


@given(texts, texts, st.integers(0, 12))
def test_no_collision_by_moving_characters(role, content, cut):
    """Moving the border between role and content, or between two messages, is another prompt."""
    moved = [{"role": role + content[:cut], "content": content[cut:]}]
    assert (prompt_key(moved) == prompt_key([{"role": role, "content": content}])) == (content[:cut] == "")
    split = [{"role": role, "content": content[:cut]}, {"role": role, "content": content[cut:]}]
    assert prompt_key(split) != prompt_key([{"role": role, "content": content}])


@given(texts, st.lists(st.integers(0, 12), max_size=3), st.booleans())
def test_text_parts_are_their_text(text, cuts, filled):
    """Content as text parts, in however many pieces, is the text that they make."""
    edges = [0, *sorted(cuts), len(text)]
    part = {"type": "text", "image": None} if filled else {"type": "text"}
    parts = [{**part, "text": text[a:b]} for a, b in pairwise(edges)]
    assert prompt_key([{"role": "user", "content": parts}]) == prompt_key([{"role": "user", "content": text}])


def test_text_parts_around_an_image_are_joined_on_either_side():
    """Only adjacent text parts are one; a text part with something more to say stays by itself."""
    image = {"type": "image", "url": "a.png"}
    hi = {"type": "text", "text": "hi"}
    chat = [{"role": "user", "content": ["h", {"type": "text", "text": "i"}, image, hi]}]

    assert canonical_chat(chat) == (
        '[{"content":[{"text":"hi","type":"text"},{"type":"image","url":"a.png"},{"text":"hi","type":"text"}],"role":"user"}]'
    )
    marked = [{"role": "user", "content": [{**hi, "cache": True}]}]
    assert canonical_chat(marked) == '[{"content":[{"cache":true,"text":"hi","type":"text"}],"role":"user"}]'


def test_kinds_of_prompt_never_meet():
    """A text, the chat of it, the text of that chat and an id of the same letters are four keys."""
    chat = [{"role": "user", "content": "7"}]
    keys = {prompt_key("7"), prompt_key(chat), prompt_key(canonical_chat(chat)), id_key("7"), prompt_key("id:7")}
    assert len(keys) == 5


def test_nothing_is_normalised():
    """Whitespace, Unicode composition and case are part of the prompt."""
    variants = ["a", " a", "a ", "a\n", "A", "\u00e9", "e\u0301", ""]
    assert len({prompt_key(v) for v in variants}) == len(variants)
    assert len({prompt_key([{"role": "user", "content": v}]) for v in variants}) == len(variants)


def test_whole_floats_are_integers():
    """1.0 is 1 (Arrow turns one into the other), while True, "1" and 1.5 are themselves."""
    keys = [prompt_key([{"role": "tool", "n": n}]) for n in (1, 1.0, np.float32(1), True, "1", 1.5)]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 4
    assert canonical_chat([{"role": "t", "n": -0.0, "m": 1e300}]) == '[{"m":1e+300,"n":0,"role":"t"}]'


@dataclasses.dataclass
class Message:
    """A message as a dataclass."""

    role: str
    content: object
    name: str | None = None
    tool_calls: object = None


class Model(BaseModel):
    """A message as pydantic has it."""

    role: str
    content: object
    name: str | None = None
    tool_calls: object = None


class Slotted:
    """A message of an object that lists its attributes nowhere."""

    __slots__ = ("content", "role", "tool_calls")

    def __init__(self, role, content, tool_calls=None):
        self.role, self.content, self.tool_calls = role, content, tool_calls


@pytest.mark.parametrize("kind", [Message, Model, Slotted, SimpleNamespace])
def test_objects_are_their_mappings(kind):
    """A message with attributes has the key of the same message as a dict, nested objects included."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    nested = SimpleNamespace(function=SimpleNamespace(name="add", arguments={"a": 1}))

    assert prompt_key([kind(role="user", content="hi")]) == prompt_key([{"role": "user", "content": "hi"}])
    expected = prompt_key([{"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [call]}])
    assert prompt_key([kind(role="assistant", content="", tool_calls=[nested])]) == expected


def test_arrays_and_images_are_hashed_with_their_shape_and_type():
    """Pixels that differ in value, shape, type or mode differ; copies, byte orders and memory layouts do not."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    swapped = pixels.astype(np.int32)
    palette = image.convert("P")
    repainted = palette.copy()
    repainted.putpalette([255 - v for v in palette.getpalette()])
    kinds = [
        [pixels, pixels.copy(), np.asfortranarray(pixels)],
        [pixels.reshape(6, 4, 3)],
        [swapped, swapped.astype(">i4")],
        [image, image.copy()],
        [image.resize((6, 4)).rotate(90)],
        [image.convert("RGBA")],
        [palette],
        [repainted],
        [pixels.tobytes(), bytearray(pixels.tobytes()), memoryview(pixels.tobytes())],
        ["a.png", np.str_("a.png")],
        [pixels.tolist()],
    ]
    keys = [
        {prompt_key([{"role": "user", "content": [{"type": "image", "image": v}]}]) for v in same} for same in kinds
    ]
    assert [len(same) for same in keys] == [1] * len(kinds)
    assert len(set.union(*keys)) == len(kinds)


def test_no_text_is_an_image():
    """The token of an image is no JSON, so that no string and no mapping has its key."""
    token = canonical_chat([{"role": "u", "content": b"x"}])
    assert token == f'[{{"content":bytes({blake2b(b"x", digest_size=16).hexdigest()}),"role":"u"}}]'
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(token)


def looped() -> list[object]:
    """A message that contains itself."""
    message: dict[str, object] = {"role": "user"}
    message["content"] = [message]
    return [message]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "at least one message, got an empty list"),
        (np.empty(0, dtype=object), ValueError, "at least one message"),
        (b"text", TypeError, "a string or a list of messages, got bytes: b'text'"),
        (["hi"], TypeError, "message 0 needs a role that is a string, got 'hi'"),
        ([{"role": "user"}, {"content": "x"}], TypeError, "message 1 needs a role that is a string"),
        ([{"role": 3, "content": "x"}], TypeError, "message 0 needs a role"),
        ([{"role": "u", "content": {1}}], TypeError, r"message 0.content has no canonical form: set \{1\}"),
        (
            [{"role": "u", "content": [{"type": "image", "image": object()}]}],
            TypeError,
            r"message 0.content\[0\].image has",
        ),
        ([{"role": "u", "x": [float("nan")]}], ValueError, r"message 0.x\[0\] has no canonical form: nan"),
        ([{"role": "u", "x": np.float64("inf")}], ValueError, "message 0.x has no canonical form: inf"),
        ([{"role": "u", "x": {1: 2}}], TypeError, "message 0.x needs names that are strings, got 1"),
        ([{"role": "u", "x": len}], TypeError, "message 0.x has no canonical form"),
        ([{"role": "u", "x": Message}], TypeError, "message 0.x has no canonical form"),
        (looped(), ValueError, "nest without end"),
    ],
)
def test_refusals_name_the_place(prompt, error, message):
    """What has no canonical form says where it stands."""
    with pytest.raises(error, match=message):
        prompt_key(prompt)


def test_one_message_alone_is_not_a_chat():
    """A dict where a list belongs is refused."""
    with pytest.raises(TypeError):
        prompt_key({"role": "user", "content": "hi"})
    with pytest.raises(TypeError, match="list of messages, got dict"):
        canonical_chat({"role": "user", "content": "hi"})


def test_ids():
    """An id is a text or a whole number of that text."""
    assert id_key("7") == id_key(7) == id_key(np.int32(7)) == id_key(np.str_("7")) == reference_key("id", "7")
    assert len({id_key(i) for i in ("7", "07", "7.0", "", -7)}) == 5
    for wrong in (True, None, 7.0, b"7"):
        with pytest.raises(TypeError):
            id_key(wrong)


def test_a_key_is_its_own_key():
    """16 bytes pass, other bytes do not."""
    assert as_key(bytes(16)) == bytes(16)
    assert as_key("hi") == prompt_key("hi")
    with pytest.raises(ValueError, match="a key has 16 bytes, got 3"):
        as_key(b"abc")


def test_keys_are_the_same_in_another_process():
    """Nothing of a key depends on the process, such as its hash seed."""
    chat = [{"role": "user", "content": "h\u00e9\n", "b": [1, None, {"z": 1, "a": 2}]}]
    code = f"from calibrated_rewards.prompts import prompt_key; print(prompt_key({chat!r}).hex())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == prompt_key(chat).hex()


@given(
    st.sets(st.text("ab\u00e9\U0001f600", max_size=4), min_size=1, max_size=6),
    st.text("ab\u00e9\U0001f600", max_size=8),
)
def test_longest_prefix_is_that_of_a_search_through_all(known, text):
    """The longest known prompt that a text starts with, cut at a character and never inside of one."""
    keys = {prompt_key(prompt) for prompt in known}
    lengths = sorted({len(prompt.encode()) for prompt in known})
    found = longest_prefix(text, lengths, lambda wanted: [key in keys for key in wanted])
    expected = max((prompt for prompt in known if text.startswith(prompt)), key=len, default=None)
    assert found == (None if expected is None else (prompt_key(expected), len(expected)))


def test_a_prefix_is_never_cut_inside_a_character():
    """A key whose bytes end inside a character of the text is not asked for at all."""
    asked: list[bytes] = []
    longest_prefix("\u00e9x", [1, 2, 3, 4], lambda keys: asked.extend(keys) or [False] * len(keys))
    assert asked == [prompt_key("\u00e9"), prompt_key("\u00e9x")]


def test_start_of_is_short():
    """Errors show keys in hex, and no more than the start of a long prompt."""
    assert start_of(bytes(16)) == f"key {'00' * 16}"
    assert len(start_of("x" * 1000)) == 60
    assert start_of([{"role": "user", "content": "x" * 1000}]) == f"1 message (user: '{'x' * 56}...)"


def test_start_of_a_chat_shows_its_last_message():
    """Under one system message the last message tells two chats apart; messages are of any class, in any sequence."""
    system = {"role": "system", "content": "You are a helpful assistant. " * 9}
    chats = [[system, {"role": "user", "content": question}] for question in ("2+2=", "3+3=")]
    assert [start_of(chat) for chat in chats] == [f"2 messages (system, user: '{each}')" for each in ("2+2=", "3+3=")]
    objects = np.empty(2, object)
    objects[:] = [SimpleNamespace(**message) for message in chats[0]]
    assert start_of(objects) == start_of(chats[0])
    assert start_of([*chats[0] * 5, {"role": "user"}]) == "11 messages (system, ..., user: None)"
    assert start_of([7, "x"]) == "[7, 'x']"
    assert start_of([]) == "[]"


def test_documented_keys():
    """The keys that docs/reference/table_format.md shows are the hashes of what it says is hashed."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "table_format.md").read_text()
    for text, key in [
        ("text:Hi", prompt_key("Hi")),
        ('chat:[{"content":"Hi","role":"user"}]', prompt_key([{"role": "user", "content": "Hi"}])),
        ("id:7", id_key(7)),
    ]:
        assert blake2b(text.encode(), digest_size=16).digest() == key
        assert re.search(rf"{re.escape(text)} +{key.hex()}\n", page)


class Role(str, Enum):  # noqa: UP042 (a StrEnum prints as its value, this one does not)
    """Names and values as an API client has them."""

    user = "user"
    role = "role"
    content = "content"


def test_enum_members_are_their_values():
    """On the fast path, off it, and as ids."""
    plain = [{"role": "user", "content": "Hi", "name": "x"}]

    assert prompt_key([{Role.role: Role.user, Role.content: "Hi", "name": "x"}]) == prompt_key(plain)
    assert id_key(Role.user) == id_key("user")


class Hidden:
    """A message whose payload is private."""

    def __init__(self, data):
        self.role, self.content, self._data = "user", "Hi", data


def test_objects_with_hidden_state_are_refused():
    """Two of them might differ in what no key would see; so might two opaque parts."""
    with pytest.raises(TypeError, match="needs a role"):
        prompt_key([Hidden(1)])
    with pytest.raises(TypeError, match="no canonical form"):
        prompt_key([{"role": "user", "content": [{"type": "video", "video": Hidden(1)}]}])
