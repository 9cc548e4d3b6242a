"""CalibratedReward: a reward model, the table of its reference scores and a transform, as one reward for a trainer.

A raw score becomes its rank among the prompt's references (`calibrators`), the rank a value (`lookup`).
`CombinedReward` joins several; `frameworks` is what adapters for trainers are made of.
"""

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
from calibrated_rewards.reward.combined import (
    And as And,
    CombinedReward as CombinedReward,
    Lowest as Lowest,
    Or as Or,
    WeightedMean as WeightedMean,
)
from calibrated_rewards.reward.frameworks import configured as configured
from calibrated_rewards.reward.originals import Originals as Originals
from calibrated_rewards.reward.scores import Score as Score, Scores as Scores
