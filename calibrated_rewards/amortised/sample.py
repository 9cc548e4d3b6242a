"""The reference scores of some prompts of a table, prompt after prompt in one array: K may differ between them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from calibrated_rewards.table.reference_table import ReferenceTable


class Sample(NamedTuple):
    """Scores, ascending within each prompt, and how many each prompt has."""

    scores: Float[np.ndarray, " n"]
    counts: Int[np.ndarray, " P"]

    @property
    def owners(self) -> Int[np.ndarray, " n"]:
        """The prompt of each score."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """What each score counts, so that each prompt counts 1."""
        return np.asarray(np.repeat(1 / self.counts, self.counts))

    def means(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " P"]:
        """The mean over each prompt of something that each of its scores has."""
        return np.asarray(np.add.reduceat(values, np.cumsum(self.counts) - self.counts) / self.counts)

    def of(self, prompts: Bool[np.ndarray, " P"]) -> "Sample":
        """The part that belongs to some prompts."""
        return Sample(self.scores[np.repeat(prompts, self.counts)], self.counts[prompts])

    def halves(self, rng: np.random.Generator) -> tuple["Sample", "Sample"]:
        """Each prompt's scores in two random halves; the second has the odd one, and the first may have none."""
        order = np.lexsort((rng.random(len(self.scores)), self.owners))
        place = np.arange(len(order)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        half = self.counts // 2
        first = np.zeros(len(order), bool)
        first[order] = place < np.repeat(half, self.counts)
        return Sample(self.scores[first], half), Sample(self.scores[~first], self.counts - half)


def sample_of(table: ReferenceTable, rows: Int[np.ndarray, " P"]) -> Sample:
    """The scores of some rows of a table."""
    counts = table.counts(rows)
    starts, scores = np.cumsum(counts) - counts, np.empty(counts.sum())
    for positions, block in table.blocks(rows):
        scores[starts[positions][:, None] + np.arange(block.shape[1])] = block
    return Sample(scores, counts)
