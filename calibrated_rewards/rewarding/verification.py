"""Is this the reward model that the table was made with? The probes in the table tell, before training starts.

>>> from calibrated_rewards.table import ReferenceTable
>>> from calibrated_rewards.testing import NumberScorer
>>> probe = {"prompt": "2+2=", "completion": "4", "score": 4.0}
>>> table = ReferenceTable.build([("2+2=", [1.0, 4.0])], meta={"probes": [probe]})
>>> print(verified(NumberScorer(), table))
1 probe, 0 standard deviations apart (at most 0.001)
>>> verified(lambda prompts, completions: [1.0] * len(prompts), table)
Traceback (most recent call last):
ValueError: the scorer is not the one that the table was made with: 1 of 1 probes are apart, by up to 2 standard ...
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, score
from calibrated_rewards.table import ReferenceTable

# In standard deviations of the references of a prompt. Equal scores of float32 are 1e-4 apart at most; other hardware
# multiplies with fewer bits (TF32). What 16 bits leave apart depends on the shape of the batch.
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.5
FEW_BITS = ("float16", "bfloat16", "float8", "int8", "int4", "uint8")
# Rows that the standard deviation is taken from.
MEASURED = 256


@dataclass(frozen=True)
class Verification:
    """What the probes said."""

    probes: int
    worst: float
    """How far the farthest score is from that in the table, in standard deviations of a prompt's references."""
    tolerance: float
    differs: tuple[str, ...] = ()
    """Settings in which the fingerprints differ, though the scores do not."""

    def __str__(self) -> str:
        also = f"; the fingerprints differ in {', '.join(self.differs)}" if self.differs else ""
        many = "" if self.probes == 1 else "s"
        return (
            f"{self.probes} probe{many}, {self.worst:.2g} standard deviations apart (at most {self.tolerance:g}){also}"
        )


def verified(
    scorer: Scorer, table: ReferenceTable, tolerance: float | None = None, batch_size: int | None = None
) -> Verification:
    """Score the table's probes again; ValueError if any is farther from what it was than equal scores are.

    `tolerance` is in standard deviations of a prompt's references; None for 0.001, or 0.5 if both the table and the
    scorer are of 16 bits.
    """
    if tolerance is not None and not (isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"verify needs a finite tolerance >= 0, got tolerance={tolerance!r}")
    meta = table.meta
    probes = meta.get("probes") or []
    made_with, is_now = meta.get("scorer"), json.loads(json.dumps(fingerprint(scorer)))
    differs = tuple(_differences(made_with, is_now)) if made_with else ()
    if not probes:
        raise ValueError(
            "the table has no probes to verify a scorer with; calibrate() and import_rollouts() put some into it, "
            'ReferenceTable.build(meta={"probes": [{"prompt", "completion", "score"}, ...]}) yours'
        )
    near = tolerance if tolerance is not None else _near(made_with, is_now)
    prompts, completions = [probe["prompt"] for probe in probes], [probe["completion"] for probe in probes]
    step = batch_size or len(probes)
    starts = range(0, len(probes), step)
    parts = [score(scorer, prompts[at : at + step], completions[at : at + step]) for at in starts]
    scores = np.concatenate(parts)
    apart = np.abs(scores - np.array([probe["score"] for probe in probes], np.float64)) / _unit(table)
    if (apart > near).any():
        at = int(apart.argmax())
        raise ValueError(
            f"the scorer is not the one that the table was made with: {int((apart > near).sum())} of {len(probes)} "
            f"probes are apart, by up to {apart[at]:.3g} standard deviations (at most {near:g}): "
            f"{scores[at]} in place of {probes[at]['score']} for prompt {start_of(prompts[at])}{_why(differs)}"
        )
    return Verification(len(probes), float(apart.max()), near, differs)


def _near(made_with: Any, is_now: Any) -> float:
    return TOLERANCE_16_BIT if _few_bits(made_with) and _few_bits(is_now) else TOLERANCE


def _few_bits(said: Any) -> bool:
    """Whether a fingerprint names a type of 16 bits or fewer."""
    if isinstance(said, Mapping):
        return str(said.get("dtype", "")).startswith(FEW_BITS) or any(map(_few_bits, said.values()))
    return isinstance(said, list) and any(map(_few_bits, said))


def _unit(table: ReferenceTable) -> float:
    """The standard deviation of a prompt's references, the median over prompts that have one; or 1."""
    rows = np.unique(np.linspace(0, len(table) - 1, MEASURED).astype(np.int64))
    spreads = np.array([np.std(table.scores(row), dtype=np.float64) for row in rows.tolist()])
    # The median, which no prompt with wild scores can move.
    return float(np.median(spreads[spreads > 0])) if (spreads > 0).any() else 1.0


def _why(differs: tuple[str, ...]) -> str:
    if not differs:
        return "; their fingerprints are alike: look for other weights in the same place, other hardware or versions"
    return f"; their fingerprints differ in {', '.join(differs)}"


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """Where two fingerprints differ, and how."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted({*there, *here}):
            yield from _differences(there.get(name), here.get(name), f"{place}.{name}" if place else str(name))
    elif there != here:
        yield f"{place} ({there!r:.60} then, {here!r:.60} now)"
