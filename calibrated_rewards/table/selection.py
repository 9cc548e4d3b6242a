"""Prompts from which reinforcement learning can learn: those whose references differ in score.

Where the completions of a prompt all tie, its group has no advantage, and the step spends its completions for nothing.
The table knows that before the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.search import tie_spans


@dataclass(frozen=True)
class Selection:
    """The prompts that a run keeps, and how many it leaves out for which reason."""

    kept: tuple[int, ...]
    """Positions in the list of prompts."""
    constant: int
    """Prompts whose references all tie."""
    ties: int
    """Others of whose pairs of references too many tie."""
    spread: int
    """Others whose references spread too little."""
    most_ties: float
    least_spread: float

    def __str__(self) -> str:
        left_out = self.constant + self.ties + self.spread
        reasons = [
            (self.constant, "whose references all tie"),
            (self.ties, f"with more than {self.most_ties:g} of their pairs of references tied"),
            (self.spread, f"whose references have a standard deviation below {self.least_spread:g}"),
        ]
        text = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
        return f"{left_out:,} of {left_out + len(self.kept):,} prompts are left out{': ' if text else ''}{text}"


def select_prompts(
    table: ReferenceTable,
    prompts: Sequence[Prompt],
    ids: Sequence[Any] | None = None,
    *,
    most_ties: float = 1.0,
    least_spread: float = 0.0,
) -> Selection:
    """Select the prompts whose references differ enough; ValueError if there are none.

    Left out are prompts whose references all tie; those of whose pairs of references more than `most_ties` tie, which
    is how often two completions of the reference policy do; and those whose raw scores have a standard deviation below
    `least_spread`. A prompt without references, or with one alone, is kept.

    >>> table = ReferenceTable.build([("easy", [1.0, 1.0, 1.0]), ("mixed", [0.0, 1.0, 1.0]), ("hard", [0.0, 0.0, 0.0])])
    >>> selection = select_prompts(table, ["easy", "mixed", "hard"])
    >>> print(selection.kept, selection)
    (1,) 2 of 3 prompts are left out: 2 whose references all tie
    """
    if not 0 <= most_ties <= 1:
        raise ValueError(f"select_prompts needs most_ties between 0 and 1, a share of pairs, got {most_ties!r}")
    if not 0 <= least_spread < np.inf:
        raise ValueError(f"select_prompts needs a finite least_spread >= 0, got {least_spread!r}")
    rows = table.find(prompts, ids)
    tied, spread = measure_rows(table, rows)
    constant = tied == 1
    many_ties = (tied > most_ties) & ~constant
    narrow = (spread < least_spread) & ~constant & ~many_ties
    kept = np.flatnonzero(~(constant | many_ties | narrow))
    same, ties, spreads = (int(reason.sum()) for reason in (constant, many_ties, narrow))
    selection = Selection(tuple(kept.tolist()), same, ties, spreads, most_ties, least_spread)
    if len(prompts) and not selection.kept:
        raise ValueError(f"a run needs prompts whose references differ: {selection}")
    return selection


def measure_rows(
    table: ReferenceTable, rows: Int64[np.ndarray, " P"]
) -> tuple[Float64[np.ndarray, " P"], Float64[np.ndarray, " P"]]:
    """Measure the share of tied pairs and the standard deviation of each row's references; nan for fewer than two."""
    tied, spread = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    known = np.flatnonzero(rows >= 0)
    for positions, scores in table.blocks(rows[known]):
        K = scores.shape[1]
        if K > 1:
            begin, end = tie_spans(scores)
            tied[known[positions]] = (end - begin - 1).sum(1) / (K * (K - 1))
            spread[known[positions]] = scores.astype(np.float64).std(axis=1, ddof=1)
    return tied, spread
