"""What `Text` means where a server may be the one that makes tokens of it."""

from dataclasses import asdict
from typing import Any

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
