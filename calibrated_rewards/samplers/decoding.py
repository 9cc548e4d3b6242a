"""Decoding settings: what the trainer will use, and calibration with it, whatever the engine calls them."""

from dataclasses import asdict, dataclass
from math import isfinite
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn. They belong to the reference policy: other settings are another policy.

    The defaults are those under which a KL to the reference is what RLHF's objective means: nothing but temperature
    bends the model's distribution. With top_p, top_k or min_p the reference gives some completions no probability.

    >>> Decoding(max_tokens=128, temperature=0.8)
    Decoding(max_tokens=128, temperature=0.8, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, stop=(), ...)
    """

    max_tokens: int
    """Most tokens of a completion; give the trainer's own number: a completion that is cut is another one."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the model's own end tokens; they are cut off. Special tokens are no
    text: with a transformers model one of them, such as "<|im_end|>", is taken by its id; else give stop_token_ids."""
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError(f"Decoding needs stop to be a tuple of texts, such as ({self.stop!r},), got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(map(_whole, self.stop_token_ids)))
        object.__setattr__(self, "max_tokens", _whole(self.max_tokens))
        object.__setattr__(self, "top_k", _whole(self.top_k))
        rules = {
            "a whole max_tokens >= 1": _is_count(self.max_tokens, 1),
            # Logits are divided by it, and must stay finite.
            "a finite temperature > 0, of 1e-4 or more (K greedy completions are one)": self.temperature >= 1e-4
            and isfinite(self.temperature),
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "a whole top_k >= 0": _is_count(self.top_k, 0),
            "0 <= min_p < 1": 0 <= self.min_p < 1,
            "a finite repetition_penalty > 0": isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "stop texts that are not empty": all(isinstance(text, str) and text for text in self.stop),
            "whole stop_token_ids >= 0": all(_is_count(token, 0) for token in self.stop_token_ids),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"Decoding needs {rule}, got {self!r}")

    def fingerprint(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        return {**asdict(self), "stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}


def _whole(value: Any) -> Any:
    """A whole number as an int, whatever its type, as JSON and sums may have it; anything else as it is."""
    counts = isinstance(value, Real) and not isinstance(value, bool)
    return int(value) if counts and value % 1 == 0 else value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
