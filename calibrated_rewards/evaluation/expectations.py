"""Expectations before training: beta, KL and win rate on a table, with its own ties and its own K.

`theory` assumes scores that never tie and infinitely many references; `table_laws` has the reward's law on a table.
`expect` is the one place that solves for beta on a table: commands, training runs and the report use its numbers.

>>> from calibrated_rewards.theory.transforms import Exponential
>>> table = ReferenceTable.build([(f"prompt {i}", [0.0] * 6 + [1.0] * 4) for i in range(50)])
>>> expectation = expect(table, scaled(Exponential(10.0), "unit"), kl=0.5, procedure=BestOf(4))
>>> for line in expectation.lines():
...     print(line)
this table, with its ties and K: at beta=0.05613 the policy that fits its rewards has KL 0.5 nats and win rate ...
theory, for scores without ties and infinitely many references: KL 4.05 at this beta; KL 0.5 at beta=0.3184, ...
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

from calibrated_rewards.evaluation.table_laws import TableRewards, name_table
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.procedures import BestOf, Procedure, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, kl_of, kl_range, policy_law, win_rate_of
from calibrated_rewards.theory.transforms import Transform

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
    match procedure:
        case BestOf(n=n) if n > 1:
            return f"best of {n} against the reference's best of {n}"
        case WorstOf(n=n) if n > 1:
            return f"worst of {n} against the reference's worst of {n}"
        case Standard() | BestOf() | WorstOf():
            return "one completion against one of the reference"
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
