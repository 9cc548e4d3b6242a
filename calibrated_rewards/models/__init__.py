"""Hugging Face checkpoints and model servers, whatever they are used for: scoring, sampling or training.

`checkpoints` finds out what a checkpoint holds, `loading` loads it complete, `lazy` at its first use. `text` turns
prompts and completions into tokens. A decoder is read behind a shared prefix (`shared_prefix`), any model through its
own forward (`own_forward`), in `batches`, with heads of float32 (`parts`, `vocabulary_head`), and is left `unchanged`:
a text has the same numbers alone, in a batch, or behind a prefix. `labels` and `label_names` make one score of a
classifier's outputs. `fingerprint` and `callable_fingerprint` tell two models or functions apart. `http_client` and
`server_address` ask a server without showing its secrets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.models.batches import Budget as Budget
    from calibrated_rewards.models.labels import (
        Difference as Difference,
        Expected as Expected,
        Label as Label,
        Levels as Levels,
        Ordinal as Ordinal,
        Weighted as Weighted,
    )
    from calibrated_rewards.models.loading import Placement as Placement
    from calibrated_rewards.models.text import Text as Text

# Imported when they are asked for: some bring heavy libraries.
LAZY = {"Text": "text", "Budget": "batches", "Placement": "loading"}
LAZY |= dict.fromkeys(("Difference", "Expected", "Label", "Levels", "Ordinal", "Weighted"), "labels")


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
