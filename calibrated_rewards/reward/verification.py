"""Verify a reward model against a table: score the probes in it again, before training starts.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> from calibrated_rewards.testing.suites import NumberScorer
>>> probe = {"prompt": "2+2=", "completion": "4", "score": 4.0}
>>> table = ReferenceTable.build([("2+2=", [1.0, 4.0])], meta={"probes": [probe]})
>>> print(verify_scorer(NumberScorer(), table))
1 probe, 0 standard deviations apart (at most 0.001)
>>> verify_scorer(lambda prompts, completions: [1.0] * len(prompts), table)
Traceback (most recent call last):
ValueError: the scorer is not the one that the table was made with: 1 of 1 probes are apart, by up to 2 standard ...
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.text import completion_messages
from calibrated_rewards.prompts import start_of
from calibrated_rewards.reward.completions import CompletionForm
from calibrated_rewards.scorers.differences import differences, tolerance_of
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, score
from calibrated_rewards.table.reference_table import ReferenceTable

Raw = Callable[[Sequence[Any], Sequence[Any]], Float32[np.ndarray, " n"]]
# Rows that the standard deviation is taken from.
MEASURED = 256


@dataclass(frozen=True)
class Verification:
    """The result of scoring a table's probes again."""

    probes: int
    worst: float
    """The largest distance from a score in the table, in standard deviations of a prompt's references."""
    tolerance: float
    differs: tuple[str, ...] = ()
    """Settings in which the fingerprints differ, though the scores do not."""

    def __str__(self) -> str:
        probes = "1 probe" if self.probes == 1 else f"{self.probes} probes"
        changes = f"; the fingerprints differ in {', '.join(self.differs)}" if self.differs else ""
        return f"{probes}, {self.worst:.2g} standard deviations apart (at most {self.tolerance:g}){changes}"


def verify_scorer(
    scorer: Scorer, table: ReferenceTable, tolerance: float | None = None, raw: Raw | None = None
) -> Verification:
    """Score the table's probes again; ValueError if any is farther from its score than equal scorers are.

    `tolerance` is in standard deviations of a prompt's references; None for 0.001, or 0.5 if both the table and the
    scorer are of 16 bits. `raw` is the path that a training run's completions take to the scorer, `reward.raw`: the
    probes take it too, answers to chats as the messages that TRL makes of them.
    """
    if tolerance is not None and not (isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"verify needs a finite tolerance >= 0, got tolerance={tolerance!r}")
    meta = table.meta
    probes = meta.get("probes") or []
    then, now = meta.get("scorer"), json.loads(json.dumps(fingerprint(scorer)))
    changes = differences(then, now) if then else ()
    differs = tuple(f"{place} ({old!r:.60} then, {new!r:.60} now)" for place, old, new in changes)
    if not probes:
        raise ValueError(
            "the table has no probes to verify a scorer with; calibrate() and import_rollouts() put some into it, "
            'ReferenceTable.build(meta={"probes": [{"prompt", "completion", "score"}, ...]}) yours'
        )
    limit = tolerance if tolerance is not None else tolerance_of(then, now)
    prompts = [probe["prompt"] for probe in probes]
    completions = [
        probe["completion"] if isinstance(probe["prompt"], str) else completion_messages(probe["completion"])
        for probe in probes
    ]
    if raw is not None:
        scores = raw(prompts, completions)
    else:
        scores = score(scorer, *CompletionForm.of(meta).apply(scorer, prompts, completions))
    apart = np.abs(scores - np.array([probe["score"] for probe in probes], np.float64)) / _measure_spread(table)
    if (apart > limit).any():
        at = int(apart.argmax())
        hint = (
            f"; their fingerprints differ in {', '.join(differs)}"
            if differs
            else "; their fingerprints are alike: look for other weights in the same place, other hardware or versions"
        )
        raise ValueError(
            f"the scorer is not the one that the table was made with: {int((apart > limit).sum())} of {len(probes)} "
            f"probes are apart, by up to {apart[at]:.3g} standard deviations (at most {limit:g}): "
            f"{scores[at]} in place of {probes[at]['score']} for prompt {start_of(prompts[at])}{hint}"
        )
    return Verification(len(probes), float(apart.max()), limit, differs)


def _measure_spread(table: ReferenceTable) -> float:
    """The standard deviation of a prompt's references, the median over prompts that have one; or 1."""
    rows = np.unique(np.linspace(0, len(table) - 1, MEASURED).astype(np.int64))
    spreads = np.array([np.std(table.scores(row), dtype=np.float64) for row in rows.tolist()])
    # The median, which no prompt with wild scores can move.
    return float(np.median(spreads[spreads > 0])) if (spreads > 0).any() else 1.0
