"""A question about a completion, as the tokens that a language model goes on from with its answer."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from calibrated_rewards.models.text import Text, kept
from calibrated_rewards.prompts import Completion, Prompt, canonical_chat, start_of


@dataclass(frozen=True)
class Question:
    """What a judge is asked, with {prompt} and {completion} in it, and how that becomes tokens.

    It is a user's message in the judge's own chat template, with the opening of the answer; plain text for a judge that
    has no template, or with `Text(chat=False)`. A chat in it is written `User: ...`, an empty line, `Assistant: ...`;
    a prompt of one user's message, and a completion of one assistant's, as they are. Put {prompt} first: completions of
    one prompt then share its cache, and of what is too long the prompt's beginning goes.
    """

    tokenizer: Any
    wording: str
    text: Text
    values: Mapping[str, str] = field(default_factory=dict)
    """What else is filled in: names that stand in braces."""
    closes: bool = False
    """Whether a question that is text keeps the EOS of its tokenizer: an encoder reads to it, a decoder goes on."""

    def __post_init__(self) -> None:
        if "{completion}" not in self.wording:
            raise ValueError(f"a question holds {{completion}}, and mostly {{prompt}}, got {start_of(self.wording)}")
        if self.text.append_eos:
            raise ValueError("a question goes on with its answer: it takes no EOS, got Text(append_eos=True)")

    def written(self, prompt: Prompt, completion: Completion) -> str:
        """The question about one completion."""
        if isinstance(completion, str):
            completion = self.text.stripped(completion)
        told = {"prompt": conversation(prompt, "user"), "completion": conversation(completion, "assistant")}
        return filled(self.wording, {**self.values, **told})

    def tokens(self, prompts: Sequence[Prompt], completions: Sequence[Completion], limit: int) -> list[list[int]]:
        """The ids of the questions, ready for their answers and cut to `limit`, which is reported."""
        asked = [self.written(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        text = replace(self.text, chat=self._templated)
        rows = text.tokens(self.tokenizer, [text.opening(self.tokenizer, question) for question in asked])
        if not self._templated and not self.closes:
            # A tokenizer that ends plain text with EOS would have the judge answer after its end.
            rows = [row[:-1] if len(row) > 1 and row[-1] == self.tokenizer.eos_token_id else row for row in rows]
        text.report([len(row) for row in rows], limit)
        return [kept(row, limit, self.tokenizer) for row in rows]

    def fingerprint(self, limit: int) -> dict[str, Any]:
        """What the tokens depend on, but for the tokenizer."""
        settings = {**self.text.fingerprint(self.tokenizer), "max_length": limit, "chat": self._templated}
        return {"question": filled(self.wording, self.values), "text": settings}

    @property
    def _templated(self) -> bool:
        if self.text.chat is not None:
            return self.text.chat
        return (self.text.template or self.tokenizer.chat_template) is not None


def filled(wording: str, values: Mapping[str, str]) -> str:
    """The values in place of their names in braces; what a value itself has in braces stays.

    >>> filled("{a} {b} {c}", {"a": "{b}", "b": "1"})
    '{b} 1 {c}'
    """
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), wording)


def conversation(messages: Prompt | Completion, by: str) -> str:
    """Messages as text: the only one, if it is `by` this role, as it is; else each with its role.

    >>> conversation([{"role": "user", "content": "Hi"}], "user")
    'Hi'
    >>> conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], "user")
    'User: Hi\\n\\nAssistant: Yes?'
    """
    if isinstance(messages, str):
        return messages
    turns = json.loads(canonical_chat(messages)) if len(messages) else []
    if [turn["role"] for turn in turns] == [by] and not turns[0].get("tool_calls"):
        return _said(turns[0])
    return "\n\n".join(f"{turn['role'].capitalize()}: {_said(turn)}" for turn in turns)


def one_token(tokenizer: Any, text: str, what: str) -> int:
    """The id of a text that is a single token."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"{what} is one token of the model's, got {text!r}, which is {tokenizer.convert_ids_to_tokens(ids)}"
        )
    return int(ids[0])


def _said(turn: Mapping[str, Any]) -> str:
    """A message's content, and the calls it makes, as JSON."""
    content = turn.get("content") or ""
    if not isinstance(content, str):
        raise TypeError(f"a judge reads messages that are text, got {start_of(content)}")
    calls = turn.get("tool_calls")
    return "\n".join([content] * bool(content) + [json.dumps(calls, ensure_ascii=False)] * bool(calls))
