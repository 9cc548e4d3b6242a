"""The end of a turn: the token at which a preference head reads, and inputs that end in it.

A head that read the last end-of-turn token of a text without one after its completion would score the user's turn. So
every input is made to end in the token: what a template writes behind it is cut off, and where it is missing, it is
added. The head then reads at the last position of each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.text import NO_LIMIT, Text, truncate
from calibrated_rewards.prompts import Completion, Prompt

# A content that no template changes.
MARK = "calibrated"


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends an assistant's turn, and what the template writes behind it."""

    token: str
    id: int
    tail: tuple[int, ...] = ()
    """Ids behind the token at the end of a rendered chat, such as that of a line break."""

    def finish(self, row: list[int]) -> list[int]:
        """Return a row that ends in the token, without what the template wrote behind it.

        >>> end = TurnEnd("<|im_end|>", 2, tail=(198,))
        >>> end.finish([7, 2, 198]), end.finish([7, 2]), end.finish([7])
        ([7, 2], [7, 2], [7, 2])
        """
        whole = [self.id, *self.tail]
        if self.tail and row[-len(whole) :] == whole:
            return row[: len(row) - len(self.tail)]
        return row if row[-1:] == [self.id] else [*row, self.id]


def find_turn_end(tokenizer: Any, text: Text | None = None, token: str | None = None) -> TurnEnd:
    """Find the end-of-turn token: the one named, else the first that the template writes behind an answer, else EOS."""
    text = text or Text()
    behind = _tokens_behind(tokenizer, text)
    if token is None:
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        at = next((i for i in behind if i in special), tokenizer.eos_token_id)
        if at is None:
            end = setting("end_token", "...")
            raise ValueError(Message(f"a head reads at an end-of-turn token, and the tokenizer has no EOS: say {end}"))
    else:
        at = tokenizer.convert_tokens_to_ids(token)
        if at is None or (at == tokenizer.unk_token_id and token != tokenizer.unk_token):
            end = setting("end_token", token or "''")
            raise ValueError(Message(f"a head reads at an end-of-turn token that the tokenizer knows, got {end}"))
    tail = behind[behind.index(at) + 1 :] if at in behind else []
    return TurnEnd(str(tokenizer.convert_ids_to_tokens(at)), int(at), tuple(tail))


def encode_turns(
    tokenizer: Any,
    text: Text,
    end: TurnEnd,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    limit: int = NO_LIMIT,
) -> list[list[int]]:
    """Encode pairs as rows that end in the end-of-turn token, of at most `limit` tokens, the last ones of each."""
    texts = [
        text.render(tokenizer, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    rows = [end.finish(row) for row in text.tokens(tokenizer, texts)]
    text.report([len(row) for row in rows], limit)
    return [truncate(row, limit, tokenizer) for row in rows]


def _tokens_behind(tokenizer: Any, text: Text) -> list[int]:
    """Return the ids that the template writes behind an assistant's message; none without a template."""
    if text.chat is False or (text.template or tokenizer.chat_template) is None:
        return []
    messages = [{"role": "user", "content": MARK}]
    written, _ = text.render(tokenizer, messages, MARK)
    behind = written.rpartition(MARK)[2]
    return list(tokenizer(behind, add_special_tokens=False)["input_ids"]) if behind else []
