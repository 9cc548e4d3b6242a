"""Laws of a prompt's rewards, drawn as its K references leave them open: shares of values that tie, and of the gaps.

A law is a row of panels in the order of their scores, each with its mass and its reward. Some panels are atoms.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.search import tie_spans

Array: TypeAlias = npt.NDArray[np.float64]
# Mass and reward of every atom and gap in every row, and a mask of the atoms.
Laws: TypeAlias = tuple[Array, Array, npt.NDArray[np.bool_]]

# A table with no more values than this has atoms alone, if most of its references tie, or if it has this many
# references for each value: among few references of a prompt ratings need not tie.
MOST_VALUES, REFERENCES_A_VALUE = 64, 10
# A value is common if K references have it this often, on average.
COMMON = 2.0
# Prompts this much alike have one share of each value, and nothing is drawn.
ALIKE = 1e6
# The mass r / K of a value with r references counts as much as this many references of all prompts.
PRIOR_REFERENCES = 20.0
# Of fewer values with one number of references, those with nearly that number are looked at too.
ENOUGH_VALUES = 100


@dataclass(frozen=True, eq=False)
class ValueShares:
    """Values of a table, and the prior for a prompt's share of each; a last share may be that of all other scores."""

    scores: npt.NDArray[np.float32]
    share: Array
    """The share of each value among all references."""
    alike: float
    """The Dirichlet's concentration: as many references of a prompt weigh as much as all other prompts."""

    @classmethod
    def of_table(cls, table: ReferenceTable, rows: npt.NDArray[np.int64]) -> "ValueShares | None":
        """Find the values and fit the prior; None for a table of many values, or of few ties and few references."""
        scores: npt.NDArray[np.float32] = np.empty(0, np.float32)
        alone = total = 0
        for _, block in table.blocks(rows):
            scores = np.union1d(scores, block)
            if len(scores) > MOST_VALUES:
                return None
            below, upto = tie_spans(block)
            alone, total = alone + int((upto - below == 1).sum()), total + block.size
        if alone > total / 2 and total < REFERENCES_A_VALUE * len(scores):
            return None
        return cls.fit(scores, np.concatenate([_count(scores, block) for _, block in table.blocks(rows)]))

    @classmethod
    def fit(cls, scores: npt.NDArray[np.float32], references: npt.NDArray[np.int64]) -> "ValueShares":
        """Fit the prior to each prompt's numbers of references."""
        counts = references.astype(np.float64)
        sizes, n = counts.sum(axis=1), len(counts)
        shares = counts / sizes[:, None]
        share, several = shares.mean(axis=0), sizes > 1
        if n == 1:
            return cls(scores, share, 0.0)
        if not several.any():
            return cls(scores, share, ALIKE)  # one reference says nothing of how prompts differ
        # How often two references of one prompt tie, and two of different prompts: (1 + alike * between) / (1 + alike).
        pairs = (counts * (counts - 1)).sum(axis=1)[several] / (sizes * (sizes - 1))[several]
        within = float(pairs.mean())
        between = float(((shares.sum(axis=0) ** 2).sum() - (shares**2).sum()) / (n * (n - 1)))
        apart = within - between
        return cls(scores, share, (1 - within) / apart if apart > (1 - within) / ALIKE else ALIKE)

    @property
    def varies(self) -> bool:
        """True if each prompt's shares are drawn: not for a single prompt, and not where all have the same."""
        return 0 < self.alike < ALIKE

    def laws(self, block: npt.NDArray[np.float32], vector: Array, rng: np.random.Generator) -> Laws:
        """Draw the mass of every value in each row, all of them atoms."""
        counts = _count(self.scores, block)
        reward = vector[2 * (np.cumsum(counts, axis=1) - counts) + counts]
        return self.draw_shares(counts, rng), reward, np.ones(counts.shape, bool)

    def draw_shares(self, counts: npt.NDArray[np.int64], rng: np.random.Generator) -> Array:
        """Draw each prompt's shares from their posterior; its mean where nothing varies."""
        mass = counts + self.alike * self.share
        if self.varies:
            mass = rng.standard_gamma(mass)
        return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def _count(scores: npt.NDArray[np.float32], block: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Count each value in each row."""
    places = np.searchsorted(scores, block) + len(scores) * np.arange(len(block))[:, None]
    return np.bincount(places.ravel(), minlength=len(scores) * len(block)).reshape(len(block), -1)


def count_common(values: npt.NDArray[np.float32], block: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Count each of some values in each row, and in a last column all other scores."""
    counts = np.stack([(block == value).sum(axis=1) for value in values], axis=1)
    return np.hstack([counts, block.shape[1] - counts.sum(axis=1, keepdims=True)])


def mean_masses(sizes: npt.NDArray[np.int64], K: int) -> Array:
    """Estimate the mean mass of a value that r of K references have, for r = 0 ... K, from how many values have each r.

    Leaving out one reference of K, N values have r of the other K - 1 and this one too (r + 1 of K), M have r without
    it: the mean mass is N / (N + M), for any law (Good and Turing; Robbins). `sizes` are the values' numbers.
    From r = 4 on N and M are sums over r and sqrt(r) - 1 neighbours on each side, where few values have this very r.
    """
    r = np.arange(K + 1)
    number = np.bincount(sizes, minlength=K + 2).astype(np.float64)
    again, without = (r + 1) * number[r + 1], (K - r) * number[r]
    wide = np.where(number[r] + number[r + 1] < ENOUGH_VALUES, np.maximum(np.sqrt(r).astype(np.intp) - 1, 0), 0)
    low, high = np.maximum(r - wide, 0), np.minimum(r + wide, K) + 1
    again, without = (
        np.diff(np.concatenate([[0.0], np.cumsum(x)])[np.stack([low, high])], axis=0)[0] for x in (again, without)
    )
    prior = np.where(r > 1, PRIOR_REFERENCES, 0.0)
    return np.asarray((again + prior * r / K) / np.maximum(again + without + prior, 1e-300))


@dataclass(frozen=True)
class TopGaps:
    """The law of the gap above a prompt's highest reference: its chance to exist, and its mean beside one without ties.

    Where each prompt has a cap of its own (a prompt's offset and a limit), nothing is above the cap, and a policy that
    went there would promise KL and wins that no training has. Of each pair, the first is for an untied highest
    reference, the second for one that ties. Lower gaps need no such law: a policy gives them little mass.
    """

    chance: tuple[float, float]
    scale: tuple[float, float]

    @classmethod
    def fit(cls, counts: npt.NDArray[np.int64]) -> "TopGaps":
        """Fit to sums of `count_above`: for tied tops the mean mass, for untied ones also the mean of its square.

        A gap with chance q and an exponential mass of mean s, in units of one without ties, has moments q s and q s^2.
        """
        above, trials = counts + 1.0  # with one trial more, as without ties
        once, twice, tied = (above / trials).tolist()
        chance = min(once**2 / twice, 1.0), min(tied, 1.0)
        return cls(chance, (once / chance[0], tied / chance[1]))

    def rescale(self, gaps: Array, is_tied: npt.NDArray[np.bool_]) -> Array:
        """Turn exponential gaps into draws of this law: what exceeds -log(chance) is exponential again."""
        pick = is_tied.astype(np.int64)
        return np.asarray(np.maximum(gaps + np.log(self.chance)[pick], 0.0) * np.array(self.scale)[pick])


def count_above(scores: npt.NDArray[np.float32], values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Count how often references that are left out lie above all others of their row, and the trials.

    The columns: one is left out, and the highest of the others is untied; two are, and it is untied; one is, and it is
    tied. Each case above counts as much as there are trials for one without ties. Common values are left aside.
    """
    if scores.shape[1] < 3:
        return np.zeros((2, 3), np.int64)
    shared = np.isin(scores, values)
    n = (~shared).sum(axis=1)
    scores, n = np.sort(np.where(shared, -np.inf, scores), axis=1)[n >= 3], n[n >= 3]
    below, upto = tie_spans(scores)
    third, second, top = (upto - below)[:, -3:].T  # how many references tie with each of the three highest
    single, next_single, next_tied = top == 1, second == 1, (top == 1) & (second > 1)
    pairs = n * (n - 1) // 2
    trials = (
        next_single + (n - 1) * single + 2 * (top == 2),
        (third == 1)
        + (n - 2) * next_single
        + 2 * (single & (second == 2))
        + (pairs - n + 1) * single
        + 2 * (n - 2) * (top == 2)
        + 3 * (top == 3),
        next_tied + (n - 2) * (top == 2) + n * (top > 2),
    )
    above = n * next_single, pairs * (third == 1), n * next_tied
    return np.array([[x.sum() for x in above], [x.sum() for x in trials]], np.int64)


def draw_gaps(
    scores: npt.NDArray[np.float32],
    vector: Array,
    rng: np.random.Generator,
    common: ValueShares | None,
    tops: TopGaps,
    draws: int = 1,
) -> Laws:
    """Draw the law of gap, reference, gap, reference ... gap in each row, with the common values that a row misses.

    All rows are drawn `draws` times, one time after the other.
    """
    n, K = scores.shape
    below, upto = tie_spans(scores)
    equal, first = upto - below, below == np.arange(K)
    values = np.empty(0, np.float32) if common is None else common.scores
    shared = np.isin(scores, values)
    # No gap between equal references, between common values, and beyond one that is the table's least or greatest.
    there = np.ones((n, K + 1), bool)
    there[:, 1:-1] = (scores[:, 1:] != scores[:, :-1]) & ~(shared[:, 1:] & shared[:, :-1])
    if len(values):
        there[:, 0] = scores[:, 0] != values[0]
        there[:, -1] = scores[:, -1] != values[-1]
    masses = mean_masses(equal[first & ~shared], K)
    atoms = np.where(first & ~shared, masses[equal], 0.0)
    counts = np.zeros((n, 1), np.int64) if common is None else count_common(values, scores)
    drawn_shares, drawn_gaps = [], []
    for _ in range(draws):
        drawn_shares.append(np.ones((n, 1)) if common is None else common.draw_shares(counts, rng))
        drawn_gaps.append(rng.exponential(size=there.shape))
    n, shares, gaps = n * draws, np.concatenate(drawn_shares), np.concatenate(drawn_gaps)
    scores, below, equal, shared, there, atoms, counts = (
        np.tile(x, (draws, 1)) for x in (scores, below, equal, shared, there, atoms, counts)
    )
    alone = ((equal == 1) & ~shared).mean(axis=1)
    # At least a quarter of what the untied references are: the masses of the others are means.
    rest = np.where(alone > 0, np.maximum(shares[:, -1] - atoms.sum(axis=1), alone / 4), 0.0)
    gaps *= there
    gaps[:, -1] = np.where(shared[:, -1], gaps[:, -1], tops.rescale(gaps[:, -1], equal[:, -1] > 1))
    total = gaps.sum(axis=1, keepdims=True)

    places = np.hstack([np.tile(np.arange(2.0 * K + 1), (n, 1)), np.empty((n, len(values)))])
    mass, reward = np.zeros(places.shape), np.empty(places.shape)
    reward[:, 1 : 2 * K + 1 : 2] = vector[2 * below + equal]
    beside = np.hstack([reward[:, 1:2], reward[:, 1 : 2 * K + 1 : 2]])
    reward[:, : 2 * K + 1 : 2] = np.where(there, vector[::2], beside)
    mass[:, : 2 * K + 1 : 2] = gaps / np.where(total > 0, total, 1.0) * rest[:, None]
    mass[:, 1 : 2 * K + 1 : 2] = atoms
    for i, value in enumerate(values):
        at, has = (scores < value).sum(axis=1), counts[:, i] > 0
        mass[has, 2 * at[has] + 1] = shares[has, i]
        # In a row without it, the value stands at one end of its gap: the end nearer to the table's.
        column = 2 * K + 1 + i
        mass[~has, column] = shares[~has, i]
        reward[:, column] = vector[2 * at]
        places[:, column] = 2 * at + (0.5 if (scores < value).mean() > 0.5 else -0.5)
    order = np.argsort(places, axis=1, kind="stable")
    is_atom = np.tile((np.arange(places.shape[1]) % 2 == 1) | (np.arange(places.shape[1]) > 2 * K), (n, 1))
    mass, reward = (np.take_along_axis(x, order, 1) for x in (mass, reward))
    return mass, reward, np.take_along_axis(is_atom, order, 1)
