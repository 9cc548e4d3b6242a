"""Expectations before training: beta, KL and win rate on a table, with its own ties and its own K.

`expect` is the one place that solves for beta on a table: commands, training runs and the report use its numbers.

>>> from calibrated_rewards.theory.procedures import BestOf
>>> from calibrated_rewards.theory.transforms import Exponential
>>> table = ReferenceTable.build([(f"prompt {i}", [0.0] * 6 + [1.0] * 4) for i in range(50)])
>>> expectation = expect(table, scaled(Exponential(10.0), "unit"), kl=0.5, procedure=BestOf(4))
>>> for line in expectation.lines():
...     print(line)
this table, with its ties and K: at beta=0.05613 the policy that fits its rewards has KL 0.5 nats and win rate ...
theory, for scores without ties and infinitely many references: KL 4.05 at this beta; KL 0.5 at beta=0.3184, ...

`theory` assumes scores that never tie and infinitely many references. A table has K references a prompt, often with
ties, and training on its rewards converges to pi_ref e^{reward/beta}. The law of the rewards in each prompt:

* references that tie are an atom, which ties with itself. Its mass is what values with as many references have on
  average: a value that two of K references have by chance has less than 2 / K (Good and Turing);
* references divide the rest into gaps, with the rewards of the ranks between them. The mass of each gap is not known,
  and is drawn as it is between K draws of a continuous score (uniform on all that adds up). Without ties that is
  `fixed_references`, averaged over prompts. The gap above a prompt's highest reference exists as often as the table's
  prompts have references there, one left out at a time: hardly ever, if the highest score of each prompt ties;
* where the whole table has few values (0 and 1, ratings), all are atoms in every prompt. A prompt's share of each is
  drawn from a Dirichlet posterior on its references and those of all prompts: a rating that K references missed may
  come up. The posterior mean would not do, for a KL is not linear in it;
* a value that is common in the table (the cap of a clipped score) is an atom in every prompt, with a share drawn alike.

A policy that learns only what prompts have in common cannot fit the gaps, and stays nearer to the theory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, exp, isfinite, log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from calibrated_rewards.evaluation.table_laws import (
    COMMON,
    Laws,
    TopGaps,
    ValueShares,
    count_above,
    count_common,
    draw_gaps,
)
from calibrated_rewards.evaluation.wording import format_procedure
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.search import tie_spans
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.fixed_references import StepPolicies
from calibrated_rewards.theory.named import ByRank
from calibrated_rewards.theory.procedures import Procedure, Standard
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, kl_of, kl_range, policy_law, win_rate_of
from calibrated_rewards.theory.transforms import Identity, Transform

Array: TypeAlias = npt.NDArray[np.float64]

# A larger table is read in part, in rows evenly spaced among all: rows are ordered by a hash of their prompt, so that
# these are a sample of the prompts.
MOST_REFERENCES = 200_000
# In a smaller table the gaps are drawn several times.
LEAST_ROWS = 2_000
# Below this a trainer has no gradient left: Adam's epsilon is 1e-8.
SMALLEST_BETA = 1e-6
# Numbers that differ by less are one number to a reader.
VISIBLE_SHARE, VISIBLE_WIN_RATE = 0.05, 0.005


@dataclass(frozen=True)
class Expectation:
    """Beta, KL and win rate of the policy that fits a table's rewards, beside theory's without ties and without a K."""

    beta: float
    kl: float
    win_rate: float
    procedure: Procedure
    most_kl: float
    """The limit of the KL on this table as beta falls to 0: all weight on the best of each prompt."""
    prompts: int
    prompts_read: int
    theory_kl: float | None
    """Theory's KL at this beta; None where e^{Phi/beta} has no integral."""
    theory_beta: float | None
    """Theory's beta for this KL; None where theory does not reach it."""
    theory_win_rate: float | None
    """Theory's win rate at this KL."""

    @property
    def differs(self) -> bool:
        """True if theory has a visibly different beta, KL or win rate, so that it would mislead."""
        pairs = (self.theory_kl, self.kl), (self.theory_beta, self.beta)
        if any(theory is None or abs(theory - table) > VISIBLE_SHARE * table for theory, table in pairs):
            return True
        return self.theory_win_rate is None or abs(self.theory_win_rate - self.win_rate) > VISIBLE_WIN_RATE

    def lines(self) -> Iterator[str]:
        """Write the table's numbers in a sentence, and theory's in a second one if they differ."""
        some = "" if self.prompts_read == self.prompts else f" (from {self.prompts_read:,} of {self.prompts:,} prompts)"
        yield (
            f"this table, with its ties and K: at beta={self.beta:.4g} the policy that fits its rewards has KL "
            f"{self.kl:.3g} nats and win rate {self.win_rate:.3f}, {_name_sides(self.procedure)}{some}"
        )
        if not self.differs:
            return
        at_beta = "no finite KL" if self.theory_kl is None else f"KL {self.theory_kl:.3g}"
        at_kl = f"no beta has KL {self.kl:.3g}"
        if self.theory_beta is not None and self.theory_win_rate is not None:
            at_kl = f"KL {self.kl:.3g} at beta={self.theory_beta:.4g}, with win rate {self.theory_win_rate:.3f}"
        rule = "theory, for scores without ties and infinitely many references"
        yield f"{rule}: {at_beta} at this beta; {at_kl}"


def _name_sides(procedure: Procedure) -> str:
    if isinstance(procedure, ByRank):
        name = format_procedure(procedure)
        one = "one completion against one of the reference"
        return one if procedure.draws == 1 else f"{name} against the reference's {name}"
    return f"under {procedure!r}"


def expect(
    table: ReferenceTable,
    transform: Transform,
    *,
    beta: float | None = None,
    kl: float | None = None,
    procedure: Procedure = Standard(),  # noqa: B008 (frozen)
    estimator: Estimator = "empirical",
    tolerance: float = 0.0,
    name: str | None = None,
) -> Expectation:
    """Solve for beta or KL, given the other, and for the win rate of the policy that fits a table's rewards.

    `transform` is at the scale that it is trained at; `procedure` decodes policy and reference. ValueError, with
    `name` for the transform, if the table's rewards do not reach the KL, or none at all.
    """
    if (beta is None) == (kl is None):
        raise ValueError(f"expect needs either beta or kl, got beta={beta!r}, kl={kl!r}.")
    rewards = TableRewards(table, transform, procedure, estimator, tolerance)
    rewards.check(name or repr(transform), kl)
    solved = rewards.beta_for_kl(kl) if kl is not None else float(beta or 0)
    if not (isfinite(solved) and solved > 0):
        raise ValueError(f"expect needs a finite beta > 0, got beta={beta!r}.")
    if kl is not None and solved < SMALLEST_BETA:
        raise ValueError(
            f"{name or repr(transform)} has a KL of {kl:g} on {name_table(table)} at beta={solved:.3g} alone, below "
            f"the {SMALLEST_BETA:g} that a trainer can use: its rewards hardly differ between the table's ranks. Use a "
            "transform that rises less steeply, or more references without ties"
        )
    reached = rewards.kl(solved)
    return Expectation(
        solved,
        reached,
        rewards.win_rate(solved),
        procedure,
        float(rewards.most_kls.mean()),
        len(table),
        len(rewards.rows),
        *_solve_theory(transform, solved, reached, procedure),
    )


def expect_of(
    reward: CalibratedReward,
    *,
    beta: float | None = None,
    kl: float | None = None,
    procedure: Procedure = Standard(),  # noqa: B008 (frozen)
    name: str | None = None,
) -> Expectation | None:
    """Call `expect` for a CalibratedReward and its own table; None where a peer's calibration replaces the ranks."""
    if not isinstance(reward.calibration, EmpiricalCDF):
        return None
    return expect(
        reward.table,
        scaled(reward.transform, reward.scale),
        beta=beta,
        kl=kl,
        procedure=procedure,
        estimator=reward.estimator,
        tolerance=reward.calibration.tolerance,
        name=name,
    )


def check_resolved(
    table: ReferenceTable, transform: Transform, *, estimator: Estimator = "empirical", name: str | None = None
) -> None:
    """Raise ValueError if a table gives every completion one reward: there is nothing to train for."""
    TableRewards(table, transform, Standard(), estimator).check(name or repr(transform), None)


def _solve_theory(
    transform: Transform, beta: float, kl: float, procedure: Procedure
) -> tuple[float | None, float | None, float | None]:
    """Return theory's KL at a beta, its beta for a KL, and the win rate there; None for what there is not."""
    try:
        at_beta: float | None = kl_of(policy_law(transform, beta))
    except ValueError:
        at_beta = None
    try:
        at_kl = beta_for_kl(transform, kl) if 0 < kl < kl_range(transform)[1] else None
    except ValueError:
        at_kl = None
    if at_kl is None:
        return at_beta, None, None
    return at_beta, at_kl, win_rate_of(policy_law(transform, at_kl, procedure), procedure)


@dataclass(frozen=True, eq=False)
class TableRewards:
    """Policies that fit the rewards of a table, at any beta: means over its prompts."""

    table: ReferenceTable
    transform: Transform = Identity()  # noqa: RUF009 (frozen)
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
        few, blocks = ValueShares.of_table(self.table, self.rows), []
        for at, scores in self.table.blocks(self.rows):
            vector = values(self.transform, scores.shape[1], self.estimator)
            if self.tolerance:
                mass, rewards, atoms = self._atoms(self.rows[at], scores, vector)
            elif few is not None:
                mass, rewards, atoms = few.laws(np.tile(scores, (draws if few.varies else 1, 1)), vector, rng)
            else:
                mass, rewards, atoms = draw_gaps(scores, vector, rng, self.common_shares, self.top_gaps, draws)
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

    @cached_property
    def common_values(self) -> npt.NDArray[np.float32]:
        """Find values that as many references as a prompt has on average have `COMMON` times or more."""
        every, counts = self._value_counts
        K = counts.sum() / len(self.rows)
        return np.asarray(every[(counts * K >= COMMON * counts.sum()) & (counts > 2)])

    @cached_property
    def common_shares(self) -> ValueShares | None:
        """Fit the shares of the common values; None if there are none."""
        if not len(self.common_values):
            return None
        blocks = [count_common(self.common_values, scores) for _, scores in self.table.blocks(self.rows)]
        return ValueShares.fit(self.common_values, np.concatenate(blocks))

    @cached_property
    def top_gaps(self) -> TopGaps:
        """The law of the gap above a prompt's highest reference, from all prompts."""
        blocks = [count_above(x, self.common_values) for _, x in self.table.blocks(self.rows)]
        return TopGaps.fit(np.sum(blocks, axis=0))

    def _atoms(self, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], vector: Array) -> Laws:
        """With a tolerance there are no gaps: the references themselves are atoms, each with its own reward."""
        K = scores.shape[1]
        u = EmpiricalCDF(self.tolerance)(self.table, np.repeat(rows, K), scores.ravel())
        reward = vector[np.rint(2 * K * np.asarray(u).reshape(scores.shape)).astype(np.int64)]
        below, upto = tie_spans(scores)
        first = below == np.arange(K)
        return np.where(first, (upto - below) / K, 0.0), reward, np.ones_like(first)

    def kl(self, beta: float) -> float:
        """Average the KL from the reference over prompts."""
        return float(np.concatenate([block.kl(beta) for block in self.blocks]).mean())

    def win_rate(self, beta: float, procedure: Procedure | None = None) -> float:
        """Average the win rate over prompts, policy and reference both under the procedure, or under another one."""
        side = self.procedure if procedure is None else procedure
        blocks = [replace(block, procedure=side, base=side) for block in self.blocks]
        return float(np.concatenate([block.win_rates(beta) for block in blocks]).mean())

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


def name_table(table: ReferenceTable) -> str:
    """Name a table in an error, by its path if it has one."""
    return f"the table {table.path}" if table.path else "this table"
