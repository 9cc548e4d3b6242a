"""CalibratedReward: a reward model, the table of its reference scores and a transform, as one reward for a trainer.

`find_prompts` finds what a trainer passes in the table and explains unknown prompts, `completions` converts completions
to the form that they had in calibration. `calibrators` compare a raw score with the prompt's references, `lookup` turns
the rank into a reward, on a GPU too. `combined` joins several rewards, `batching` scores single completions together,
`frameworks` has the building blocks of adapters. `verification` checks the reward model, `monitoring` a training run;
`saving` is the directory of `save_pretrained`, `hub` its card and its upload. `quantiles` has the quantile as a scorer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.reward.calibrated_reward import CalibratedReward as CalibratedReward
from calibrated_rewards.reward.calibrators import (
    Calibration as Calibration,
    EmpiricalCDF as EmpiricalCDF,
    LogSigmoidAtQuantile as LogSigmoidAtQuantile,
    MedianCentered as MedianCentered,
    SmoothedCDF as SmoothedCDF,
    Uncalibrated as Uncalibrated,
    ZScore as ZScore,
)
from calibrated_rewards.reward.find_prompts import Originals as Originals
from calibrated_rewards.reward.lookup import Score as Score, Scores as Scores
from calibrated_rewards.reward.verification import Verification as Verification

if TYPE_CHECKING:
    from calibrated_rewards.reward.batching import ascore as ascore, ascore_one as ascore_one, score_one as score_one
    from calibrated_rewards.reward.combined import (
        And as And,
        CombinedReward as CombinedReward,
        Lowest as Lowest,
        Or as Or,
        WeightedMean as WeightedMean,
    )
    from calibrated_rewards.reward.frameworks import (
        completion_of as completion_of,
        configured as configured,
        details as details,
        identifier as identifier,
        loud as loud,
        number as number,
    )
    from calibrated_rewards.reward.quantiles import Quantiles as Quantiles
    from calibrated_rewards.reward.saving import load_reward as load_reward

# Loaded when they are asked for, to keep `import calibrated_rewards` quick.
LAZY = {
    **dict.fromkeys(("ascore", "ascore_one", "score_one"), "batching"),
    **dict.fromkeys(("And", "CombinedReward", "Lowest", "Or", "WeightedMean"), "combined"),
    **dict.fromkeys(("completion_of", "configured", "details", "identifier", "loud", "number"), "frameworks"),
    "Quantiles": "quantiles",
    "load_reward": "saving",
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
