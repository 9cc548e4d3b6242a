"""Direct Preference Heads: a small reward head on a language model's own hidden states (arXiv 2405.20053).

`preference_head.py` has the head itself: pooler, layers, names, files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.heads.preference_head import (
        HeadSettings as HeadSettings,
        PreferenceHead as PreferenceHead,
    )

# Imported when they are asked for: they bring torch.
LAZY = {"HeadSettings": "preference_head", "PreferenceHead": "preference_head"}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
