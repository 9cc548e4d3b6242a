"""What to look at while a policy trains on a calibrated reward, and an alarm for a calibration that does not fit.

Before its first step the policy is the reference, so its quantiles are uniform: their mean is one half, that of their
logarithm -1. If the first few hundred are not, the rollouts of the table and those of the trainer differ: another
checkpoint, temperature, template, length limit, or reward model.
"""

import logging
import threading
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from jaxtyping import Float64, Int64

from calibrated_rewards.rewarding.scores import Scores

logger = logging.getLogger("calibrated_rewards")

# Responses that the alarm waits for, and of fewer that a first step may have, how many it takes them from.
ENOUGH, FEWEST = 256, 32
# Standard errors at which it sounds: one sound calibration in a million.
FAR = 5.0


def measures(scores: Scores) -> dict[str, float]:
    """Means over the known prompts of a batch, for a trainer's log.

    `u`: the mean quantile, which is the win rate against the reference; 1/2 at first. `log_u`: that of its logarithm
    (0 counts as 1e-3), -1 at first. `saturated`: the share above all references, where the reward can grow no more.
    `raw`: the reward model's mean score. `misses`: the share of unknown prompts.
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
    """Listens to the first responses of a training run, and warns once if their quantiles are not uniform."""

    name: str
    _u: list[Float64[np.ndarray, " _"]] = field(default_factory=list, init=False)
    _rows: list[Int64[np.ndarray, " _"]] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    done: bool = field(default=False, init=False)

    def hear(
        self,
        rows: Int64[np.ndarray, " n"],
        u: Float64[np.ndarray, " n"],
        counts: Int64[np.ndarray, " n"],
        *,
        trained: bool = False,
    ) -> None:
        """Some more responses of known prompts; `trained` says that the policy has taken steps, which ends it."""
        if self.done:
            return
        with self._lock:
            if not trained:
                self._u.append(u)
                self._rows.append(np.stack([rows, counts]))
            heard = sum(map(len, self._u))
            if heard < ENOUGH and not trained:
                return
            self.done = True
        if heard >= FEWEST:
            self._judge(np.concatenate(self._u), np.concatenate(self._rows, axis=1))

    def _judge(self, u: Float64[np.ndarray, " n"], rows: Int64[np.ndarray, "2 n"]) -> None:
        away = drift(u, rows[0], rows[1])
        if abs(away) > FAR:
            logger.warning(
                "%s: the first %d responses have a mean quantile of %.3f, %.1f standard errors from the 1/2 of "
                "the reference policy. Unless the policy has been trained already, its responses are not drawn as the "
                "table's were: look at checkpoint, temperature, top_p, length limit, chat template, and verify() the "
                "reward model",
                self.name,
                len(u),
                u.mean(),
                abs(away),
            )


def drift(u: Float64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]) -> float:
    """How many standard errors the mean quantile is from 1/2, if the policy is the reference.

    For G responses and K references of a prompt, all of one continuous law, the variance of the mean quantile is
    (G + K + 1) / (12 G K) (Mann and Whitney, 1947); ties make it smaller.

    >>> round(drift(np.array([1.0, 1.0, 0.5]), np.array([0, 0, 1]), np.array([2, 2, 4])), 3)
    1.359
    """
    prompts, where, responses = np.unique(rows, return_index=True, return_counts=True)
    references = counts[where]
    variance = (responses + references + 1) / (12 * responses * references)
    weight = responses / len(rows)
    return float((u.mean() - 0.5) / sqrt(float((weight**2 * variance).sum()))) if len(prompts) else 0.0
