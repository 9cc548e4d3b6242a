"""What the dialects share: `Text` where a server may make the tokens, and numbers as servers write them."""

from dataclasses import asdict
from typing import Any

from calibrated_rewards.prompts import start_of
from calibrated_rewards.reading.text import Text


def check_plain(text: Text) -> None:
    """Refuse settings that need a tokenizer, where there is none: only `strip` and `chat` do not."""
    if text != Text(strip=text.strip, chat=text.chat):
        raise ValueError(f"without a tokenizer the server makes tokens its own way, got {text}: give tokenizer=")


def text_fingerprint(text: Text, tokenizer: Any) -> dict[str, Any]:
    """The settings; with a tokenizer, what it does to text."""
    if tokenizer is None:
        return asdict(text)
    from calibrated_rewards.reading.fingerprint import tokenizer_digest

    return {**text.fingerprint(tokenizer), "tokenizer": tokenizer_digest(tokenizer)}


def numbers(said: Any) -> list[float]:
    """A JSON list of numbers, each alone or in a list of its own; a ValueError for anything that only looks like one.

    >>> numbers([1, [2.5]])
    [1.0, 2.5]
    >>> numbers("12")
    Traceback (most recent call last):
    ValueError: scores are a list of numbers, got '12'
    """
    inside = [x[0] if isinstance(x, list) and len(x) == 1 else x for x in said] if isinstance(said, list) else [said]
    if not isinstance(said, list) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in inside):
        raise ValueError(f"scores are a list of numbers, got {start_of(said)}")
    return [float(x) for x in inside]
