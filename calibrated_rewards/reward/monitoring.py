"""Special tokens that a trainer leaves at the end of completions: taken off, or at least seen.

>>> without(("<|im_end|>", "<pad>"), "Hello!<|im_end|><pad><pad>")
'Hello!'

What to look at while a policy trains on a calibrated reward, and an alarm for a calibration that does not fit.

Before its first step the policy is the reference, so its quantiles are uniform: their mean is one half, that of their
logarithm -1. If the first few hundred are not, the rollouts of the table and those of the trainer differ: another
checkpoint, temperature, template, length limit, or reward model.
"""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from calibrated_rewards.prompts import Completion
from calibrated_rewards.reward.scores import Scores
from calibrated_rewards.table.reference_table import ReferenceTable

logger = logging.getLogger("calibrated_rewards")
_SPECIAL = re.compile(r"(<\|[^<>|\s]{1,30}\|>|</s>|<(?:eos|pad|end_of_turn)>|\[(?:EOS|PAD|SEP)\])\s*$")


def without(endings: Sequence[str], completion: Completion) -> Completion:
    """A text without these at its end, however many there are; messages as they are."""
    while isinstance(completion, str) and (found := next(filter(completion.endswith, filter(None, endings)), None)):
        completion = completion.removesuffix(found)
    return completion


@dataclass
class EndingsWatch:
    """Says, once, that completions end with what looks like a special token: the calibration had none."""

    told: bool = False

    def look(self, name: str, completions: Sequence[Completion]) -> None:
        """At completions as the reward model is about to read them."""
        found = None if self.told else left_over(completions)
        if found is not None:
            self.told = True
            logger.warning(
                "%s: a completion ends with %r, which looks like a special token that the trainer left there, and "
                "the reward model will read it. If so, say endings=(%r,)",
                name,
                found,
                found,
            )


def left_over(completions: Sequence[Completion]) -> str | None:
    """What looks like a special token at the end of a text.

    >>> left_over(["Hello!", "Hi</s>"])
    '</s>'
    """
    texts = (text for text in completions if isinstance(text, str) and text.endswith((">", "]")))
    return next((found[1] for text in texts if (found := _SPECIAL.search(text))), None)


Rows: TypeAlias = Int64[np.ndarray, " n"]
Quantiles: TypeAlias = Float64[np.ndarray, " n"]
logger = logging.getLogger("calibrated_rewards")

# Responses that the alarm waits for, and of fewer that a first step may have, how many it takes them from.
ENOUGH, FEWEST = 256, 32
# References that it takes to say how log u varies.
FEWEST_REFERENCES = 8
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
    table: ReferenceTable
    _heard: list[tuple[Rows, Quantiles]] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    done: bool = field(default=False, init=False)

    def hear(self, rows: Rows, u: Quantiles, *, trained: bool = False) -> None:
        """Some more responses of known prompts; `trained` says that the policy has taken steps, which ends it."""
        if self.done:
            return
        with self._lock:
            if not trained:
                self._heard.append((rows, u))
            heard = sum(len(part) for part, _ in self._heard)
            if self.done or (heard < ENOUGH and not trained):
                return
            self.done, parts = True, self._heard
            self._heard = []
        if heard >= FEWEST:
            self._judge(np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts]))

    def _judge(self, rows: Rows, u: Quantiles) -> None:
        away = drift(rows, u, self.table.counts(rows))
        spread = log_drift(rows, u, self.table)
        if max(abs(away), abs(spread)) > FAR:
            logger.warning(
                "%s: the first %d responses have a mean quantile of %.3f, %.1f standard errors from the 1/2 of the "
                "reference policy, and a mean logarithm of it %.1f from what that has. Unless the policy has been "
                "trained already, its responses are not drawn as the table's were: look at checkpoint, temperature, "
                "top_p, length limit, chat template, and verify() the reward model",
                self.name,
                len(u),
                u.mean(),
                abs(away),
                abs(spread),
            )


def first_ones(
    rows: Rows, u: Quantiles, completions: Sequence[Completion]
) -> tuple[Int64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Rows and quantiles of known prompts, of the same completion of the same prompt the first one only."""
    places = {
        (row, repr(c)): at for at, (row, c) in reversed([*enumerate(zip(rows.tolist(), completions, strict=True))])
    }
    first = np.array(sorted(at for (row, _), at in places.items() if row >= 0), np.int64)
    return rows[first], u[first]


def drift(rows: Rows, u: Quantiles, counts: Int64[np.ndarray, " n"]) -> float:
    """How many standard errors the mean quantile is from 1/2, if the policy is the reference.

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
    """The same for the mean of log u, which is -1 for uniform u, and otherwise where references tie.

    What it should be, and how it varies, is taken from the references themselves; prompts with few are left out.
    """
    gap, variance = 0.0, 0.0
    for row in np.unique(rows).tolist():
        own = table.scores(row)
        if len(own) < FEWEST_REFERENCES:
            continue
        floor = 0.5 / len(own)
        expected = np.log(np.maximum(table.cdf(np.full(len(own), row), own), floor))
        found = np.log(np.maximum(u[rows == row], floor))
        weight = len(found) / len(rows)
        gap += weight * (found.mean() - expected.mean())
        variance += weight**2 * float(expected.var()) * (1 / len(found) + 1 / len(own))
    return gap / sqrt(variance) if variance else 0.0
