"""Which tokens of an input are the completion's, and where they are once the input is cut."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reading.decoder import common_prefix, group_of
from calibrated_rewards.reading.text import Text, kept


def starts(text: Text, tokenizer: Any, prompts: Sequence[Prompt], rows: Sequence[list[int]]) -> list[int]:
    """How many tokens of each whole input come before its completion: those that it shares with its prompt's opening.

    Where the tokenizer merges the prompt's end with the completion's beginning, the merged token is the completion's.
    """
    distinct = {group_of(prompt): prompt for prompt in prompts}
    openings = {key: text.opening(tokenizer, prompt) for key, prompt in distinct.items()}
    # An empty prompt may have no tokens at all, which is no input.
    told = {key: opening for key, opening in openings.items() if opening[0]}
    ids = replace(text, append_eos=False).tokens(tokenizer, list(told.values()))
    opened = dict(zip(told, ids, strict=True))
    pairs = zip(rows, map(group_of, prompts), strict=True)
    return [common_prefix([row, opened.get(key, [])]) for row, key in pairs]


def cut(row: list[int], limit: int, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that the model reads, and how many are left out: what stood at p, if it is there, stands at p - out.

    >>> from types import SimpleNamespace
    >>> cut([0, 5, 6, 7, 8], 3, SimpleNamespace(bos_token_id=0, cls_token_id=None))
    ([0, 7, 8], 2)
    """
    read = kept(row, limit, tokenizer)
    return read, len(row) - len(read)
