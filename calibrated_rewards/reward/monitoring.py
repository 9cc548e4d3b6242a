"""Metrics of a training run on a calibrated reward, and an alarm for a table that does not fit the policy.

Before its first step the policy is the reference, so its quantiles are uniform: their mean is one half, that of their
logarithm -1. If the first few hundred are not, the rollouts of the table and those of the trainer differ: another
checkpoint, temperature, template, length limit, or reward model.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from calibrated_rewards.prompts import Completion
from calibrated_rewards.reward.lookup import Scores
from calibrated_rewards.table.reference_table import ReferenceTable

Rows: TypeAlias = Int64[np.ndarray, " n"]
Quantiles: TypeAlias = Float64[np.ndarray, " n"]
Responses: TypeAlias = tuple[Rows, Quantiles, Sequence[Completion]]
logger = logging.getLogger("calibrated_rewards")

# Responses that the alarm waits for, and the fewest that it judges when the first step ends the wait.
ENOUGH, FEWEST = 256, 32
# References that it takes to estimate how log u varies.
FEWEST_REFERENCES = 8
# Standard errors at which the alarm warns: one correct calibration in a million.
FAR = 5.0


def compute_metrics(scores: Scores) -> dict[str, float]:
    """Compute means over the known prompts of a batch, for a trainer's log.

    `u`: the mean quantile, which is the win rate against the reference; 1/2 at first. `log_u`: the mean logarithm of
    the quantile (0 counts as 1e-3), -1 at first. `saturated`: the share above all references, where the
    reward can grow no more. `raw`: the reward model's mean score. `misses`: the share of unknown prompts.
    """
    known = scores.known
    if not known.any():  # the same names always: trainers average them over processes
        return {"u": 0.5, "log_u": -1.0, "saturated": 0.0, "raw": 0.0, "misses": float(len(known) > 0)}
    u = scores.u[known]
    return {
        "u": float(u.mean()),
        "log_u": float(np.log(np.maximum(u, 1e-3)).mean()),
        "saturated": float((u >= 1).mean()),
        "raw": float(scores.raw[known].mean()),
        "misses": float((~known).mean()),
    }


@dataclass(eq=False)
class Alarm:
    """Collects the first responses of a training run, and warns once if their quantiles are not uniform."""

    name: str
    table: ReferenceTable
    _parts: list[tuple[Rows, Quantiles]] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    heard: int = field(default=0, init=False)
    done: bool = field(default=False, init=False)

    def hear(self, rows: Rows, u: Quantiles) -> None:
        """Add some more responses of known prompts, and judge as soon as there are enough."""
        with self._lock:
            if self.done:
                return
            self._parts.append((rows, u))
            self.heard += len(rows)
        if self.heard >= ENOUGH:
            self.finish()

    def hear_all(self, batches: list[Responses]) -> None:
        """Empty a list of batches, and add the responses to known prompts in each of them, without repeats."""
        while batches:
            try:
                batch = batches.pop(0)
            except IndexError:  # another thread was quicker
                return
            self.hear(*drop_repeats(*batch))

    def finish(self) -> None:
        """Judge what was collected, once: later responses are not those of the reference policy."""
        with self._lock:
            if self.done:
                return
            self.done, parts, self._parts = True, self._parts, []
        if sum(len(part) for part, _ in parts) < FEWEST:
            return
        rows, u = np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts])
        mean_errors = drift(rows, u, self.table.counts(rows))
        log_errors = log_drift(rows, u, self.table)
        if max(abs(mean_errors), abs(log_errors)) > FAR:
            logger.warning(
                "%s: the first %d responses have a mean quantile of %.3f, %.1f standard errors from the 1/2 of the "
                "reference policy, and a mean logarithm of it %.1f from what that has. Unless the policy has been "
                "trained already, its responses are not drawn as the table's were: look at checkpoint, temperature, "
                "top_p, length limit, chat template, and verify() the reward model",
                self.name,
                len(u),
                u.mean(),
                abs(mean_errors),
                abs(log_errors),
            )


def drop_repeats(
    rows: Rows, u: Quantiles, completions: Sequence[Completion]
) -> tuple[Int64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Drop unknown prompts, and all but the first of equal completions of the same prompt."""
    first_of = {
        (row, repr(c)): at for at, (row, c) in reversed([*enumerate(zip(rows.tolist(), completions, strict=True))])
    }
    first = np.array(sorted(at for (row, _), at in first_of.items() if row >= 0), np.int64)
    return rows[first], u[first]


def drift(rows: Rows, u: Quantiles, counts: Int64[np.ndarray, " n"]) -> float:
    """Standard errors between the mean quantile and 1/2, if the policy is the reference.

    For G responses and K references of a prompt, all of one continuous law, the variance of the mean quantile is
    (G + K + 1) / (12 G K) (Mann and Whitney, 1947); ties make it smaller.

    >>> round(drift(np.array([0, 0, 1]), np.array([1.0, 1.0, 0.5]), np.array([2, 2, 4])), 3)
    1.359
    """
    _, where, responses = np.unique(rows, return_index=True, return_counts=True)
    references = counts[where]
    variance = (responses + references + 1) / (12 * responses * references)
    weight = responses / len(rows)
    return float((u.mean() - 0.5) / sqrt(float((weight**2 * variance).sum())))


def log_drift(rows: Rows, u: Quantiles, table: ReferenceTable) -> float:
    """Standard errors between the mean of log u and that of the reference: -1, or another number where references tie.

    Its expectation and variance are estimated from the references themselves; prompts with few are left out.
    """
    gap, variance = 0.0, 0.0
    for row in np.unique(rows).tolist():
        references = table.scores(row)
        if len(references) < FEWEST_REFERENCES:
            continue
        floor = 0.5 / len(references)
        expected = np.log(np.maximum(table.cdf(np.full(len(references), row), references), floor))
        observed = np.log(np.maximum(u[rows == row], floor))
        weight = len(observed) / len(rows)
        gap += weight * (observed.mean() - expected.mean())
        variance += weight**2 * float(expected.var()) * (1 / len(observed) + 1 / len(references))
    return gap / sqrt(variance) if variance else 0.0
