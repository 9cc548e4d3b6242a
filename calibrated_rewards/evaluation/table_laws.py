"""Laws of the rewards of a table: the policy that training on them converges to, prompt by prompt.

`theory` assumes scores that never tie and infinitely many references. A table has K references a prompt, often with
ties, and a policy that is trained on its rewards converges to pi_ref e^{reward/beta} with those very rewards:

* references that tie are an atom: a response with their share of the prompt's K, which ties with itself;
* references that tie with none divide the rest into gaps, with the rewards of the ranks between them. The mass of each
  gap is not known, and is drawn as it is between K draws of a continuous score (uniform on all that adds up). Without
  ties that is `fixed_references`, averaged over prompts;
* where the whole table has few values (0 and 1, ratings), all are atoms in every prompt. A prompt's share of each is
  drawn from a Dirichlet posterior on its references and those of all prompts: a rating that K references missed may
  come up. The posterior mean would not do, for a KL is not linear in it;
* a value that is common in the table (the cap of a clipped score) is an atom even in a prompt that has it once.

A policy that learns only what prompts have in common cannot fit the gaps, and stays nearer to the theory.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, exp, isfinite, log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from calibrated_rewards.evaluation.weighted_rollouts import Standings
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.fixed_references import StepPolicies
from calibrated_rewards.theory.procedures import Procedure, Standard
from calibrated_rewards.theory.transforms import Transform

Array: TypeAlias = npt.NDArray[np.float64]
# Mass and reward of every atom and gap in every row, and a mask of the atoms.
Laws: TypeAlias = tuple[Array, Array, npt.NDArray[np.bool_]]

# A larger table is read in part, in rows evenly spaced among all: rows are ordered by a hash of their prompt, so that
# these are a sample of the prompts.
MOST_REFERENCES = 200_000
# In a smaller table the gaps are drawn several times.
LEAST_ROWS = 2_000
# A table with no more values than this has atoms alone, if most of its references tie, or if it has this many
# references for each value: among few references of a prompt ratings need not tie.
MOST_VALUES, REFERENCES_A_VALUE = 64, 10
# A value is common if K references have it this often, on average.
COMMON = 2.0
# Prompts this much alike have one share of each value, and nothing is drawn.
ALIKE = 1e6


@dataclass(frozen=True, eq=False)
class TableRewards:
    """Policies that fit the rewards of a table, at any beta: means over its prompts."""

    table: ReferenceTable
    transform: Transform
    procedure: Procedure = Standard()  # noqa: RUF009 (frozen)
    estimator: Estimator = "empirical"
    tolerance: float = 0.0

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows that are read: all, or as many as `MOST_REFERENCES` allows, evenly spaced."""
        total = int(self.table.counts(np.arange(len(self.table))).sum())
        step = ceil(total / MOST_REFERENCES)
        return np.arange(0, len(self.table), step)

    @cached_property
    def blocks(self) -> list[StepPolicies]:
        """Policies of the rows, those of one K together; each row as often as any other."""
        total = int(self.table.counts(self.rows).sum())
        draws, rng = max(1, min(LEAST_ROWS // len(self.rows), MOST_REFERENCES // total)), np.random.default_rng(0)
        few, blocks = FewValues.of(self.table, self.rows), []
        for at, scores in self.table.blocks(self.rows):
            vector = values(self.transform, scores.shape[1], self.estimator)
            if self.tolerance:
                parts = [self._atoms(self.rows[at], scores, vector)]
            elif few is not None:
                parts = [few.laws(scores, vector, rng) for _ in range(draws if few.varies else 1)]
            else:
                common = np.isin(scores, self._common(scores.shape[1]))
                parts = [_draw_gaps(scores, vector, rng, common) for _ in range(draws)]
            mass, rewards, atoms = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            there = mass.any(axis=0)  # without places that are empty in every row
            mass = mass[:, there] / mass.sum(axis=1, keepdims=True)
            ends = np.hstack([np.zeros((len(mass), 1)), np.cumsum(mass, axis=1)])
            ends /= ends[:, -1:]
            blocks.append(StepPolicies(rewards[:, there], ends, self.procedure, self.procedure, atoms[:, there]))
        return blocks

    @cached_property
    def _value_counts(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
        """The values of the table, and the number of references with each."""
        every = np.concatenate([scores.ravel() for _, scores in self.table.blocks(self.rows)])
        return np.unique(every, return_counts=True)

    def _common(self, K: int) -> npt.NDArray[np.float32]:
        """Find the values that K references have `COMMON` times or more, on average, and more than two in the table."""
        scores, counts = self._value_counts
        common: npt.NDArray[np.float32] = scores[(counts * K >= COMMON * counts.sum()) & (counts > 2)]
        return common

    def _atoms(self, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], vector: Array) -> Laws:
        """With a tolerance there are no gaps: the references themselves are atoms, each with its own reward."""
        K = scores.shape[1]
        u = EmpiricalCDF(self.tolerance)(self.table, np.repeat(rows, K), scores.ravel())
        reward = vector[np.rint(2 * K * np.asarray(u).reshape(scores.shape)).astype(np.int64)]
        ties = Standings.of(scores)
        first = ties.below == np.arange(K)
        return np.where(first, (ties.upto - ties.below) / K, 0.0), reward, np.ones_like(first)

    def kl(self, beta: float) -> float:
        """Average the KL from the reference over prompts."""
        return float(np.concatenate([block.kl(beta) for block in self.blocks]).mean())

    def win_rate(self, beta: float) -> float:
        """Average the win rate over prompts, policy and reference both under the procedure."""
        return float(np.concatenate([block.win_rates(beta) for block in self.blocks]).mean())

    @cached_property
    def most_kls(self) -> Array:
        """The largest KL of each row: all weight on its highest reward."""
        return np.concatenate([block.most_kl() for block in self.blocks])

    def beta_for_kl(self, kl: float) -> float:
        """Solve for the beta with a mean KL, which falls as beta rises."""
        from scipy.optimize import brentq

        spread = max(float(np.ptp(block.rewards, axis=1).max()) for block in self.blocks)
        low = high = log(spread)
        while self.kl(exp(low)) < kl and low > log(spread) - 600:
            low -= 3.0
        while self.kl(exp(high)) > kl and high < log(spread) + 600:
            high += 3.0
        return exp(brentq(lambda x: log(max(self.kl(exp(x)), 1e-300) / kl), low, high, xtol=1e-10))

    def check(self, name: str, kl: float | None) -> None:
        """Raise ValueError if no reward differs from another, or if no beta reaches the KL."""
        alone = float((self.most_kls <= 1e-12).mean())
        if alone == 1.0:
            raise ValueError(
                f"{name} has nothing to tell on {name_table(self.table)}: all references of a prompt have one reward, "
                f"in each of its {len(self.table):,} prompts. Calibrate with a reward model that tells completions "
                "apart"
            )
        if kl is None:
            return
        if not (isfinite(kl) and kl > 0):
            raise ValueError(f"a KL is finite and > 0, got {kl!r}.")
        most = float(self.most_kls.mean())
        if kl >= most * (1 - 1e-6):
            short = float((self.most_kls <= kl).mean())
            raise ValueError(
                f"{name} asks for a KL of {kl:g}, and {name_table(self.table)} leads to less than {most:.3g}, with all "
                f"weight on the best of each prompt: {100 * short:.3g} % of its prompts reach no KL of {kl:g}, "
                f"{100 * alone:.3g} % none at all, for their references tie. Ask for less, leave such prompts out, or "
                "calibrate with a reward model that tells their completions apart"
            )


@dataclass(frozen=True, eq=False)
class FewValues:
    """The values of a table that has few, and the prior for a prompt's share of each."""

    scores: npt.NDArray[np.float32]
    share: Array
    """The share of each value among all references."""
    alike: float
    """The Dirichlet's concentration: as many references of a prompt weigh as much as all other prompts."""

    @classmethod
    def of(cls, table: ReferenceTable, rows: npt.NDArray[np.int64]) -> "FewValues | None":
        """Find the values and fit the prior; None for a table of many values, or of few ties and few references."""
        scores: npt.NDArray[np.float32] = np.empty(0, np.float32)
        alone = total = 0
        for _, block in table.blocks(rows):
            scores = np.union1d(scores, block)
            if len(scores) > MOST_VALUES:
                return None
            ties = Standings.of(block)
            alone, total = alone + int((ties.upto - ties.below == 1).sum()), total + block.size
        if alone > total / 2 and total < REFERENCES_A_VALUE * len(scores):
            return None
        counts = np.concatenate([_count(scores, block) for _, block in table.blocks(rows)]).astype(np.float64)
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
        mass = counts + self.alike * self.share
        if self.varies:
            mass = rng.standard_gamma(mass)
        reward = vector[2 * (np.cumsum(counts, axis=1) - counts) + counts]
        return mass / mass.sum(axis=1, keepdims=True), reward, np.ones(counts.shape, bool)


def _count(scores: npt.NDArray[np.float32], block: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Count each value in each row."""
    places = np.searchsorted(scores, block) + len(scores) * np.arange(len(block))[:, None]
    return np.bincount(places.ravel(), minlength=len(scores) * len(block)).reshape(len(block), -1)


def name_table(table: ReferenceTable) -> str:
    """Name a table in an error, by its path if it has one."""
    return f"the table {table.path}" if table.path else "this table"


def _draw_gaps(
    scores: npt.NDArray[np.float32], vector: Array, rng: np.random.Generator, common: npt.NDArray[np.bool_]
) -> Laws:
    """Draw the law of gap, reference, gap, reference ... gap in each row.

    A reference is an atom where it ties, or is `common` in the table.
    """
    n, K = scores.shape
    ties = Standings.of(scores)
    equal = ties.upto - ties.below
    tied = (equal > 1) | common
    mass, reward = np.zeros((n, 2 * K + 1)), np.empty((n, 2 * K + 1))
    reward[:, 1::2] = vector[2 * ties.below + equal]
    # A gap is there where a reference next to it ties with none; else it is as good as the tie beside it.
    alone = np.hstack([~tied[:, :1], ~tied]) | np.hstack([~tied, ~tied[:, -1:]])
    beside = np.hstack([reward[:, 1:2], reward[:, 1::2]])
    reward[:, ::2] = np.where(alone, vector[::2], beside)
    gaps = rng.exponential(size=alone.shape) * alone
    total = gaps.sum(axis=1, keepdims=True)
    mass[:, ::2] = gaps / np.where(total > 0, total, 1.0) * (~tied).mean(axis=1, keepdims=True)
    mass[:, 1::2] = np.where(tied & (ties.below == np.arange(K)), equal / K, 0.0)
    return mass, reward, np.broadcast_to(np.arange(2 * K + 1) % 2 == 1, mass.shape)
