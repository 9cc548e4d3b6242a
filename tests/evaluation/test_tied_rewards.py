"""Tied rewards: closed forms of 0/1 rewards, and what `expect` promises where each prompt's law is known."""

from typing import Any

import jaxtyping
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit, rel_entr

from calibrated_rewards.evaluation.expectations import TableRewards, expect
from calibrated_rewards.evaluation.table_laws import mean_masses
from calibrated_rewards.table.reference_table import ReferenceTable
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


def continuous_with(atoms: Any, share: float) -> tuple[Any, Any]:
    """The law of a score that is uniform on [0, CELLS], in cells, or with chance `share` one of the atoms."""
    scores = np.concatenate([np.arange(CELLS) + 0.5, atoms])
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
