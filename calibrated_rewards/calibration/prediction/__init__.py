"""Predict the reference quantiles of prompts that no table has, from their features.

`prediction` holds `fit` and its result, `Amortised`; `conditional` the model of a distribution given features, which
`regression` fits; `judgement` its errors; `prompt_features` the features that a reward model has of a prompt.

>>> import numpy as np
>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> rng = np.random.default_rng(0)
>>> prompts = ["a" * n for n in range(1, 61)]
>>> table = ReferenceTable.build([(prompt, len(prompt) + rng.normal(size=32)) for prompt in prompts])
>>> length = lambda prompts: np.array([[len(prompt)] for prompt in prompts], np.float32)
>>> amortised = fit(table, prompts, length, network=False)
>>> amortised.quantiles(["b" * 70], [0.1, 0.5, 0.9]).round()   # no further than the table's own prompts
array([[59., 60., 61.]])
>>> amortised.errors.chosen
'+ location'
"""

from typing import TYPE_CHECKING, Any

from calibrated_rewards.calibration.prediction.judgement import Errors as Errors
from calibrated_rewards.calibration.prediction.prediction import (
    Amortised as Amortised,
    Features as Features,
    fit as fit,
)

if TYPE_CHECKING:
    from calibrated_rewards.calibration.prediction.prompt_features import PromptFeatures as PromptFeatures


def __getattr__(name: str) -> Any:
    """Import `PromptFeatures` when it is asked for: it brings torch."""
    if name != "PromptFeatures":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from calibrated_rewards.calibration.prediction.prompt_features import PromptFeatures

    return PromptFeatures
