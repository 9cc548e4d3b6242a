"""What to expect of training before it, and what came of it after: win rates and KL, with their errors.

`win_rate` and `predict` work on samples; `evaluate` draws, judges and compares policies; `reweighted` is the frontier
of any reward without training; `expect` says what training on a table gives; `report` is one page of all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.evaluation.estimates import Estimate as Estimate, Samples as Samples
from calibrated_rewards.evaluation.win_rate import Prediction as Prediction, predict as predict, win_rate as win_rate

if TYPE_CHECKING:
    from calibrated_rewards.evaluation.expectations import Expectation as Expectation, expect as expect
    from calibrated_rewards.evaluation.frontier import reweighted as reweighted
    from calibrated_rewards.evaluation.policies import evaluate as evaluate

# Loaded when they are asked for: they bring heavy libraries.
LAZY = {"evaluate": "policies", "reweighted": "frontier", "Expectation": "expectations", "expect": "expectations"}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
