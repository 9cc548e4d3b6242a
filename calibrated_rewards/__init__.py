"""InfAlign-CTRL: rewards calibrated against a reference policy, transformed for the way the policy will be served.

`theory` says what to expect of a policy before it is trained, `evaluation` what came of it.

>>> import calibrated_rewards as cr
>>> table = cr.ReferenceTable.build([("2+2=", [0.1, 0.5, 0.9, 1.3])])
>>> u = cr.EmpiricalCDF()(table, table.rows(["2+2="]), [1.0])
>>> cr.scaled(cr.Exponential(10.0), "unit")(u).round(4)
array([0.082])
"""

from typing import TYPE_CHECKING, Any

from calibrated_rewards import evaluation as evaluation, theory as theory
from calibrated_rewards.prompts import (
    UnknownPromptError as UnknownPromptError,
    id_key as id_key,
    prompt_key as prompt_key,
)
from calibrated_rewards.reward.calibrated_reward import CalibratedReward as CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF as EmpiricalCDF
from calibrated_rewards.table.reference_table import (
    ReferenceTable as ReferenceTable,
)
from calibrated_rewards.theory.mixtures import BestOfUpTo as BestOfUpTo
from calibrated_rewards.theory.optimum import optimal_transform as optimal_transform, optimum as optimum, tune as tune
from calibrated_rewards.theory.procedures import (
    BestOf as BestOf,
    RewindAndRepeat as RewindAndRepeat,
    SoftBestOf as SoftBestOf,
    Standard as Standard,
    WorstOf as WorstOf,
)
from calibrated_rewards.theory.scale import scaled as scaled
from calibrated_rewards.theory.transforms import (
    Chain as Chain,
    Exponential as Exponential,
    Identity as Identity,
    Log as Log,
    Tabulated as Tabulated,
)

if TYPE_CHECKING:
    from calibrated_rewards.evaluation.recommend import recommend as recommend

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `recommend` when it is asked for: it brings scipy's solvers."""
    if name != "recommend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from calibrated_rewards.evaluation.recommend import recommend

    return recommend
