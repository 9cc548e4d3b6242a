"""What a table leads to: against enumeration of known laws, simulated duels, and fixed references without ties."""

from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
from scipy import stats

from calibrated_rewards import CalibratedReward
from calibrated_rewards.evaluation.expectations import TableRewards, check_resolved, expect, expect_of
from calibrated_rewards.evaluation.table_laws import draw_gaps
from calibrated_rewards.reward.calibrators import EmpiricalCDF, ZScore
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.fixed_references import win_rate_at_k
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform


@pytest.fixture(autouse=True)
def without_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-time types take nearly all of the time of solving for an optimum."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


EXP = scaled(Exponential(10.0), "unit")
BEST_OF_8 = cache(lambda: optimum(BestOf(8), kl=0.5))


def table_of(rows: Any) -> ReferenceTable:
    """A table with these rows, in this order."""
    return ReferenceTable.build((i.to_bytes(16, "big"), row) for i, row in enumerate(rows))


def enumerated(rows: Any, law: Any, transform: Transform, beta: float, n: int) -> tuple[float, float]:
    """Mean KL, and win rate of best of n, of pi* ~ pi_ref e^{r / beta} where the law of the scores is known.

    The reward of a score is that of its rank in the row, by counting; a best of n is F^n, and a tie one half.
    """
    scores, mass = law
    kls, rates = [], []
    for row in np.sort(rows, axis=1):
        below = (row[:, None] < scores).sum(axis=0)
        equal = (row[:, None] == scores).sum(axis=0)
        reward = np.asarray(transform((below + equal / 2) / len(row)))
        tilted = mass * np.exp((reward - reward.max()) / beta)
        policy = tilted / tilted.sum()
        kls.append(float(stats.entropy(policy, mass)))
        output, base = (np.diff(np.concatenate([[0.0], np.cumsum(p)]) ** n) for p in (policy, mass))
        rates.append(float(output @ (np.cumsum(base) - base / 2)))
    return float(np.mean(kls)), float(np.mean(rates))


FINE = (np.arange(2000.0), np.full(2000, 1 / 2000))
GRID = np.round(np.linspace(-4, 4, 100_001) * 32) / 32
LAWS = {
    "0 and 1": (np.array([0.0, 1.0]), np.array([0.65, 0.35])),
    "five ratings": (np.arange(5.0), np.array([0.1, 0.2, 0.4, 0.25, 0.05])),
    "ten ratings": (np.arange(10.0), stats.binom.pmf(np.arange(10), 9, 0.6)),
    "bfloat16": (np.unique(GRID), np.bincount(np.unique(GRID, return_inverse=True)[1], stats.norm.pdf(GRID))),
    "no ties": FINE,
}
LAWS = {name: (scores, mass / mass.sum()) for name, (scores, mass) in LAWS.items()}


@pytest.mark.parametrize("K", [8, 32])
@pytest.mark.parametrize("name", LAWS)
def test_of_a_known_law_it_is_what_enumeration_says(name: str, K: int) -> None:
    """Scores drawn from a known law: at the beta that is solved for, the tilted policy has the KL and the win rate."""
    scores, mass = LAWS[name]
    rows = np.random.default_rng(K).choice(scores, p=mass, size=(500, K))
    for transform, n in ((BEST_OF_8().transform, 8), (Identity(), 1), (EXP, 4)):
        found = expect(table_of(rows), transform, kl=0.5, procedure=BestOf(n))
        kl, rate = enumerated(rows, (scores, mass), transform, found.beta, n)
        assert found.kl == pytest.approx(0.5, rel=1e-6)
        assert kl == pytest.approx(0.5, rel=0.13)
        assert rate == pytest.approx(found.win_rate, abs=0.02)


def test_rewards_of_0_and_1_need_another_beta_than_theory() -> None:
    """The case that was promised .930: with shares of 35 % it is .516, at a beta more than 20 times smaller."""
    rows = np.repeat(np.array([[0.0] * 65 + [1.0] * 35]), 20, axis=0)
    found = expect(table_of(rows), BEST_OF_8().transform, kl=0.5, procedure=BestOf(8))
    kl, rate = enumerated(rows, LAWS["0 and 1"], BEST_OF_8().transform, found.beta, 8)

    assert found.kl == pytest.approx(kl, rel=1e-9) == pytest.approx(0.5, rel=1e-6)
    assert found.win_rate == pytest.approx(rate, abs=1e-12) == pytest.approx(0.516, abs=0.001)
    assert found.theory_beta == pytest.approx(0.2385, abs=1e-4)
    assert found.theory_win_rate == pytest.approx(0.930, abs=1e-3)
    assert found.theory_beta > 20 * found.beta
    assert found.differs
    own, theirs = found.lines()
    assert own.startswith(f"this table, with its ties and K: at beta={found.beta:.4g} the policy that fits its rewards")
    assert "KL 0.5 at beta=0.2385, with win rate 0.930" in theirs


def test_without_ties_a_policy_fits_its_references() -> None:
    """At K = 32 and theory's beta for a KL of .5 it is 1.28, as `win_rate_at_k` has it from draws of its own."""
    rows = np.random.default_rng(0).normal(size=(3000, 32))
    choice = BEST_OF_8()
    found = expect(table_of(rows), choice.transform, beta=choice.beta, procedure=BestOf(8))
    other = win_rate_at_k(choice.transform, choice.beta, BestOf(8), 32, draws=3000, seed=1)

    assert found.kl == pytest.approx(other.kl, abs=4 * other.kl_error)
    assert found.win_rate == pytest.approx(other.win_rate, abs=4 * other.win_rate_error)
    assert found.kl == pytest.approx(1.28, abs=0.03)
    assert found.theory_kl == pytest.approx(0.5)


def test_where_theory_agrees_it_is_not_repeated() -> None:
    """At K = 4000 without ties one line is said, and a weak tilt of it is the theory's."""
    found = expect(table_of(np.random.default_rng(0).normal(size=(50, 4000))), Identity(), kl=0.1)

    assert not found.differs
    assert len([*found.lines()]) == 1
    assert found.beta == pytest.approx(found.theory_beta, rel=0.02)
    assert found.win_rate == pytest.approx(found.theory_win_rate, abs=0.003)


@pytest.mark.parametrize("procedure", [Standard(), BestOf(4), WorstOf(3)])
def test_win_rates_by_duels(procedure: Any) -> None:
    """Best and worst of n drawn from policy and reference over atoms, ties half, a hundred thousand times."""
    scores, rng = np.arange(4), np.random.default_rng(1)
    counts = np.array([3, 5, 8, 4])
    row = np.repeat(scores, counts).astype(float)
    found = expect(table_of([row, row]), EXP, kl=0.3, procedure=procedure)
    reward = values(EXP, 20)[2 * (np.cumsum(counts) - counts) + counts]
    policy = counts / 20 * np.exp(reward / found.beta)
    drawn = [rng.choice(scores, p=p / p.sum(), size=(100_000, procedure.draws)) for p in (policy, counts / 20)]
    ours, theirs = (np.take_along_axis(x, procedure.choose(x, rng)[:, None], 1)[:, 0] for x in drawn)

    assert found.win_rate == pytest.approx(np.mean((ours > theirs) + (ours == theirs) / 2), abs=0.005)
    assert found.kl == pytest.approx(stats.entropy(policy, counts))


def test_a_prompts_share_is_drawn_to_that_of_all() -> None:
    """Prompts of one share are pooled, prompts of 0 or 1 alone keep their own; of mixed ones a Beta says how likely."""
    rng = np.random.default_rng(0)
    for shares, alike in ((np.full(4000, 0.3), 1e6), (rng.beta(2, 3, 4000), 5.0)):
        rows = (rng.random((4000, 16)) < shares[:, None]).astype(float)
        policies = TableRewards(table_of(rows), Identity()).blocks[0]
        ones, counts = np.diff(policies.ends)[:, 1], rows.sum(axis=1)
        for count in (2, 5, 8, 11):
            after = stats.beta(count + alike * shares.mean(), 16 - count + alike * (1 - shares.mean()))
            drawn = ones[counts == count]
            if len(drawn) > 100:
                assert drawn.mean() == pytest.approx(after.mean(), abs=0.02 + 4 * after.std() / len(drawn) ** 0.5)
                assert drawn.std() == pytest.approx(after.std(), abs=0.015)
    apart = np.repeat([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], 5, axis=0)
    assert TableRewards(table_of(apart), Identity()).most_kls.max() == 0


def by_prompt(laws: Any, K: int, transform: Transform, procedure: Any, kl: float = 0.5) -> tuple[Any, float, float]:
    """What is promised on references of prompts that have each its own law, and what these laws lead to."""
    rng = np.random.default_rng(K)
    rows = [rng.choice(scores, p=mass, size=K) for scores, mass in laws]
    found = expect(table_of(rows), transform, kl=kl, procedure=procedure)
    truth = [
        enumerated([row], law, transform, found.beta, procedure.draws) for row, law in zip(rows, laws, strict=True)
    ]
    return found, *np.mean(truth, axis=0).tolist()


@pytest.mark.parametrize("K", [8, 32, 100])
@pytest.mark.parametrize("alpha", [[0.5, 0.8], [0.6, 1.0, 2.0, 1.0, 0.6]])
def test_ratings_that_differ_by_prompt(alpha: list[float], K: int) -> None:
    """Prompts of all difficulties: some always solved, some hardly ever; the KL is promised for these very shares."""
    rng = np.random.default_rng(0)
    laws = [(np.arange(len(alpha)), mass) for mass in rng.dirichlet(alpha, 800)]
    for transform, procedure in ((BEST_OF_8().transform, BestOf(8)), (EXP, BestOf(4)), (Identity(), Standard())):
        found, kl, rate = by_prompt(laws, K, transform, procedure)
        assert kl == pytest.approx(0.5, rel=0.1)
        assert rate == pytest.approx(found.win_rate, abs=0.015)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("name", ["0 and 1", "five ratings", "ten ratings"])
def test_few_references_of_few_values(name: str, K: int) -> None:
    """Ratings need not tie among two references of a prompt, and are ratings."""
    for transform, procedure in ((EXP, BestOf(4)), (Identity(), Standard())):
        found, kl, rate = by_prompt([LAWS[name]] * 2000, K, transform, procedure)
        assert kl == pytest.approx(0.5, rel=0.15)
        assert rate == pytest.approx(found.win_rate, abs=0.03)


def test_a_value_that_is_common_in_the_table() -> None:
    """Scores that are clipped: nothing is above the cap in a prompt that has it but once."""
    rng = np.random.default_rng(0)
    rows = np.sort(np.minimum(rng.normal(size=(800, 8)), 0.4), axis=1)
    policies = TableRewards(table_of(rows), Identity()).blocks[0]
    count = np.tile((rows == 0.4).sum(axis=1), len(policies.rewards) // len(rows))
    highest = np.where(np.diff(policies.ends) > 0, policies.rewards, -1).max(axis=1)

    assert (count == 1).sum() > 50
    assert highest[count > 0] == pytest.approx(1 - count[count > 0] / 16)
    assert highest[count == 0] == pytest.approx(1.0)


@pytest.mark.parametrize("cap", [0.4, 9.0])
def test_rows_drawn_three_times_are_three_draws(cap: float) -> None:
    """With and without a common value: the very numbers of drawing them one time after the other."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 12)) + rng.normal(size=(30, 1))  # prompts differ in how often they have the cap
    rows = np.sort(np.minimum(scores, cap), axis=1).astype(np.float32)
    rewards = TableRewards(table_of(rows))
    vector, parts = values(Identity(), 12, "empirical"), (rewards.common_shares, rewards.top_gaps)
    one, other = np.random.default_rng(1), np.random.default_rng(1)
    single = [draw_gaps(rows, vector, one, *parts) for _ in range(3)]
    for found, expected in zip(draw_gaps(rows, vector, other, *parts, 3), zip(*single, strict=True), strict=True):
        np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([[1.0] * 4, [2.0] * 6], {"kl": 0.1}, "N has nothing to tell on this table: .* in each of its 2 prompts"),
        ([[1.0] * 4, [2.0] * 6], {"beta": 0.1}, "N has nothing to tell"),
        ([[0.0, 1.0] * 4] * 3, {"kl": 0.7}, r"N asks for a KL of 0.7, .* less than 0.693, .* 100 % of its prompts"),
        ([[0.0, 1.0] * 4] * 3, {"kl": -1.0}, "a KL is finite and > 0, got -1.0"),
        ([[0.0, 1.0] * 4] * 3, {"beta": 0.0}, "finite beta > 0, got beta=0.0"),
        ([[0.0, 1.0] * 4] * 3, {}, "either beta or kl"),
        (
            [[0.0, 1.0] * 4] * 3,
            {"kl": 0.5, "transform": Exponential(-200.0)},
            "N has a KL of 0.5 on this .* that a trai",
        ),
    ],
)
def test_what_a_table_cannot_resolve(rows: Any, settings: Any, message: str) -> None:
    """Constant rows, a KL beyond the ties, a beta that no trainer can use: what, where, how many, and what to do."""
    given = {"transform": EXP, **settings}
    with pytest.raises(ValueError, match=message):
        expect(table_of(rows), given.pop("transform"), name="N", **given)


def test_check_resolved() -> None:
    """Of equal references nothing is learned by any transform; of one reference something is."""
    with pytest.raises(ValueError, match="has nothing to tell"):
        check_resolved(table_of([[3.0] * 5]), Log())
    check_resolved(table_of([[3.0]]), Log())
    check_resolved(table_of([[3.0] * 5, [1.0, 2.0]]), Log())


def test_ragged_rows_and_any_estimator() -> None:
    """Rows of several K are averaged; the mean over blocks is the mean over prompts."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=int(k)) for k in rng.integers(2, 40, 300)]
    for estimator in ("empirical", "posterior", "randomised"):
        found = expect(table_of(rows), EXP, kl=0.4, estimator=estimator)
        again = expect(table_of(rows), EXP, beta=found.beta, estimator=estimator)
        assert again.kl == pytest.approx(found.kl) == pytest.approx(0.4)
        assert (found.prompts, found.prompts_read) == (300, 300)


def test_a_large_table_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, evenly spaced, and it is said; the numbers are those of the table."""
    rows = np.random.default_rng(0).normal(size=(3000, 10))
    whole = expect(table_of(rows), EXP, kl=0.4)
    monkeypatch.setattr("calibrated_rewards.evaluation.expectations.MOST_REFERENCES", 6000)
    part = expect(table_of(rows), EXP, kl=0.4)

    assert (part.prompts, part.prompts_read) == (3000, 600)
    assert "(from 600 of 3,000 prompts)" in next(part.lines())
    assert part.beta == pytest.approx(whole.beta, rel=0.05)


def test_of_a_reward() -> None:
    """Its own table, scale, estimator and tolerance; of a peer's calibration nothing is promised."""
    table = table_of(np.random.default_rng(0).normal(size=(40, 12)))
    reward = CalibratedReward(HashScorer(), table, Exponential(5.0), scale="standard", estimator="posterior")
    found = expect_of(reward, kl=0.3)
    assert found == expect(table, scaled(Exponential(5.0), "standard"), kl=0.3, estimator="posterior")
    wide = CalibratedReward(HashScorer(), table, calibration=EmpiricalCDF(tolerance=100.0))
    with pytest.raises(ValueError, match="has nothing to tell"):
        expect_of(wide, kl=0.3)
    assert expect_of(CalibratedReward(HashScorer(), table, calibration=ZScore()), beta=1.0) is None
