"""The raw scores of a calibrated reward as a reward themselves: what calibration is compared with.

>>> from calibrated_rewards import CalibratedReward, ReferenceTable
>>> from calibrated_rewards.testing.suites import NumberScorer
>>> reward = CalibratedReward(NumberScorer(), ReferenceTable.build([("2+2=", [1.0, 2.0, 3.0, 5.0])]))
>>> reward(["2+2="], ["4"]), RawReward(reward)(["2+2="], ["4"])
([0.75], [4.0])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calibrated_rewards.prompts import Completion
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.find_prompts import select_ids
from calibrated_rewards.reward.monitoring import compute_metrics
from calibrated_rewards.table.reference_table import ReferenceTable


@dataclass(frozen=True, eq=False)
class RawReward:
    """Called as a CalibratedReward is, it gives what the reward model says; it logs quantiles all the same.

    So the curves of a run on raw scores and of one on calibrated ones have a number in common.
    """

    reward: CalibratedReward
    beta: float | None = None
    """A beta is in the unit of its reward: the calibrated one's would mean nothing here."""

    @property
    def __name__(self) -> str:
        return f"raw_{self.reward.__name__}"

    @property
    def table(self) -> ReferenceTable:
        """The references, for quantiles."""
        return self.reward.table

    @property
    def id_column(self) -> str | None:
        """The dataset column with the id by which the table knows a prompt."""
        return self.reward.id_column

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Any = None,
        *,
        log_metric: Callable[[str, float], Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The raw score of each completion."""
        scores = self.reward.score(prompts, completions, select_ids(columns, self.id_column))
        if log_metric is not None:
            for what, value in compute_metrics(scores).items():
                log_metric(f"{self.__name__}/{what}", value)
        kept = scores.known | (self.reward.on_missing != "skip")
        return [score if keep else None for score, keep in zip(scores.raw.tolist(), kept.tolist(), strict=True)]

    def raw(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> Any:
        """What the reward model says."""
        return self.reward.raw(prompts, completions)

    def rows(self, prompts: Any, ids: Sequence[Any] | None = None) -> Any:
        """Where the prompts are in the table."""
        return self.reward.rows(prompts, ids)

    def from_scores(self, prompts: Any, raw: Any, ids: Sequence[Any] | None = None) -> Any:
        """The scores as they are."""
        return raw

    def verify(self, tolerance: float | None = None) -> Any:
        """ValueError if the reward model is not the one that the table was made with."""
        return self.reward.verify(tolerance)
