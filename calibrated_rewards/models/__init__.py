"""Hugging Face checkpoints and model servers, whatever they are used for: scoring, sampling or training.

Finding out what a checkpoint holds (`checkpoints`), loading it complete (`loading`), turning prompts into tokens
(`text`), and running it so that a text has the same numbers alone, in a batch, or behind a shared prefix.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.models.batches import Budget as Budget
    from calibrated_rewards.models.text import Text as Text

# Loaded when they are asked for: they bring heavy libraries.
LAZY = {"Text": "text", "Budget": "batches"}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
