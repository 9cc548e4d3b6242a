"""What Prometheus reads of a reward server."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from calibrated_rewards.reward.scores import Score

PREFIX = "calibrated_reward"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True, eq=False)
class Metrics:
    """The counts of one server, in a registry of its own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    @cached_property
    def requests(self) -> Counter:
        """Requests, by dialect and status."""
        return self._counter("requests", "Requests, by dialect and status", "dialect", "status")

    @cached_property
    def pairs(self) -> Counter:
        """Completions scored."""
        return self._counter("pairs", "Completions scored")

    @cached_property
    def misses(self) -> Counter:
        """Completions of unknown prompts."""
        return self._counter("misses", "Completions whose prompt the table does not have")

    @cached_property
    def saturated(self) -> Counter:
        """Completions with a quantile of 0 or 1."""
        return self._counter("saturated", "Completions below or above all references of their prompt")

    @cached_property
    def failures(self) -> Counter:
        """Requests that the reward model failed on."""
        return self._counter("failures", "Requests that the reward model failed on")

    @cached_property
    def queue(self) -> Gauge:
        """Completions that wait."""
        return Gauge(f"{PREFIX}_queue", "Completions that wait for the reward model", registry=self.registry)

    @cached_property
    def batch_size(self) -> Histogram:
        """Completions that the reward model is given at once."""
        told = "Completions that the reward model is given at once"
        return Histogram(f"{PREFIX}_batch_size", told, buckets=SIZES, registry=self.registry)

    @cached_property
    def latency(self) -> Histogram:
        """Seconds of a request."""
        told = "Seconds from a request's headers to its answer"
        return Histogram(f"{PREFIX}_latency_seconds", told, buckets=SECONDS, registry=self.registry)

    @cached_property
    def u(self) -> Summary:
        """Quantiles: their mean is sum / count."""
        return Summary(f"{PREFIX}_u", "Quantiles of known prompts: their mean is sum / count", registry=self.registry)

    def __post_init__(self) -> None:
        # All of them from the start: a count that is not there yet is not the same as 0.
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                getattr(self, name)

    def tell(self, scores: Sequence[Score]) -> None:
        """Count what was scored."""
        self.pairs.inc(len(scores))
        self.misses.inc(sum(not score.known for score in scores))
        known = [score.u for score in scores if score.known]
        self.saturated.inc(sum(u <= 0.0 or u >= 1.0 for u in known))
        for u in known:
            self.u.observe(u)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", told, labels, registry=self.registry)

    def page(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
