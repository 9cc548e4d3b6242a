"""The quantile of a completion as a score: what procedures with a threshold or a temperature select by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.scorers.protocol import fingerprint


@dataclass(frozen=True, eq=False)
class Quantiles:
    """A scorer that gives the quantile of Eq. 12, whatever the transform of the reward.

    >>> from calibrated_rewards import ReferenceTable
    >>> from calibrated_rewards.testing.suites import NumberScorer
    >>> table = ReferenceTable.build([("2+2=", [1.0, 2.0, 3.0, 5.0])])
    >>> Quantiles(CalibratedReward(NumberScorer(), table))(["2+2=", "2+2="], ["4", "3"])
    array([0.75 , 0.625], dtype=float32)
    """

    reward: CalibratedReward

    thread_safe = property(lambda self: self.reward.thread_safe, doc="True if the reward's scorer is.")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt; UnknownPromptError for one without references (`on_missing`)."""
        return self.reward.calibrated(prompts, completions).astype(np.float32)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without references, before anything is drawn for it: UnknownPromptError (`on_missing`)."""
        self.reward.check(prompts)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on: the reward model, and the references."""
        reward = self.reward
        table = {"table": reward.table.describe(), "meta": reward.table.meta}
        return {"kind": "quantiles", "of": fingerprint(reward.scorer), **table, "calibration": repr(reward.calibration)}
