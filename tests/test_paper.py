"""The paper's statements on simulated models: lemmas 1, 3, 4, 7, theorem 2, corollary 1, theorem 5.

A "model" here is a finite set of responses with reference probabilities and rewards, or a continuous one by sampling:
nothing in this file uses the library's quadrature to make its expectations.
"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import optimize, stats
from scipy.special import logsumexp, softmax

from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity, Log

sizes = st.integers(2, 8)


@st.composite
def finite_models(draw):
    """Reference probabilities and rewards over a few responses, with ties."""
    size = draw(sizes)
    weights = draw(st.lists(st.floats(0.05, 1.0), min_size=size, max_size=size))
    rewards = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, 7.0]), min_size=size, max_size=size))
    return np.array(weights) / np.sum(weights), np.array(rewards)


def calibrated_reward(reference, rewards):
    """Definition 2, a double loop in disguise: P(below) + P(equal) / 2."""
    wins = (rewards[:, None] > rewards) + 0.5 * (rewards[:, None] == rewards)
    return wins @ reference


def divergence(policy, reference):
    """KL(policy || reference)."""
    return float(np.sum(policy * np.log(policy / reference)))


@given(finite_models())
def test_lemma_2_calibration_keeps_the_order_within_0_and_1(model):
    """r(y) >= r(z) implies C(y) >= C(z), and C lies in [0, 1]."""
    reference, rewards = model
    calibrated = calibrated_reward(reference, rewards)

    assert ((calibrated >= 0) & (calibrated <= 1)).all()
    assert (np.diff(calibrated[np.argsort(rewards, kind="stable")]) >= -1e-15).all()
    # Its mean under the reference is 1/2, ties or not: what the drift alarm watches.
    assert calibrated @ reference == pytest.approx(0.5)


@given(finite_models(), st.floats(0.1, 5.0))
def test_lemma_3_calibration_ignores_strictly_increasing_maps(model, power):
    """C of m(r) is C of r, for m that stretch and squeeze."""
    reference, rewards = model
    for mapped in (np.arctan(power * rewards), power * rewards - 3, np.sign(rewards) * np.abs(rewards) ** power):
        assert calibrated_reward(reference, mapped) == pytest.approx(calibrated_reward(reference, rewards))


@pytest.mark.parametrize(
    "draw", [np.random.Generator.normal, np.random.Generator.exponential], ids=["normal", "exponential"]
)
def test_lemma_4_calibrated_rewards_are_uniform(draw):
    """C of fresh samples among 20,000 references: Kolmogorov-Smirnov against Unif[0, 1]."""
    rng = np.random.default_rng(3)
    references = np.sort(draw(rng, size=20_000))
    calibrated = np.searchsorted(references, draw(rng, size=2000)) / 20_000

    assert stats.kstest(calibrated, "uniform").pvalue > 1e-3


@settings(max_examples=30)
@given(finite_models(), st.floats(0.1, 5.0))
def test_lemma_7_the_tilt_maximises_reward_minus_kl(model, beta):
    """pi ~ pi_ref e^{R/beta} against a numerical optimiser over logits, and against lemma 1's reward for it."""
    reference, rewards = model

    def loss(logits):
        policy = softmax(logits)
        return -(policy @ rewards - beta * divergence(policy, reference))

    tilted = softmax(np.log(reference) + rewards / beta)
    found = optimize.minimize(loss, np.log(reference), method="BFGS", options={"gtol": 1e-9})

    assert loss(np.log(tilted)) <= found.fun + 1e-9
    assert -loss(np.log(tilted)) == pytest.approx(beta * logsumexp(np.log(reference) + rewards / beta))
    # Lemma 1: any policy is the optimum of R = beta log(pi / pi_ref).
    recovered = softmax(np.log(reference) + beta * np.log(tilted / reference) / beta)
    assert recovered == pytest.approx(tilted)


@settings(max_examples=30)
@given(finite_models(), st.floats(0.1, 2.0))
def test_corollary_1_the_identity_is_optimal_for_the_standard_win_rate(model, beta):
    """On finite models with ties: the maximiser of W - beta KL is the tilt by C itself."""
    reference, rewards = model
    calibrated = calibrated_reward(reference, rewards)

    def loss(logits):
        policy = softmax(logits)
        duel = (rewards[:, None] > rewards) + 0.5 * (rewards[:, None] == rewards)
        return -(policy @ duel @ reference - beta * divergence(policy, reference))

    tilted = np.log(reference) + calibrated / beta
    found = optimize.minimize(loss, np.zeros_like(reference), method="BFGS", options={"gtol": 1e-9})

    assert loss(tilted) <= found.fun + 1e-9


MODELS = {
    "normal rewards": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(2, size=n),
    "two clusters": lambda rng, n: np.where(rng.random(n) < 0.7, -5, 5) + rng.normal(size=n),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("procedure", [Standard(), BestOf(4), WorstOf(4)], ids=repr)
@pytest.mark.parametrize(("transform", "beta"), [(Identity(), 0.3), (Exponential(4.0), 15.0), (Log(), 0.7)], ids=repr)
def test_theorem_2_win_rate_and_kl_do_not_depend_on_the_model(name, procedure, transform, beta):
    """Three very different (r, pi_ref) give one win rate and one KL: those that theory states."""
    rng, n = np.random.default_rng(11), 40_000
    rewards = MODELS[name](rng, n)
    # A model of 40,000 responses, each equally likely: continuous for all that 4 draws can tell.
    quantile = (stats.rankdata(rewards) - 0.5) / n
    policy = softmax(np.asarray(transform(quantile)) / beta)
    duels = 40_000
    ours = rng.choice(rewards, p=policy, size=(duels, procedure.draws))
    theirs = rng.choice(rewards, size=(duels, procedure.draws))
    ours, theirs = (np.take_along_axis(x, procedure.choose(x, rng)[:, None], 1)[:, 0] for x in (ours, theirs))
    wins = (ours > theirs) + 0.5 * (ours == theirs)

    assert wins.mean() == pytest.approx(win_rate(transform, beta, procedure), abs=5 * 0.5 / duels**0.5)
    assert divergence(policy, np.full(n, 1 / n)) == pytest.approx(kl(transform, beta), abs=2e-4)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.2, 5.0))
def test_theorem_5_kl_regularised_rl_is_multitask_learning_for_log_linear_models(seed, beta):
    """argmin KL(pi_theta || p) + L_ro / beta = argmin L_sft + L_ro / beta when p is the SFT solution.

    The two objectives differ by a constant: checked at random parameters, not only at a minimum.
    """
    rng = np.random.default_rng(seed)
    features, rewards = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 6))
    data = rng.dirichlet(np.ones(6), size=3)

    def partition(theta):
        return logsumexp(features @ theta, axis=1)

    def sft(theta):
        return np.mean(partition(theta) - np.einsum("xy,xyd,d->x", data, features, theta))

    anchor = optimize.minimize(sft, np.zeros(4), method="BFGS", options={"gtol": 1e-10}).x
    reference = softmax(features @ anchor, axis=1)

    def rl_term(theta):
        return -np.mean(np.sum(softmax(features @ theta, axis=1) * rewards, axis=1)) / beta

    def bilevel(theta):
        # Bregman form of the paper: KL(p || pi_theta), the direction in which its proof (Eq. 23) holds.
        return np.mean(np.sum(reference * np.log(reference / softmax(features @ theta, axis=1)), axis=1)) + rl_term(
            theta
        )

    gaps = [bilevel(theta) - (sft(theta) + rl_term(theta)) for theta in rng.normal(size=(6, 4))]

    assert gaps == pytest.approx([gaps[0]] * 6, abs=1e-5)


def test_theorem_5_fails_for_the_other_direction_of_kl():
    """With KL(pi_theta || p), which Eq. 20 prints, the two objectives do not differ by a constant."""
    rng = np.random.default_rng(0)
    features, data = rng.normal(size=(6, 4)), rng.dirichlet(np.ones(6))

    def sft(theta):
        return logsumexp(features @ theta) - data @ features @ theta

    reference = softmax(features @ optimize.minimize(sft, np.zeros(4), method="BFGS", options={"gtol": 1e-10}).x)
    gaps = [divergence(softmax(features @ theta), reference) - sft(theta) for theta in rng.normal(size=(6, 4))]

    assert np.ptp(gaps) > 0.1
