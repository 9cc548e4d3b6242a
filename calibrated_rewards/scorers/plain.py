"""Prompts and completions in the one form that JSON has for them."""

import json
from typing import Any

from calibrated_rewards.prompts import Completion, Prompt, canonical_chat


def plain(said: Prompt | Completion) -> Any:
    """A text as it is; messages as lists and dicts, the same for all ways to write the same messages.

    >>> plain([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}])
    [{'content': 'Hi', 'role': 'user'}]
    """
    if isinstance(said, str):
        return said
    return json.loads(canonical_chat(said)) if len(said) else []
