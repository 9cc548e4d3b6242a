"""The counts of a reward server, in Prometheus' text format."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from calibrated_rewards.reward.lookup import Score

SIZE, LATENCY = "Completions that the reward model is given at once", "Seconds from a request's headers to its answer"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counts of one server, in a registry of its own; all are there from the start, at 0."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "calibrated_reward", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by dialect and status", ("dialect", "status"), **own)
        self.pairs = Counter("pairs", "Completions scored", **own)
        self.misses = Counter("misses", "Completions whose prompt the table does not have", **own)
        self.saturated = Counter("saturated", "Completions below or above all references of their prompt", **own)
        self.failures = Counter("failures", "Requests that the reward model failed on", **own)
        self.queue = Gauge("queue", "Completions that wait for the reward model", **own)
        self.batch_size = Histogram("batch_size", SIZE, buckets=SIZES, **own)
        self.latency = Histogram("latency_seconds", LATENCY, buckets=SECONDS, **own)
        self.u = Summary("u", "Quantiles of known prompts: their mean is sum / count", **own)

    def count_scores(self, scores: Sequence[Score]) -> None:
        """Count completions by what their scores say of them."""
        known = [score.u for score in scores if score.known]
        self.pairs.inc(len(scores))
        self.misses.inc(len(scores) - len(known))
        self.saturated.inc(sum(u <= 0.0 or u >= 1.0 for u in known))
        for u in known:
            self.u.observe(u)

    def page(self) -> bytes:
        """Write the page that Prometheus reads."""
        return generate_latest(self.registry)
