"""The rewards of a table as laws: what a policy that is trained on them converges to, prompt by prompt.

`theory` speaks of scores that never tie and of references without number. A table has K references a prompt, and often
ties, and a policy that is trained on its rewards converges to pi_ref e^{reward/beta} with those very rewards:

* references that tie are an atom: a response with their share of the prompt's K, which ties with itself;
* references that tie with none cut what they stand for into gaps, with the rewards of the ranks between them. How much
  lies in each gap is not known, and is drawn as it is between K draws of a continuous score (uniform on all that adds
  up). Without ties that is `fixed_references`, averaged over prompts;
* where the whole table has few values (0 and 1, ratings), all are atoms in every prompt. A prompt's share of each is
  drawn from what its references and those of all prompts say of it (a Dirichlet posterior): a rating that K references
  missed may come up. A share in the middle of what is likely would not do, for a KL is no straight line in it;
* a value that is common in the table (the cap of a clipped score) is an atom in a prompt that has it but once, too.

A policy that learns only what prompts have in common cannot fit the gaps, and stays nearer to the theory.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, exp, isfinite, log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.fixed_references import StepPolicies
from calibrated_rewards.theory.procedures import Procedure, Standard
from calibrated_rewards.theory.transforms import Transform

Array: TypeAlias = npt.NDArray[np.float64]
# Mass, reward, and whether it is an atom, of every place in every row.
Laws: TypeAlias = tuple[Array, Array, npt.NDArray[np.bool_]]

# Of a larger table so many references are read, in whole rows that lie evenly among all: rows are ordered by a hash of
# their prompt, so that these are a sample of the prompts.
MOST_REFERENCES = 200_000
# Of a small table the gaps are drawn several times.
LEAST_ROWS = 2_000
# A table of no more values than this has atoms alone, if most of its references tie, or it has so many references for
# each value: among few references of a prompt ratings need not tie.
MOST_VALUES, REFERENCES_A_VALUE = 64, 10
# A value is common if K references have it so often, on average.
COMMON = 2.0
# So alike prompts have one share of each value, and nothing is drawn.
ALIKE = 1e6


@dataclass(frozen=True, eq=False)
class TableRewards:
    """The policies that fit the rewards of a table, at any beta: means over its prompts."""

    table: ReferenceTable
    transform: Transform
    procedure: Procedure = Standard()  # noqa: RUF009 (frozen)
    estimator: Estimator = "empirical"
    tolerance: float = 0.0

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Those that are read: all, or as many as `MOST_REFERENCES` allows, evenly spaced."""
        total = int(self.table.counts(np.arange(len(self.table))).sum())
        step = ceil(total / MOST_REFERENCES)
        return np.arange(0, len(self.table), step)

    @cached_property
    def blocks(self) -> list[StepPolicies]:
        """Policies of rows of one K, together; every row as often as every other."""
        total = int(self.table.counts(self.rows).sum())
        draws, rng = max(1, min(LEAST_ROWS // len(self.rows), MOST_REFERENCES // total)), np.random.default_rng(0)
        few, blocks = FewValues.of(self.table, self.rows), []
        for at, scores in self.table.blocks(self.rows):
            if self.tolerance:
                blocks.append(_policies(self._by_atoms(self.rows[at], scores), self.procedure))
                continue
            vector = values(self.transform, scores.shape[1], self.estimator)
            if few is not None:
                parts = [few.laws(scores, vector, rng) for _ in range(draws if few.drawn else 1)]
            else:
                common = np.isin(scores, self._common(scores.shape[1]))
                parts = [_with_gaps(scores, vector, rng, common) for _ in range(draws)]
            masses, rewards, atoms = zip(*parts, strict=True)
            whole = np.concatenate(masses), np.concatenate(rewards), np.concatenate(atoms)
            blocks.append(_policies(whole, self.procedure))
        return blocks

    @cached_property
    def _counted(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
        """The values of the table, and how often each is there."""
        every = np.concatenate([scores.ravel() for _, scores in self.table.blocks(self.rows)])
        return np.unique(every, return_counts=True)

    def _common(self, K: int) -> npt.NDArray[np.float32]:
        """The values that K references have `COMMON` times or more, on average, and more than two in the table."""
        scores, counts = self._counted
        common: npt.NDArray[np.float32] = scores[(counts * K >= COMMON * counts.sum()) & (counts > 2)]
        return common

    def _by_atoms(self, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> Laws:
        """With a tolerance: the references themselves, each with its own reward, and no gaps."""
        K = scores.shape[1]
        each = np.repeat(rows, K)
        u = np.asarray(EmpiricalCDF(self.tolerance)(self.table, each, scores.ravel())).reshape(scores.shape)
        reward = values(self.transform, K, self.estimator)[np.rint(2 * K * u).astype(np.int64)]
        _, below, equal = _ties(scores)
        first = below == np.arange(K)
        return np.where(first, equal / K, 0.0), reward, np.ones_like(first)

    def kl(self, beta: float) -> float:
        """Mean KL from the reference."""
        return float(np.concatenate([block.kl(beta) for block in self.blocks]).mean())

    def win_rate(self, beta: float) -> float:
        """Mean win rate, policy and reference both under the procedure."""
        return float(np.concatenate([block.win_rates(beta) for block in self.blocks]).mean())

    @cached_property
    def most_kls(self) -> Array:
        """The KL of each row where all weight is on its highest reward."""
        return np.concatenate([block.most_kl() for block in self.blocks])

    def beta_for_kl(self, kl: float) -> float:
        """The one beta with that mean KL, which falls as beta rises."""
        from scipy.optimize import brentq

        spread = max(float(np.ptp(block.rewards, axis=1).max()) for block in self.blocks)
        low = high = log(spread)
        while self.kl(exp(low)) < kl and low > log(spread) - 600:
            low -= 3.0
        while self.kl(exp(high)) > kl and high < log(spread) + 600:
            high += 3.0
        return exp(brentq(lambda x: log(max(self.kl(exp(x)), 1e-300) / kl), low, high, xtol=1e-10))

    def check(self, name: str, kl: float | None) -> None:
        """ValueError if no reward differs from another, or the KL is beyond what the rewards lead to."""
        alone = float((self.most_kls <= 1e-12).mean())
        if alone == 1.0:
            raise ValueError(
                f"{name} has nothing to tell on {called(self.table)}: all references of a prompt have one reward, in "
                f"each of its {len(self.table):,} prompts. Calibrate with a reward model that tells completions apart"
            )
        if kl is None:
            return
        if not (isfinite(kl) and kl > 0):
            raise ValueError(f"a KL is finite and > 0, got {kl!r}.")
        most = float(self.most_kls.mean())
        if kl >= most * (1 - 1e-6):
            short = float((self.most_kls <= kl).mean())
            raise ValueError(
                f"{name} asks for a KL of {kl:g}, and {called(self.table)} leads to less than {most:.3g}, with all "
                f"weight on the best of each prompt: {_percent(short)} of its prompts reach no KL of {kl:g}, "
                f"{_percent(alone)} none at all, for their references tie. Ask for less, leave such prompts out, or "
                "calibrate with a reward model that tells their completions apart"
            )


@dataclass(frozen=True, eq=False)
class FewValues:
    """The values of a table that has few, and how a prompt's share of each is estimated."""

    scores: npt.NDArray[np.float32]
    share: Array
    """Of each value among all references."""
    alike: float
    """How many references of a prompt its knowledge of all prompts is worth: the Dirichlet's concentration."""

    @classmethod
    def of(cls, table: ReferenceTable, rows: npt.NDArray[np.int64]) -> "FewValues | None":
        """None for a table of many values, or of few ties and few references."""
        scores: npt.NDArray[np.float32] = np.empty(0, np.float32)
        alone = total = 0
        for _, block in table.blocks(rows):
            scores = np.union1d(scores, block)
            if len(scores) > MOST_VALUES:
                return None
            alone, total = alone + int((_ties(block)[2] == 1).sum()), total + block.size
        if alone > total / 2 and total < REFERENCES_A_VALUE * len(scores):
            return None
        found = cls(scores, np.zeros(len(scores)), 0.0)
        counts = np.concatenate([found._counts(block) for _, block in table.blocks(rows)]).astype(np.float64)
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

    def _counts(self, block: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        places = np.searchsorted(self.scores, block) + len(self.scores) * np.arange(len(block))[:, None]
        return np.bincount(places.ravel(), minlength=len(self.scores) * len(block)).reshape(len(block), -1)

    @property
    def drawn(self) -> bool:
        """Whether there is a share of each prompt to draw: not of a single one, and not where all have the same."""
        return 0 < self.alike < ALIKE

    def laws(self, block: npt.NDArray[np.float32], vector: Array, rng: np.random.Generator) -> Laws:
        """Mass and reward of every value in each row, all of them atoms."""
        counts = self._counts(block)
        mass = counts + self.alike * self.share
        if self.drawn:
            mass = rng.standard_gamma(mass)
        reward = vector[2 * (np.cumsum(counts, axis=1) - counts) + counts]
        return mass / mass.sum(axis=1, keepdims=True), reward, np.ones(counts.shape, bool)


def called(table: ReferenceTable) -> str:
    """The table in an error: by its path, if it has one."""
    return f"the table {table.path}" if table.path else "this table"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _ties(scores: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Of each sorted reference: its place, how many are below it, and how many equal it, itself among them."""
    place = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    differs = scores[:, 1:] != scores[:, :-1]
    edge = np.ones((len(scores), 1), bool)
    below = np.maximum.accumulate(np.where(np.hstack([edge, differs]), place, 0), axis=1)
    last = np.where(np.hstack([differs, edge]), place + 1, scores.shape[1])
    upto = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    return place, below, upto - below


def _with_gaps(
    scores: npt.NDArray[np.float32], vector: Array, rng: np.random.Generator, common: npt.NDArray[np.bool_]
) -> Laws:
    """Mass, reward, and whether it is an atom, of gap, reference, gap, reference ... gap in each row.

    A reference is an atom where it ties, or is `common` in the table.
    """
    n, K = scores.shape
    place, below, equal = _ties(scores)
    tied = (equal > 1) | common
    mass, reward = np.zeros((n, 2 * K + 1)), np.empty((n, 2 * K + 1))
    reward[:, 1::2] = vector[2 * below + equal]
    # A gap is there where a reference next to it ties with none; else it is as good as the tie beside it.
    alone = np.hstack([~tied[:, :1], ~tied]) | np.hstack([~tied, ~tied[:, -1:]])
    beside = np.hstack([reward[:, 1:2], reward[:, 1::2]])
    reward[:, ::2] = np.where(alone, vector[::2], beside)
    gaps = rng.exponential(size=alone.shape) * alone
    total = gaps.sum(axis=1, keepdims=True)
    mass[:, ::2] = gaps / np.where(total > 0, total, 1.0) * (~tied).mean(axis=1, keepdims=True)
    mass[:, 1::2] = np.where(tied & (below == place), equal / K, 0.0)
    return mass, reward, np.broadcast_to(np.arange(2 * K + 1) % 2 == 1, mass.shape)


def _policies(laws: Laws, procedure: Procedure) -> StepPolicies:
    """Without places that are empty in every row."""
    mass, reward, atoms = laws
    there = mass.any(axis=0)
    mass = mass[:, there] / mass.sum(axis=1, keepdims=True)
    ends = np.hstack([np.zeros((len(mass), 1)), np.cumsum(mass, axis=1)])
    ends /= ends[:, -1:]
    return StepPolicies(reward[:, there], ends, procedure, procedure, atoms[:, there])
