"""How long drawing, scoring and looking up take in a training run, for its log."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.scorers.protocol import call, fingerprint, is_thread_safe, reads_messages
from calibrated_rewards.training.raw import RawReward


@dataclass
class Seconds:
    """Those that were spent so far."""

    spent: float = 0.0

    def __call__(self, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Do the work, and add its time."""
        began = perf_counter()
        try:
            return work(*given, **named)
        finally:
            self.spent += perf_counter() - began


@dataclass(frozen=True, eq=False)
class TimedScorer:
    """A reward model by the clock."""

    scorer: Any
    seconds: Seconds

    def __call__(self, prompts: Any, completions: Any) -> Any:
        """Its scores."""
        return self.seconds(call, self.scorer, prompts, completions)

    @property
    def reads_messages(self) -> bool:
        """Whether the reward model reads messages."""
        return reads_messages(self.scorer)

    @property
    def thread_safe(self) -> bool:
        """Whether the reward model says so."""
        return is_thread_safe(self.scorer)

    def fingerprint(self) -> dict[str, Any]:
        """That of the reward model."""
        return fingerprint(self.scorer)


@dataclass(frozen=True, eq=False)
class TimedReward:
    """A reward that logs the seconds that it takes, and how many of them its reward model does not."""

    reward: Any
    scoring: Seconds | None = field(default_factory=Seconds)
    """None where it is not known what calls a reward model."""

    @classmethod
    def of(cls, reward: Any) -> "TimedReward":
        """Any reward that TRL can call."""
        if isinstance(reward, RawReward):
            inner = cls.of(reward.reward)
            return cls(replace(reward, reward=inner.reward), inner.scoring)
        if not isinstance(reward, CalibratedReward):
            return cls(reward, None)
        seconds = Seconds()
        return cls(replace(reward, scorer=TimedScorer(reward.scorer, seconds), name=reward.__name__), seconds)

    @property
    def __name__(self) -> str:
        return str(getattr(self.reward, "__name__", type(self.reward).__name__))

    def __call__(self, *, log_metric: Callable[[str, float], Any], **given: Any) -> Any:
        """The rewards."""
        whole, before = Seconds(), self.scoring.spent if self.scoring else 0.0
        rewards = whole(self.reward, log_metric=log_metric, **given)
        log_metric("seconds_scoring", whole.spent)
        if self.scoring is not None:
            log_metric("seconds_lookup", whole.spent - (self.scoring.spent - before))
        return rewards


@dataclass(frozen=True, eq=False)
class TimedDrawing:
    """A trainer's own function for completions, by the clock."""

    draw: Callable[..., Any]
    log_metric: Callable[[str, float], Any]

    def __call__(self, *given: Any, **named: Any) -> Any:
        """The completions."""
        seconds = Seconds()
        drawn = seconds(self.draw, *given, **named)
        self.log_metric("seconds_drawing", seconds.spent)
        return drawn
