"""Turn prompts and completions into the token ids that a model reads: template, special tokens, truncation.

`Text` holds the settings. `Question` turns a question about a completion into the tokens that a judge goes on from.
"""

import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Completion, Prompt, canonical_chat, start_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The call by which templates write the date.
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Turn messages into dicts for a chat template: without keys that are None (Arrow adds them), text parts joined.

    Unlike in the canonical form of a prompt's key, arguments of tool calls keep their order and their numbers.

    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    messages = messages.tolist() if isinstance(messages, np.ndarray) else messages
    if isinstance(messages, list | tuple):
        for i, message in enumerate(messages):
            if isinstance(message, Mapping):
                _check_text(message.get("content"), f"message {i}")
    canonical = canonical_chat(messages)  # refuses what is no chat
    if not all(isinstance(message, Mapping) for message in messages):
        messages = json.loads(canonical)
    return [_plain_message(message) for message in messages]


def completion_messages(completion: Completion) -> list[dict[str, Any]]:
    """Return the messages of a completion; a text becomes an assistant's message."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return plain_messages(completion) if len(completion) else []


@lru_cache(64)
def fix_date(template: str, today: str) -> str:
    """Put a fixed date into a template: one that writes today's would score otherwise tomorrow.

    >>> fix_date("It is {{ strftime_now('%d %b %Y') }}.", "2024-07-26")
    "It is {{ '26 Jul 2024' }}."
    """
    day = datetime.fromisoformat(today)
    return NOW.sub(lambda call: repr(day.strftime(call[2])), template)


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    members: dict[str, Any] = _without_none(message)
    content = members.pop("content", "")
    parts = [content] if isinstance(content, str) else content
    text = "".join(part if isinstance(part, str) else str(part["text"]) for part in parts)
    return {"role": members.pop("role"), "content": text, **members}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(member) for name, member in value.items() if member is not None}
    return [_without_none(member) for member in value] if isinstance(value, list | tuple | np.ndarray) else value


def _check_text(content: Any, place: str) -> None:
    """Refuse content that is not text: a template would write out what Python calls it, and it would be scored."""
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list | tuple | np.ndarray) else [content]
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if kind != "text" or (isinstance(part, Mapping) and not isinstance(part.get("text"), str)):
            raise ValueError(f"a scorer reads text, {place} has content of another kind: {start_of(part)}")


# Tokenizers without a limit of their own say 1e30.
NO_LIMIT = 2**30


class TruncationWarning(UserWarning):
    """A warning that some inputs were longer than the reward model reads: how many, and what was kept."""


# Each call that cuts says so; Python would show the same warning once. Filters that are set elsewhere come first.
warnings.filterwarnings("always", category=TruncationWarning, append=True)
_copies: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Text:
    """Settings by which text becomes tokens; every one is part of the scorer's fingerprint.

    A chat (a prompt that is a list of messages, or any with `chat=True`) is rendered with the reward model's own
    template, which writes the special tokens itself; a string completion is an assistant's message. A plain prompt and
    its completion are joined as they are, and the tokenizer adds its special tokens. A doubled first BOS loses one.

    What is longer than `max_length` tokens keeps its first token if that is special (BOS, CLS), and its *last* tokens:
    the beginning of the prompt is what goes. That is reported by a TruncationWarning, or is an error with
    `on_long="raise"`.
    """

    max_length: int | None = None
    """Tokens above which an input is truncated; None for what the model and its tokenizer say they can read."""
    on_long: Literal["warn", "raise"] = "warn"
    chat: bool | None = None
    """None: render prompts that are messages. True: a string prompt is a user's message. False: refuse messages."""
    template: str | None = None
    """A chat template (Jinja) in place of the tokenizer's."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Variables that are passed to the template: tools, enable_thinking, ..."""
    special_tokens: bool | None = None
    """Lets the tokenizer add its special tokens, or not; None: to plain text, not to a rendered chat."""
    append_eos: bool = False
    """Ends each input with EOS, unless it ends so already."""
    strip: tuple[str, ...] = ()
    """Strings that are taken off the end of completions first, such as an "<|im_end|>" that sampling left there."""
    today: str = "2024-07-26"
    """The date, for templates that write today's: with the true one, scores would change overnight."""

    def __post_init__(self) -> None:
        whole = isinstance(self.max_length, int) and not isinstance(self.max_length, bool)
        if self.max_length is not None and not whole:
            raise TypeError(f"Text needs max_length to be a whole number, got {self.max_length!r:.60}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"Text needs max_length >= 2, got max_length={self.max_length}")
        for name in ("chat", "special_tokens", "append_eos"):
            if not isinstance(getattr(self, name), bool | None):
                raise TypeError(f"Text needs {name} to be true or false, got {getattr(self, name)!r:.60}")
        if self.on_long not in ("warn", "raise"):
            raise ValueError(f"Text needs on_long to be 'warn' or 'raise', got on_long={self.on_long!r}")
        if isinstance(self.strip, str):
            raise TypeError(f"Text needs strip to be a tuple of ends, such as ({self.strip!r},), got {self.strip!r}")
        if self.template is not None and "{{" not in self.template:
            raise ValueError(f"Text needs template to be a template itself, in Jinja, got {start_of(self.template)}")

    def fingerprint(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """Describe the settings, and the template that they lead to."""
        settings = {**asdict(self), "strip": list(self.strip), "template": self.template or tokenizer.chat_template}
        return {name: value for name, value in settings.items() if name != "on_long"}

    def limit(self, tokenizer: "PreTrainedTokenizerBase", positions: int | None) -> int:
        """Return the most tokens of an input: `max_length`, or what the model's positions and its tokenizer allow."""
        # Some tokenizers say -1, 0 or 1, which nobody means.
        limits = [int(n) for n in (tokenizer.model_max_length, positions) if n is not None and 2 <= n < NO_LIMIT]
        if self.max_length is None:
            return min(limits, default=NO_LIMIT)
        if positions and self.max_length > positions:
            length = setting("max_length", str(self.max_length))
            raise ValueError(Message(f"the model reads at most {positions} tokens, got {length}"))
        return self.max_length

    def render(self, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, completion: Completion) -> tuple[str, bool]:
        """Write the text that is tokenised; also tell if a template wrote it."""
        completion = self.strip_ends(completion)
        if isinstance(prompt, str) and not self.chat:
            if not isinstance(completion, str):
                raise TypeError(
                    f"a prompt that is text needs a completion that is text, got {start_of(completion)}; "
                    "Text(chat=True) makes the prompt a user's message"
                )
            return prompt + completion, False
        return self._render_chat(tokenizer, self.messages(prompt) + completion_messages(completion)), True

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Return the messages of a prompt; a text becomes a user's message."""
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        if self.chat is False:
            raise TypeError(f"Text(chat=False) takes prompts that are text, got {start_of(prompt)}")
        return plain_messages(prompt)

    def opening(self, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> tuple[str, bool]:
        """Write a prompt alone, ready for its completion; also tell if a template wrote it."""
        if isinstance(prompt, str) and not self.chat:
            return prompt, False
        return self._render_chat(tokenizer, self.messages(prompt), add_generation_prompt=True), True

    def tokens(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Encode rendered texts, whole: special tokens once each, EOS if asked for, never empty."""
        ids: list[list[int]] = [[]] * len(texts)
        for rendered in (False, True):
            at = [i for i, (_, by_template) in enumerate(texts) if by_template == rendered]
            add = not rendered if self.special_tokens is None else self.special_tokens
            rows = _tokenize(tokenizer, [texts[i][0] for i in at], add) if at else []
            for i, row in zip(at, rows, strict=True):
                ids[i] = self._mend_ends(row, tokenizer, texts[i][0])
        return ids

    def encode(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        limit: int = NO_LIMIT,
    ) -> list[list[int]]:
        """Encode each pair, truncated to `limit`, which is reported."""
        texts = [self.render(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        ids = self.tokens(tokenizer, texts)
        self.report([len(row) for row in ids], limit)
        return [truncate(row, limit, tokenizer) for row in ids]

    def report(self, lengths: Sequence[int], limit: int) -> None:
        """Report inputs that are longer than the limit: by a warning, or as an error."""
        long = [length for length in lengths if length > limit]
        if long:
            message = f"{len(long)} of {len(lengths)} inputs are longer than max_length={limit} (longest: {max(long)})"
            if self.on_long == "raise":
                raise ValueError(f"{message}; shorten them, or set on_long='warn' to keep their last {limit} tokens")
            warnings.warn(f"{message}: their first tokens were left out", TruncationWarning, stacklevel=4)

    def strip_ends(self, completion: Completion) -> Completion:
        """Take the strings in `strip` off the end of a completion; of messages, off the last one's text."""
        if not isinstance(completion, str):
            if not self.strip or not len(completion):
                return completion
            *before, last = completion_messages(completion)
            return [*before, {**last, "content": self.strip_ends(last["content"])}]
        while any(end and completion.endswith(end) for end in self.strip):
            completion = completion.removesuffix(next(end for end in self.strip if end and completion.endswith(end)))
        return completion

    def _render_chat(self, tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> str:
        template = self.template or tokenizer.chat_template
        if template is None:
            raise ValueError(
                Message(
                    "the tokenizer has no chat template, and the prompt is a list of messages: "
                    f"{start_of(messages)}. Name a template with {setting('template')}, or take prompts that are text"
                )
            )
        from jinja2 import TemplateError

        # A tokenizer may have several, by name; then it picks.
        one = fix_date(template, self.today) if isinstance(template, str) else None
        options = {**self.template_options, **options, "chat_template": one}
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses {start_of(messages)}: {error}") from error

    def _mend_ends(self, row: list[int], tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and row[:2] == [bos, bos]:
            row = row[1:]
        if self.append_eos and row[-1:] != [eos]:
            if eos is None:
                raise ValueError("Text(append_eos=True) needs a tokenizer with an EOS token")
            row = [*row, eos]
        if not row:
            raise ValueError(f"an input needs at least one token, got none for {text!r}")
        return row


def truncate(row: list[int], limit: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Truncate a row to the tokens that the model reads: the first if it opens every text, and the last.

    >>> from types import SimpleNamespace
    >>> truncate([0, 5, 6, 7, 8], 3, SimpleNamespace(bos_token_id=0, cls_token_id=None))
    [0, 7, 8]
    """
    if len(row) <= limit:
        return row
    opens = row[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return row[:1] + row[len(row) - limit + 1 :] if opens else row[len(row) - limit :]


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Tokenize by a copy: the original may at this moment pad or truncate for somebody else, in another thread."""
    duplicate = _copies.get(tokenizer)
    if duplicate is None:
        duplicate = _copies.setdefault(tokenizer, copy.deepcopy(tokenizer))
    try:
        options = {"padding": False, "truncation": False, "verbose": False}
        ids: list[list[int]] = duplicate(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]
    except (TypeError, UnicodeEncodeError) as error:
        # Half a character, which JSON can hold and UTF-8 cannot.
        bad = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), texts[0])
        raise ValueError(f"the tokenizer cannot read {start_of(bad)}: {error}") from error
    return ids


@dataclass(frozen=True)
class Question:
    """A question to a judge, with {prompt} and {completion} in it, and the settings by which it becomes tokens.

    It is a user's message in the judge's own chat template, with the opening of the answer; plain text for a judge that
    has no template, or with `Text(chat=False)`. A chat in it is written `User: ...`, an empty line, `Assistant: ...`;
    a prompt of one user's message, and a completion of one assistant's, as they are. Put {prompt} first: completions of
    one prompt then share its cache, and of what is too long the prompt's beginning goes.
    """

    tokenizer: Any
    wording: str
    text: Text
    values: Mapping[str, str] = field(default_factory=dict)
    """Values for other names in braces."""
    closes: bool = False
    """Leaves its tokenizer's EOS on a question that is text: an encoder reads to it, a decoder goes on."""

    def __post_init__(self) -> None:
        if "{completion}" not in self.wording:
            raise ValueError(f"a question holds {{completion}}, and mostly {{prompt}}, got {start_of(self.wording)}")
        if self.text.append_eos:
            raise ValueError("a question goes on with its answer: it takes no EOS, got Text(append_eos=True)")

    def write(self, prompt: Prompt, completion: Completion) -> str:
        """Write the question about one completion."""
        if isinstance(completion, str):
            completion = self.text.strip_ends(completion)
        asker, answerer = format_conversation(prompt, "user"), format_conversation(completion, "assistant")
        return fill_in(self.wording, {**self.values, "prompt": asker, "completion": answerer})

    def tokens(self, prompts: Sequence[Prompt], completions: Sequence[Completion], limit: int) -> list[list[int]]:
        """Encode the questions, ready for their answers and truncated to `limit`, which is reported."""
        questions = [self.write(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        text = replace(self.text, chat=self._templated)
        rows = text.tokens(self.tokenizer, [text.opening(self.tokenizer, question) for question in questions])
        if not self._templated and not self.closes:
            # A tokenizer that ends plain text with EOS would have the judge answer after its end.
            rows = [row[:-1] if len(row) > 1 and row[-1] == self.tokenizer.eos_token_id else row for row in rows]
        text.report([len(row) for row in rows], limit)
        return [truncate(row, limit, self.tokenizer) for row in rows]

    def fingerprint(self, limit: int) -> dict[str, Any]:
        """Describe all that the tokens depend on, but for the tokenizer."""
        settings = {**self.text.fingerprint(self.tokenizer), "max_length": limit, "chat": self._templated}
        return {"question": fill_in(self.wording, self.values), "text": settings}

    @property
    def _templated(self) -> bool:
        if self.text.chat is not None:
            return self.text.chat
        return (self.text.template or self.tokenizer.chat_template) is not None


def fill_in(wording: str, values: Mapping[str, str]) -> str:
    """Put values in the place of their names in braces; braces within a value stay.

    >>> fill_in("{a} {b} {c}", {"a": "{b}", "b": "1"})
    '{b} 1 {c}'
    """
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), wording)


def format_conversation(messages: Prompt | Completion, by: str) -> str:
    """Write messages as text: a single one, if it is `by` this role, as it is; else each with its role.

    >>> format_conversation([{"role": "user", "content": "Hi"}], "user")
    'Hi'
    >>> format_conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], "user")
    'User: Hi\\n\\nAssistant: Yes?'
    """
    if isinstance(messages, str):
        return messages
    turns = json.loads(canonical_chat(messages)) if len(messages) else []
    if [turn["role"] for turn in turns] == [by] and not turns[0].get("tool_calls"):
        return _turn_text(turns[0])
    return "\n\n".join(f"{turn['role'].capitalize()}: {_turn_text(turn)}" for turn in turns)


def find_token(tokenizer: Any, text: str, what: str) -> int:
    """Find the id of a text that is a single token."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"{what} is one token of the model's, got {text!r}, which is {tokenizer.convert_ids_to_tokens(ids)}"
        )
    return int(ids[0])


def _turn_text(turn: Mapping[str, Any]) -> str:
    """Write a message's content, and the calls it makes, as JSON."""
    content = turn.get("content") or ""
    if not isinstance(content, str):
        raise TypeError(f"a judge reads messages that are text, got {start_of(content)}")
    calls = turn.get("tool_calls")
    return "\n".join([content] * bool(content) + [json.dumps(calls, ensure_ascii=False)] * bool(calls))
