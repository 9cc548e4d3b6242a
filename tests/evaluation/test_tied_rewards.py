"""Tied rewards: closed forms of 0/1 rewards, and what `expect` promises where each prompt's law is known."""

from itertools import combinations
from typing import Any

import jaxtyping
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit, rel_entr

from calibrated_rewards.evaluation.expectations import TableRewards, expect
from calibrated_rewards.evaluation.table_laws import TopGaps, count_above, mean_masses
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Power, Transform

EXP = scaled(Exponential(10.0), "unit")
METHODS = [(Identity(), Standard()), (EXP, BestOf(4)), (Power(7.0), BestOf(8))]


@pytest.fixture(autouse=True)
def without_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-time types take most of the time of a look-up in a loop."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def table_of(rows: Any) -> ReferenceTable:
    """A table with these rows, in this order."""
    return ReferenceTable.build((i.to_bytes(16, "big"), row) for i, row in enumerate(rows))


@pytest.mark.parametrize("transform", [Identity(), EXP, Log(), Power(3.0)])
@pytest.mark.parametrize("passes", [1, 20, 35, 99])
def test_two_values_have_closed_forms(transform: Transform, passes: int) -> None:
    """The odds of a pass rise by e^{gap / beta}; a win rate is one half and half the gain in pass@N, or all-pass@N."""
    p, beta = passes / 100, 0.3
    gap = float(np.diff(transform(np.array([(1 - p) / 2, 1 - p / 2])))[0])
    q = expit(logit(p) + gap / beta)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    table = table_of([[0.0] * (100 - passes) + [1.0] * passes])
    for n in (1, 2, 8):
        best = expect(table, transform, beta=beta, procedure=BestOf(n))
        worst = expect(table, transform, beta=beta, procedure=WorstOf(n))
        assert best.kl == pytest.approx(kl, abs=1e-9)
        assert best.win_rate == pytest.approx(0.5 + ((1 - p) ** n - (1 - q) ** n) / 2, abs=1e-9)
        assert worst.win_rate == pytest.approx(0.5 + (q**n - p**n) / 2, abs=1e-9)


def truths(rows: Any, laws: Any, transform: Transform, beta: float, n: int) -> tuple[Any, Any]:
    """KL and win rate of each prompt's policy, its law enumerated: ranks by counting, the best of n as F^n."""
    kls, rates = [], []
    for row, (scores, mass) in zip(rows, laws, strict=True):
        ordered, own = np.sort(np.float32(row)), np.float32(scores)
        rank = (np.searchsorted(ordered, own) + np.searchsorted(ordered, own, "right")) / 2
        reward = np.asarray(transform(rank / len(row)))
        tilted = mass * np.exp((reward - reward.max()) / beta)
        policy = tilted / tilted.sum()
        kls.append(float(stats.entropy(policy, mass)))
        output, base = (np.diff(np.concatenate([[0.0], np.cumsum(x)]) ** n) for x in (policy, mass))
        rates.append(float(output @ (np.cumsum(base) - base / 2)))
    return np.array(kls), np.array(rates)


CELLS = 500


def continuous_with(atoms: Any, share: float, offset: float = 0.0) -> tuple[Any, Any]:
    """The law of a score that is uniform on CELLS cells from the offset, or with chance `share` one of the atoms."""
    scores = np.concatenate([offset + np.arange(CELLS) + 0.5, atoms])
    mass = np.concatenate([np.full(CELLS, (1 - share) / CELLS), np.full(len(atoms), share / len(atoms))])
    order = np.argsort(scores)
    return scores[order], mass[order]


def draw(rng: Any, atoms: Any, share: float, K: int) -> Any:
    return np.where(rng.random(K) < share, rng.choice(atoms, K), rng.random(K) * CELLS)


def make_case(name: str, K: int, prompts: int) -> tuple[Any, Any]:
    """References and laws of prompts, by the name of a case of `test_promises_with_ties_are_kept`."""
    rng = np.random.default_rng(K)
    if name == "0 and 1":
        shares = rng.beta(1.0, 1.5, prompts)
        laws = [(np.arange(2.0), np.array([1 - p, p])) for p in shares]
    elif name == "five levels":
        laws = [(np.arange(5.0), mass) for mass in rng.dirichlet([0.6, 1.0, 2.0, 1.0, 0.6], prompts)]
    else:
        places = {"floor": [-1.0], "cap": [CELLS + 1.0]}
        own = np.floor(rng.random(prompts) * CELLS) + 0.25
        atoms = [places.get(name, [at]) for at in own]
        return [draw(rng, at, 0.3, K) for at in atoms], [continuous_with(at, 0.3) for at in atoms]
    return [rng.choice(scores, p=mass, size=K) for scores, mass in laws], laws


@pytest.mark.parametrize("K", [8, 32, 100])
@pytest.mark.parametrize("name", ["0 and 1", "five levels", "floor", "cap", "own place"])
def test_promises_with_ties_are_kept(name: str, K: int) -> None:
    """Win rate within .02 of enumeration, KL within .02 and what the draw of 600 prompts leaves open (3 errors).

    "floor", "cap" and "own place": 30 % of completions have one score, all prompts' lowest, highest, or their own.
    """
    rows, laws = make_case(name, K, 600)
    for transform, procedure in METHODS:
        promise = expect(table_of(rows), transform, kl=0.4, procedure=procedure)
        kls, rates = truths(rows, laws, transform, promise.beta, procedure.draws)
        assert rates.mean() == pytest.approx(promise.win_rate, abs=0.02)
        assert kls.mean() == pytest.approx(0.4, abs=0.02 + 3 * kls.std() / len(kls) ** 0.5)


def make_own_caps(share: float, K: int, prompts: int) -> tuple[Any, Any]:
    """References and laws of prompts that differ by an offset: `share` of each one's scores is at its cap."""
    rng = np.random.default_rng(K)
    offsets = 1000.0 * rng.permutation(prompts)
    laws = [continuous_with([at + CELLS + 1.0], share, at) for at in offsets]
    return [draw(rng, [CELLS + 1.0], share, K) + at for at in offsets], laws


@pytest.mark.parametrize("K", [16, 64])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_nothing_is_promised_above_a_prompts_own_cap(share: float, K: int) -> None:
    """KL and win rate by enumeration, as above; what the cap leaves out of reach is refused."""
    rows, laws = make_own_caps(share, K, 400)
    table, transform = table_of(rows), optimum(BestOf(4), kl=0.3).transform
    promise = expect(table, transform, kl=0.3, procedure=BestOf(4))
    kls, rates = truths(rows, laws, transform, promise.beta, 4)
    assert rates.mean() == pytest.approx(promise.win_rate, abs=0.02)
    assert kls.mean() == pytest.approx(0.3, abs=0.02 + 3 * kls.std() / len(kls) ** 0.5)
    if share > 0.1:
        with pytest.raises(ValueError, match="with all weight on the best of each prompt"):
            expect(table, transform, kl=0.2 - np.log(share), procedure=BestOf(4))


def test_few_references_hide_a_prompts_own_cap() -> None:
    """A known limit, stated in the theory page: a cap that one of 8 references has looks like a score without ties."""
    rows, laws = make_own_caps(0.3, 8, 2000)
    transform = optimum(BestOf(4), kl=0.3).transform
    promise = expect(table_of(rows), transform, kl=0.3, procedure=BestOf(4))
    kls, rates = truths(rows, laws, transform, promise.beta, 4)
    assert kls.mean() == pytest.approx(0.22, abs=0.04)
    assert 0.03 < promise.win_rate - rates.mean() < 0.07


def leave_out(rows: Any, left: int, tied: bool) -> tuple[float, int]:
    """Cases above and trials of `count_above`, one subset after the other."""
    above = trials = 0
    for row in rows:
        for out in combinations(range(len(row)), left):
            others = np.delete(row, out)
            if ((others == others.max()).sum() > 1) == tied:
                trials += 1
                above += bool((row[list(out)] > others.max()).all())
    return above, trials


def test_references_above_all_others_by_leaving_each_out() -> None:
    """`count_above` is enumeration of all subsets; common values are as if they were not there."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(8, size=(400, 7)), axis=1).astype(np.float32)
    weights = {1: 7, 2: 21}
    for (above, trials), (left, tied) in zip(
        count_above(rows, rows[0, :0]).T, [(1, False), (2, False), (1, True)], strict=True
    ):
        cases, subsets = leave_out(rows, left, tied)
        assert (above, trials) == (cases * weights[left], subsets)
    with_common = np.sort(np.hstack([rows, np.full((400, 3), 3.5, np.float32)]), axis=1)
    common = np.array([3.5], np.float32)
    assert count_above(with_common, common).tolist() == count_above(rows, common).tolist()


def test_gaps_above_have_a_chance_and_a_mean() -> None:
    """Without ties gaps stay as they are; else a share of them is left, exponential with another mean."""
    gaps = np.random.default_rng(0).exponential(size=200_000)
    tied = np.arange(len(gaps)) % 2 == 1
    untied = count_above(np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32), np.empty(0, np.float32))
    assert TopGaps.fit(untied) == TopGaps((1.0, 1.0), (1.0, 1.0))
    assert (TopGaps.fit(untied).rescale(gaps, tied) == gaps).all()
    drawn = TopGaps((0.4, 1.0), (2.5, 1.5)).rescale(gaps, tied)
    assert (drawn[~tied] > 0).mean() == pytest.approx(0.4, abs=0.01)
    assert stats.kstest(drawn[~tied & (drawn > 0)] / 2.5, "expon").pvalue > 1e-3
    assert drawn[tied] == pytest.approx(1.5 * gaps[tied])


@pytest.mark.parametrize(("K", "kl"), [(8, 0.8), (32, 0.7), (100, 0.6)])
def test_pass_rates_of_a_few_kinds_are_underestimated(K: int, kl: float) -> None:
    """A known limit, stated in the guide: the prior has no peaks. Of .02, .3 and .9 KL is above the promise."""
    rng = np.random.default_rng(K)
    p = rng.choice([0.02, 0.3, 0.9], 2000)
    rows = (rng.random((2000, K)) < p[:, None]).astype(float)
    promise = expect(table_of(rows), EXP, kl=0.5, procedure=BestOf(4))
    passed = rows.mean(axis=1)
    gap = np.asarray(EXP(1 - passed / 2)) - np.asarray(EXP((1 - passed) / 2))
    q = expit(logit(p) + gap / promise.beta)
    true_kl = (rel_entr(q, p) + rel_entr(1 - q, 1 - p)).mean()
    rate = (0.5 + ((1 - p) ** 4 - (1 - q) ** 4) / 2).mean()
    assert true_kl == pytest.approx(kl, abs=0.1)
    assert 0.0 < rate - promise.win_rate < 0.06


def test_masses_of_values_by_their_references() -> None:
    """The mean true mass of values that r of K references have, over 40,000 prompts whose masses are known."""
    rng, K = np.random.default_rng(0), 12
    truth = np.array([0.02] * 20 + [0.1] * 3 + [0.3])
    counts = rng.multinomial(K, truth, size=40_000)
    estimates = mean_masses(counts[counts > 0], K)
    for r in range(1, 6):
        # K references rather than K - 1: the posterior moves little.
        seen = rng.multinomial(K - 1, truth, size=40_000) == r
        assert estimates[r] == pytest.approx((seen * truth).sum() / seen.sum(), rel=0.03)
    assert mean_masses(np.ones(50, np.int64), 10)[1] == 0.0


def test_values_that_tie_by_chance_get_the_mass_they_have() -> None:
    """Each prompt has 87 equally likely scores of its own: two of 32 references do not make one of 1/16."""
    rng, K, cells = np.random.default_rng(0), 32, 87
    rows = rng.integers(cells, size=(1000, K)) + rng.random((1000, 1))
    policies = TableRewards(table_of(rows), Identity()).blocks[0]
    assert policies.atoms is not None
    masses = np.diff(policies.ends)[policies.atoms]
    assert np.quantile(masses[masses > 0], [0.05, 0.5, 0.95]) == pytest.approx([1 / cells] * 3, rel=0.2)
