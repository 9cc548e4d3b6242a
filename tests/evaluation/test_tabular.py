"""The exact world of benchmarks/tabular: its enumerations against simulation, theory and brute force, and training."""

import itertools
from typing import Any

import enumerable
import numpy as np
import pytest
import torch
from exact import OUTPUTS, Exact, best_of, rewind, worst_of
from scipy.optimize import minimize

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.win_rate import win_rate
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate as predicted
from calibrated_rewards.theory.transforms import Exponential
from calibrated_rewards.training.online import GRPOSettings, PPOSettings, grpo, ppo

PROCEDURES = {repr(each): each for each in (Standard(), BestOf(4), WorstOf(4), RewindAndRepeat())}
each_procedure = pytest.mark.parametrize("name", PROCEDURES)


def world(prompts: int, completions: int, levels: int, seed: int = 0) -> Exact:
    """Skewed laws and scores that tie, drawn at random."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (prompts, completions)).astype(float)
    return Exact(rng.dirichlet(np.ones(completions), prompts), scores)


def tilted(here: Exact, kl: float = 0.5) -> np.ndarray:
    """An optimum, far from the reference."""
    return here.at_kl(here.quantiles**3, kl)


def test_quantiles_are_those_of_a_double_loop() -> None:
    """The chance of a lower score, and half that of the same."""
    here = world(2, 9, 4)
    for law, scores, found in zip(here.laws, here.scores, here.quantiles, strict=True):
        pairs = [[p * ((b < a) + (b == a) / 2) for p, b in zip(law, scores, strict=True)] for a in scores]
        np.testing.assert_allclose(found, np.sum(pairs, 1), atol=1e-12)


@pytest.mark.parametrize(
    ("output", "procedure"),
    [
        (lambda mass, u: best_of(3, mass, u), BestOf(3)),
        (lambda mass, u: worst_of(3, mass, u), WorstOf(3)),
        (lambda mass, u: rewind(0.6, 3, mass, u), RewindAndRepeat(0.6, 3)),
    ],
)
def test_outputs_are_those_of_all_triples(output: Any, procedure: Any) -> None:
    """Every three draws in order, with their probability, and the level that the package's own procedure chooses."""
    mass, u = np.array([[0.1, 0.4, 0.2, 0.3]]), np.array([[0.05, 0.5, 0.6, 0.85]])
    expected, rng = np.zeros(4), np.random.default_rng(0)
    for draws in itertools.product(range(4), repeat=3):
        chosen = draws[int(procedure.choose(u[0, list(draws)], rng))]
        expected[chosen] += mass[0, list(draws)].prod()
    np.testing.assert_allclose(output(mass, u)[0], expected, atol=1e-12)


@each_procedure
def test_win_rates_are_those_of_many_samples(name: str) -> None:
    """Within four standard errors of the U-statistic of thousands of draws, of policy and reference."""
    here, rng = world(3, 40, 8), np.random.default_rng(1)
    policy = tilted(here)
    # Quantiles in place of scores: they tie alike, and rewinding looks at them.
    ours, theirs = (
        Samples([rng.choice(u, 3000, p=law) for u, law in zip(here.quantiles, laws, strict=True)])
        for laws in (policy, here.laws)
    )
    found = win_rate(ours, theirs, PROCEDURES[name], jackknife=name != repr(RewindAndRepeat()))
    error = found.sampling_error if name != repr(RewindAndRepeat()) else 0.003
    assert abs(found.value - here.win_rate(policy, OUTPUTS[name])) < 4 * error < 0.03


@each_procedure
def test_a_fine_grained_world_is_the_theory(name: str) -> None:
    """With ever more completions, each ever rarer, win rates come to those of the integrals."""
    phi, kl = Exponential(5.0), 0.5
    expected = predicted(phi, beta_for_kl(phi, kl), PROCEDURES[name])
    missed = []
    for completions in (50, 5000):
        here = world(4, completions, 10**9)
        law = here.at_kl(np.exp(5 * here.quantiles), kl)
        missed.append(abs(here.win_rates(law)[name] - expected))
    assert missed[1] < 0.002
    assert missed[1] < missed[0]


def test_the_optimum_is_the_best_law() -> None:
    """No law that a general optimiser finds has a larger E[value] - beta KL; and beta is the one of the KL."""
    here = world(1, 6, 3)
    values = here.quantiles**2
    beta = here.beta(values, 0.4)

    def cost(logits: np.ndarray) -> float:
        law = np.exp(logits - logits.max())[None] / np.exp(logits - logits.max()).sum()
        return beta * here.kl(law) - float((law * values).sum())

    found = minimize(cost, np.zeros(6), tol=1e-12)
    best = here.optimum(values, beta)
    assert cost(np.log(best[0])) == pytest.approx(found.fun, abs=1e-6)
    assert here.kl(best) == pytest.approx(0.4, abs=1e-9)


def test_the_language_model_has_the_law_of_its_own_logits(tmp_path: Any) -> None:
    """Each completion's law multiplies what one plain forward says of each token; files keep it, padding does not."""
    prompts = ("a", "bc")
    model = enumerable.Tabular(2, seed=3, prompts=prompts, letters=3)
    model.save_pretrained(tmp_path)
    again = enumerable.Tabular.from_pretrained(tmp_path)
    texts = enumerable.completions(2, 3)
    for prompt in prompts:
        law = enumerable.law(again, prompt, 2)
        assert law.sum() == pytest.approx(1)
        for ids, chance in zip(texts, law, strict=True):
            row = torch.tensor([[3, 1, *enumerable.tokens(prompt), *ids]])
            mask = torch.tensor([[0, 0, *[1] * (len(prompt) + len(ids))]])
            logits = model(row, mask).logits[0].detach().softmax(-1)
            steps = [float(logits[2 + len(prompt) + t - 1, token]) for t, token in enumerate(ids)]
            assert np.prod(steps) == pytest.approx(chance, rel=1e-4)


PROMPTS = ("a", "bc", "ca", "cb")


@pytest.fixture(scope="module")
def small() -> Exact:
    """A world that is trained in a second: four prompts, completions of up to two of five tokens."""
    model = enumerable.Tabular(2, prompts=PROMPTS, letters=4)
    texts = [enumerable.text(ids) for ids in enumerable.completions(2, 4)]
    scores = np.array([enumerable.TiedScorer()([prompt] * len(texts), texts) for prompt in PROMPTS])
    return Exact(np.array([enumerable.law(model, prompt, 2) for prompt in PROMPTS]), scores)


def rewarded(here: Exact) -> CalibratedReward:
    """e^{5u} among references in the proportions of the law."""
    counts = np.round(here.laws * 20_000).astype(int)
    rows = ((p, np.repeat(s, n)) for p, s, n in zip(PROMPTS, here.scores, counts, strict=True))
    return CalibratedReward(enumerable.TiedScorer(), ReferenceTable.build(rows), Exponential(5.0))


@pytest.mark.parametrize(("loop", "settings"), [(ppo, PPOSettings), (grpo, GRPOSettings)])
def test_the_loops_reach_the_optimum(loop: Any, settings: Any, small: Exact) -> None:
    """Best-of-4 win rate within half a point of the optimum's at the same KL, and near it in total variation."""
    values = np.expm1(5 * small.quantiles) / np.expm1(5)
    beta = small.beta(values, 0.5)
    model = enumerable.Tabular(2, prompts=PROMPTS, letters=4)
    policy = Policy(model, enumerable.tokenizer(4), Decoding(2), Text())
    size = {"completions": 128, "epochs": 1, "value_lr": 3e-2} if loop is ppo else {"completions": 32}
    chosen = settings(beta=beta, steps=120, prompts_a_step=4, lr=0.15, rows=256, **size)

    loop.train(policy, rewarded(small), [Asked(p) for p in PROMPTS], chosen)

    got = np.array([enumerable.law(model, prompt, 2) for prompt in PROMPTS])
    best = small.at_kl(values, small.kl(got))
    assert small.distance(small.laws, small.optimum(values, beta)) > 0.3  # there was something to learn
    assert small.distance(got, small.optimum(values, beta)) < 0.03
    assert small.win_rates(best)["BestOf(n=4)"] - small.win_rates(got)["BestOf(n=4)"] < 0.005
