"""Losses of offline training: each against its paper's formula in plain numpy, each minimiser against enumeration."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from math import inf, log
from typing import Any

import numpy as np
import pytest
import torch
from exact import Exact, best_of
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform
from calibrated_rewards.training import offline
from calibrated_rewards.training.offline.losses import (
    IPO,
    LOSS_NAMES,
    NAMED,
    BoNBoN,
    Centred,
    ControlVariate,
    Loss,
    LossInputs,
    Pairs,
    Regression,
    Top1,
    WeightedLikelihood,
    choose_pairs,
    parse_loss,
    regress_gaps,
)

Array = np.ndarray[Any, np.dtype[np.float64]]
EXACT_LOG_Z = 0.3
# The losses whose optimum is pi*, of which none is clamped.
TILTED: dict[str, Loss] = {**NAMED, "control-variate": ControlVariate(inf, inf)}
del TILTED["regression:exact"]  # whose partition is that of another law here
NAMES = (*TILTED, "control-variate, clamped", "regression:exact", "ipo", "ipo:3", "bonbon:2", "top-1", "top-1:3")
LOSSES: dict[str, Loss] = {"control-variate, clamped": ControlVariate(3.0, 2.0)}
LOSSES |= {name: TILTED[name] if name in TILTED else parse_loss(name) for name in NAMES if name not in LOSSES}


def blocks(d: Array, r: Array, n: int) -> Iterator[tuple[Array, float, float, bool]]:
    """The d of the best of each block, that of the first best and of the last worst, and whether they differ."""
    for at in range(0, len(d) // n * n, n):
        own, rewards = d[at : at + n], list(r[at : at + n])
        last_worst = n - 1 - rewards[::-1].index(min(rewards))
        best = own[[reward == max(rewards) for reward in rewards]]
        yield best, best[0], own[last_worst], max(rewards) > min(rewards)


def write(name: str, d: Array, r: Array, beta: float) -> float:
    """The loss as its paper has it, with what the docstring says that it is multiplied by; one rollout at a time."""
    k, omega = len(d), len(d) * softmax(r / beta)
    log_z = logsumexp(r / beta) - np.log(k)
    kind, _, n = name.partition(":")
    match kind:
        case "weighted":
            return float(-softmax(r / beta) @ (d - np.log(omega)))
        case "control-variate":
            return float(np.mean([w * np.log(w) - w * x - w + np.exp(x) for w, x in zip(omega, d, strict=True)]))
        case "control-variate, clamped":
            omega = np.minimum(omega, 2.0)
            slope = [np.exp(x) if x < np.log(3) else 3 + 3 * (x - np.log(3)) for x in d]
            return float(np.mean([w * np.log(w) - w * x - w + e for w, x, e in zip(omega, d, slope, strict=True)]))
        case "regression":
            chosen = EXACT_LOG_Z if n else log_z
            return float(np.mean([(a - beta * chosen - beta * x) ** 2 for a, x in zip(r, d, strict=True)])) / (
                2 * beta**2
            )
        case "centred":
            return float(sum((beta * (d - d.mean()) - (r - r.mean())) ** 2)) / (2 * k * beta**2)
        case "pairs":
            pairs = list(itertools.combinations(range(k), 2))
            gaps = [(beta * (d[a] - d[b]) - (r[a] - r[b])) ** 2 for a, b in pairs]
            return float(sum(gaps)) / (2 * beta**2 * max(1, len(pairs)))
        case "ipo":
            rows = list(blocks(d, r, int(n or k)))
            return float(np.mean([(best - worst - ok / (2 * beta)) ** 2 for _, best, worst, ok in rows])) / 2
        case "top-1":
            return float(np.mean([-best.mean() for best, *_ in blocks(d, r, int(n or k))]))
        case "bonbon":
            assert int(n) == 2  # (n - 1) H_{n-1} is 1 then
            rows = list(blocks(d, r, 2))
            squares = np.mean([(best - worst - ok) ** 2 for _, best, worst, ok in rows])
            return float(0.995 * squares - 0.005 * np.mean([best.mean() for best, *_ in rows]))
    raise AssertionError(name)


def tensor(values: Any) -> torch.Tensor:
    """In double precision."""
    return torch.tensor(np.asarray(values, np.float64))


def inputs(r: Any, beta: float) -> LossInputs:
    """What a loss has to know, with an exact partition that is another one."""
    return LossInputs.from_rewards(tensor(r), beta, exact_log_z=EXACT_LOG_Z)


def evaluate(loss: Loss, d: Any, given: LossInputs) -> tuple[float, Array]:
    """The loss, and its gradient for the log-ratios."""
    log_ratios = tensor(d).requires_grad_()
    value = loss(log_ratios, given).sum()
    value.backward()
    assert log_ratios.grad is not None
    return float(value.detach()), log_ratios.grad.numpy()


# Rewards in steps, so that many tie.
groups = st.integers(3, 9).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-3, 3), min_size=k, max_size=k).map(np.array),
        st.lists(st.integers(0, 4).map(lambda x: x / 4), min_size=k, max_size=k).map(np.array),
        st.sampled_from([0.2, 0.5, 1.0, 4.0]),
    )
)
each_loss = pytest.mark.parametrize("name", NAMES)


@each_loss
@given(group=groups)
@settings(max_examples=40, deadline=None)
def test_a_loss_is_the_formula_of_its_paper(name: str, group: tuple[Array, Array, float]) -> None:
    """Value against plain numpy, and the gradient against differences of that, with ties."""
    d, r, beta = group
    value, gradient = evaluate(LOSSES[name], d, inputs(r, beta))
    assert value == pytest.approx(write(name, d, r, beta), rel=1e-9, abs=1e-9)
    step = 1e-5 * np.eye(len(d))
    differences = [(write(name, d + own, r, beta) - write(name, d - own, r, beta)) / 2e-5 for own in step]
    # Between both sides of a clamp's corner the slope may change by as much as the step.
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=2e-4)


@given(group=groups)
@settings(deadline=None)
def test_the_control_variate_weighs_the_slope_by_what_is_missing(group: tuple[Array, Array, float]) -> None:
    """The gradient is (min(e^d, 10) - min(omega, 8)) / K, with e^d a constant."""
    d, r, beta = group
    omega = len(d) * softmax(r / beta)
    _, gradient = evaluate(ControlVariate(), 4 * d, inputs(r, beta))
    expected = (np.minimum(np.exp(4 * d), 10) - np.minimum(omega, 8)) / len(d)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@given(group=groups)
@settings(deadline=None)
def test_weights_and_targets_are_those_of_the_softmax(group: tuple[Array, Array, float]) -> None:
    """Shares that add up to 1, log K times them, and no loss below what it has there."""
    d, r, beta = group
    own = inputs(r, beta)
    np.testing.assert_allclose(own.weights, softmax(r / beta), rtol=1e-12)
    np.testing.assert_allclose(own.targets, log_softmax(r / beta) + np.log(len(r)), atol=1e-12)
    for name in ("control-variate", "regression", "centred", "pairs"):
        assert float(LOSSES[name](own.targets, own)) == pytest.approx(0, abs=1e-12)
        assert float(LOSSES[name](tensor(d), own)) >= 0


# A world in exact proportions.

PHIS: dict[str, Transform] = {"identity": Identity(), "log": Log(), "exp:10": scaled(Exponential(10.0), "unit")}
COUNTS = np.array([[1, 2, 4, 1, 3, 5], [6, 1, 2, 2, 4, 1]])
HERE = Exact(COUNTS / 16, np.array([[3.0, 1.0, 2.0, 2.0, 0.0, 5.0], [1.0, 1.0, 2.0, 0.0, 3.0, 4.0]]))
DRAWN = np.array([np.repeat(np.arange(6), counts) for counts in COUNTS])


def phi_of(transform: Transform, drawn: Array | np.ndarray[Any, np.dtype[np.int64]]) -> Array:
    """The rewards of drawn completions by their ranks among each other: (below + equal / 2) / K."""
    scores = np.take_along_axis(HERE.scores, drawn, 1)
    below = (scores[:, :, None] > scores[:, None, :]).sum(2)
    equal = (scores[:, :, None] == scores[:, None, :]).sum(2)
    return np.asarray(values(transform, drawn.shape[1])[2 * below + equal])


def learn(loss: Loss, drawn: np.ndarray[Any, Any], given: LossInputs, law: Array = HERE.laws) -> Array:
    """The policy at which a loss is least, over the logits of all completions of both prompts."""

    def slope(flat: Array) -> tuple[float, Array]:
        logits = tensor(flat).reshape(law.shape).requires_grad_()
        log_ratios = (logits.log_softmax(-1) - tensor(np.log(law))).gather(-1, torch.tensor(drawn))
        value = loss(log_ratios, given).sum()
        value.backward()
        assert logits.grad is not None
        return float(value.detach()), logits.grad.numpy().ravel()

    start = np.random.default_rng(0).normal(size=law.size)
    found = minimize(slope, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    return np.asarray(softmax(found.x.reshape(law.shape), axis=1))


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("name", TILTED)
def test_the_optimum_is_the_enumerated_one(name: str, phi: str) -> None:
    """On rollouts in the proportions of the law, with ties: pi_ref e^{Phi(C) / beta} / Z, by tests/exact.py."""
    with np.errstate(divide="ignore"):
        exact_values = np.asarray(PHIS[phi](HERE.quantiles))
    beta = HERE.beta(exact_values, 0.4)
    found = learn(TILTED[name], DRAWN, inputs(phi_of(PHIS[phi], DRAWN), beta))
    np.testing.assert_allclose(found, HERE.optimum(exact_values, beta), atol=2e-6)


@pytest.mark.parametrize("name", ["regression", "centred", "pairs"])
def test_regressions_have_their_optimum_on_rollouts_of_any_law(name: str) -> None:
    """Rollouts of another policy than the reference, with the rewards and the partition of the reference."""
    drawn = np.array([[0, 1, 2, 3, 4, 4, 5, 5, 0], [5, 4, 3, 2, 2, 2, 1, 0, 0]])
    beta, exact_values = 0.3, HERE.quantiles
    log_z = tensor(np.log((HERE.laws * np.exp(exact_values / beta)).sum(1)))
    given = LossInputs(tensor(np.take_along_axis(exact_values, drawn, 1)), beta, log_z)
    np.testing.assert_allclose(learn(TILTED[name], drawn, given), HERE.optimum(exact_values, beta), atol=2e-6)


def test_weighted_likelihood_ends_at_the_weighted_sample() -> None:
    """On 7 rollouts: each completion has the weights of its rollouts, and what was not drawn has nothing."""
    drawn = np.array([[0, 0, 2, 2, 4, 5, 5], [1, 2, 2, 3, 4, 4, 5]])
    given = inputs(phi_of(Identity(), drawn), 0.2)
    found = learn(WeightedLikelihood(), drawn, given)
    weights = softmax(phi_of(Identity(), drawn) / 0.2, axis=1)
    expected = [np.bincount(row, own, 6) for row, own in zip(drawn, weights, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_is_clamped_moves_the_optimum() -> None:
    """To pi_ref min(omega, most_omega), normalised, while e^d stays below its own clamp."""
    exact_values = HERE.quantiles
    beta = HERE.beta(exact_values, 0.4)
    given = inputs(phi_of(Identity(), DRAWN), beta)
    best = HERE.optimum(exact_values, beta)
    clamped = HERE.laws * np.minimum(best / HERE.laws, 1.8)
    assert (best / HERE.laws).max(1).min() > 1.8
    found = learn(ControlVariate(8.0, 1.8), DRAWN, given)
    np.testing.assert_allclose(found, clamped / clamped.sum(1, keepdims=True), atol=2e-6)


def all_blocks(n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All ordered draws of n rollouts from 5 of each prompt, one after the other: blocks in exact proportions."""
    pools = np.array([[0, 1, 1, 2, 3], [0, 0, 1, 2, 3]])
    return np.array([list(itertools.chain(*itertools.product(pool, repeat=n))) for pool in pools])


SMALL = Exact(
    np.array([[0.2, 0.4, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2]]), np.array([[1.0, 0.0, 2.0, 1.0], [0.0, 3.0, 1.0, 2.0]])
)


def small_rewards(drawn: np.ndarray[Any, np.dtype[np.int64]]) -> Array:
    """Only their order counts."""
    return np.take_along_axis(SMALL.scores, drawn, 1)


def test_ipo_with_two_rollouts_has_the_optimum_of_the_identity() -> None:
    """pi_ref e^{C / beta} / Z with ties, from all pairs of rollouts; only the order of the rewards counts."""
    drawn, beta = all_blocks(2), 0.4
    found = learn(IPO(2), drawn, inputs(np.exp(3 * small_rewards(drawn)), beta), SMALL.laws)
    np.testing.assert_allclose(found, SMALL.optimum(SMALL.quantiles, beta), atol=2e-6)


def test_the_best_of_n_is_what_top_1_learns() -> None:
    """F^n - F-^n of each level, shared by completions that tie."""
    drawn = all_blocks(3)
    found = learn(Top1(3), drawn, inputs(small_rewards(drawn), 1.0), SMALL.laws)
    mass = SMALL.by_level(SMALL.laws)
    law = np.take_along_axis(best_of(3, mass, mass) / np.where(mass > 0, mass, 1), SMALL.levels, 1) * SMALL.laws
    np.testing.assert_allclose(found, law, atol=2e-6)


@pytest.mark.parametrize("loss", [IPO(3), BoNBoN(0.3, 3)])
def test_losses_with_another_optimum_have_that_of_their_expectation(loss: IPO | BoNBoN) -> None:
    """Over all draws of 3, each with its probability: minimised by scipy without derivatives of torch."""
    drawn, beta, alpha = all_blocks(3), 0.5, getattr(loss, "alpha", 0.0)
    gap = 1 / (2 * beta) if isinstance(loss, IPO) else 2 * (1 + 1 / 2)
    found = learn(loss, drawn, inputs(small_rewards(drawn), beta), SMALL.laws)
    for law, scores, policy in zip(SMALL.laws, SMALL.scores, found, strict=True):
        draws = [(own, float(np.prod(law[list(own)]))) for own in itertools.product(range(4), repeat=3)]

        def expect(logits: Array, law: Array = law, scores: Array = scores, draws: Any = draws) -> float:
            d, total = log_softmax(logits) - np.log(law), 0.0
            for own, chance in draws:
                best, *_, worst = sorted(own, key=lambda i: -scores[i])
                square = (d[best] - d[worst] - gap * (scores[best] > scores[worst])) ** 2
                total += chance * ((1 - alpha) * square - alpha * d[best])
            return total

        best = minimize(expect, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
        np.testing.assert_allclose(policy, softmax(best.x), atol=1e-4)


# Invariances.


@pytest.mark.parametrize("name", TILTED)
@given(group=groups, shift=st.floats(-5, 5), factor=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_a_shift_and_a_scale_of_rewards_change_nothing(
    name: str, group: tuple[Array, Array, float], shift: float, factor: float
) -> None:
    """With the prompt's own partition; the scale is beta's too."""
    d, r, beta = group
    value, gradient = evaluate(TILTED[name], d, inputs(r, beta))
    moved, moved_gradient = evaluate(TILTED[name], d, inputs(factor * (r + shift), factor * beta))
    assert moved == pytest.approx(value, rel=1e-7, abs=1e-9)
    np.testing.assert_allclose(moved_gradient, gradient, rtol=1e-7, atol=1e-9)


@given(group=groups, shift=st.floats(-5, 5))
@settings(deadline=None)
def test_a_constant_in_log_ratios_is_nothing_to_gaps(group: tuple[Array, Array, float], shift: float) -> None:
    """To Centred, Pairs and IPO, whose gradients add up to 0; Regression sees it."""
    d, r, beta = group
    for loss in (Centred(), Pairs(), IPO(), IPO(2)):
        value, gradient = evaluate(loss, d, inputs(r, beta))
        assert evaluate(loss, d + shift, inputs(r, beta))[0] == pytest.approx(value, rel=1e-7, abs=1e-9)
        assert gradient.sum() == pytest.approx(0, abs=1e-9)
    shifted = evaluate(Regression(), inputs(r, beta).targets + shift, inputs(r, beta))[0]
    assert shifted == pytest.approx(shift**2 / 2, abs=1e-9)


@given(group=groups)
@settings(deadline=None)
def test_all_pairs_of_a_group_are_the_centred_group(group: tuple[Array, Array, float]) -> None:
    """REBEL over all pairs is 2 K / (K - 1) times GVPO, in value and gradient."""
    d, r, beta = group
    pairs, centred = (evaluate(loss, d, inputs(r, beta)) for loss in (Pairs(), Centred()))
    factor = 2 * len(d) / (len(d) - 1)
    assert pairs[0] == pytest.approx(factor * centred[0], rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(pairs[1], factor * centred[1], rtol=1e-9, atol=1e-12)


@each_loss
@given(group=groups, rng=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_several_prompts_are_each_on_its_own(name: str, group: tuple[Array, Array, float], rng: Any) -> None:
    """A batch gives the loss of each prompt, and of prompts in two axes."""
    d, r, beta = group
    order = rng.sample(range(len(d)), len(d))
    rows = [(d, r), (-d, r[order]), (d / 2, r), (d, 0 * r)]
    together = inputs([row[1] for row in rows], beta)
    found = LOSSES[name](tensor([row[0] for row in rows]), together)
    alone = [evaluate(LOSSES[name], own, inputs(rewards, beta))[0] for own, rewards in rows]
    np.testing.assert_allclose(found, alone, rtol=1e-9, atol=1e-12)
    square = LossInputs.from_rewards(together.rewards.reshape(2, 2, -1), beta, exact_log_z=EXACT_LOG_Z)
    again = LOSSES[name](tensor([row[0] for row in rows]).reshape(2, 2, -1), square)
    np.testing.assert_allclose(again.ravel(), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ipo", "ipo:3", "bonbon:2", "top-1", "top-1:3"])
@given(group=groups)
@settings(max_examples=30, deadline=None)
def test_only_the_order_counts_to_losses_of_the_best(name: str, group: tuple[Array, Array, float]) -> None:
    """Any increasing function of the rewards has the same loss: no transform changes them."""
    d, r, beta = group
    assert evaluate(LOSSES[name], d, inputs(np.exp(3 * r), beta))[0] == evaluate(LOSSES[name], d, inputs(r, beta))[0]


@pytest.mark.parametrize(
    "name", ["weighted", "control-variate", "control-variate, clamped", "regression", "regression:exact"]
)
@given(group=groups)
@settings(max_examples=20, deadline=None)
def test_parts_of_a_group_add_up(name: str, group: tuple[Array, Array, float]) -> None:
    """With the partition of all rollouts, the loss of two halves is that of the whole: a group may be cut."""
    d, r, beta = (np.tile(group[0], 2), np.tile(group[1], 2)[::-1].copy(), group[2])
    whole, half = inputs(r, beta), len(group[0])
    parts = [
        LossInputs(whole.rewards[own], beta, whole.log_z, exact_log_z=EXACT_LOG_Z)
        for own in (slice(half), slice(half, None))
    ]
    found = [float(LOSSES[name](tensor(own), part)) for own, part in zip(np.split(d, 2), parts, strict=True)]
    assert np.mean(found) == pytest.approx(float(LOSSES[name](tensor(d), whole)), rel=1e-9, abs=1e-12)


def test_near_the_reference_one_rate_fits() -> None:
    """At d = 0 and for a large beta, the gradients of three losses are -log omega / K up to the second order."""
    given = inputs([0.1, 0.4, 0.9], 100.0)
    expected = -given.targets.numpy() / 3
    for loss in (ControlVariate(), Regression(), Centred()):
        np.testing.assert_allclose(evaluate(loss, np.zeros(3), given)[1], expected, atol=2e-5)


# Few rollouts, and what is refused.


def test_one_rollout_has_nothing_to_be_compared_with() -> None:
    """Its own optimum is the reference, and gaps have no gradient; likelihoods still raise it."""
    given = inputs([0.7], 0.5)
    for loss in (Centred(), Pairs(), IPO()):
        value, gradient = evaluate(loss, [1.3], given)
        assert (value, *gradient) == (0, 0)
    for loss, slope in ((ControlVariate(), np.exp(1.3) - 1), (Regression(), 1.3), (WeightedLikelihood(), -1)):
        assert evaluate(loss, [1.3], given)[1] == pytest.approx([slope])
    assert evaluate(Top1(), [1.3], given)[1] == pytest.approx([-1])
    assert evaluate(BoNBoN(), [1.3], given)[1] == pytest.approx([-0.005])


def test_two_rollouts_by_hand() -> None:
    """One pair with Phi 0 and 1 and beta 1/2: a gap of 2 is asked for by Pairs, and of 1 by IPO."""
    given, d = inputs([0.0, 1.0], 0.5), [0.1, 0.4]
    assert evaluate(Pairs(), d, given)[0] == pytest.approx((0.3 - 2) ** 2 / 2)
    assert evaluate(Centred(), d, given)[0] == pytest.approx((0.3 - 2) ** 2 / 8)
    assert evaluate(IPO(), d, given)[0] == pytest.approx((0.3 - 1) ** 2 / 2)
    assert evaluate(Top1(), d, given)[0] == pytest.approx(-0.4)


def test_ties_share_the_best_and_have_no_gap() -> None:
    """Two of three are best: each has half of top-1; where all tie, the gap that is asked for is 0."""
    assert evaluate(Top1(), [1.0, 2.0, 5.0], inputs([1.0, 1.0, 0.0], 1.0))[0] == pytest.approx(-1.5)
    gaps, differ = choose_pairs(tensor([1.0, 2.0, 5.0]), tensor([1.0, 1.0, 1.0]), None)
    assert (float(gaps), float(differ)) == (-4, 0)  # the first and the last
    assert evaluate(IPO(), [1.0, 2.0, 5.0], inputs([1.0, 1.0, 1.0], 1.0))[0] == pytest.approx(8)


def test_what_is_left_over_of_blocks_is_not_read() -> None:
    """Two blocks of 3 of 8 rollouts: the last two have no gradient."""
    _, gradient = evaluate(IPO(3), np.arange(8.0), inputs(np.arange(8.0), 1.0))
    assert np.count_nonzero(gradient) == 4
    assert not gradient[6:].any()


def test_the_beta_of_bonbon() -> None:
    """For n = 8 it is .02755, as the authors' code has it, so the gap of the pair is 1 / (2 * .02755) = 18.15."""
    d = np.zeros(8)
    value = evaluate(BoNBoN(alpha=0.0), d, inputs(np.arange(8.0), 1.0))[0]
    assert value**0.5 == pytest.approx(1 / (2 * 0.0275482), rel=1e-5)


def test_a_ratio_that_overflows_has_a_bounded_step() -> None:
    """A rollout 200 nats more likely than under the reference, in single precision: the gradient is at most 10 / K."""
    d = torch.tensor([200.0, 0.0], requires_grad=True)
    loss = ControlVariate()(d, LossInputs.from_rewards(torch.tensor([0.0, 0.0]), 1.0))
    loss.backward()
    assert torch.isfinite(loss.detach())
    assert d.grad is not None
    assert d.grad[0] == pytest.approx((10 - 1) / 2)


def test_pairs_of_a_data_set() -> None:
    """Gaps of any pairs: REBEL's, with the gap of the rewards over beta."""
    found = regress_gaps(tensor([0.5, -1.0]), tensor([2.0, 0.0]))
    np.testing.assert_allclose(found, [1.125, 0.5])


def test_names_of_the_command_line() -> None:
    """Each name that is listed makes the loss of that name; the package exports them lazily."""
    assert parse_loss("control-variate") == ControlVariate(10.0, 8.0)
    assert parse_loss("pairs") == Pairs()
    assert parse_loss("bonbon:8") == BoNBoN(0.005, 8)
    assert parse_loss("ipo") == IPO()
    for name in LOSS_NAMES.split("; ")[0].replace(" or ", ", ").split(", "):
        assert isinstance(parse_loss(name), Loss)
    assert offline.parse_loss is parse_loss
    assert offline.LossInputs is LossInputs


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: parse_loss("dpo"), argparse.ArgumentTypeError, "a loss is weighted, .*; got 'dpo'"),
    (lambda: parse_loss("ipo:1"), argparse.ArgumentTypeError, "got 'ipo:1'"),
    (lambda: parse_loss("centred:4"), argparse.ArgumentTypeError, "got 'centred:4'"),
    (lambda: inputs([1.0], 0.0), ValueError, r"finite beta > 0, got beta=0\.0"),
    (lambda: ControlVariate(5.0, 5.0), ValueError, "got most_omega=5.0 and most_ratio=5.0"),
    (lambda: ControlVariate(5.0, 0.0), ValueError, "needs 0 < most_omega"),
    (lambda: IPO(4)(tensor([0.0]), inputs([0.0], 1.0)), ValueError, "Blocks of n=4 .* got K=1"),
    (
        lambda: Regression("exact")(tensor([0.0]), LossInputs.from_rewards(tensor([0.0]), 1.0)),
        ValueError,
        "needs LossInputs with an exact_log_z, got None",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_what_is_refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    """Names, betas, clamps and groups that make no sense."""
    with pytest.raises(kind, match=message):
        call()


def test_a_partition_of_its_own_or_the_exact_one() -> None:
    """The exact partition moves the targets of Regression by the difference."""
    own = inputs([0.2, 0.8], 0.5)
    exact = LossInputs(own.rewards, 0.5, EXACT_LOG_Z)
    d = tensor([0.3, -0.2])
    assert float(Regression("exact")(d, own)) == pytest.approx(float(Regression()(d, exact)))
    assert float(Regression()(d, own)) != pytest.approx(float(Regression()(d, exact)))
    assert own.log_z == pytest.approx(log((np.exp(0.4) + np.exp(1.6)) / 2))
