"""Losses of a head: values and derivatives by other routes, their optima, and decay towards the start."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from calibrated_rewards.heads import ConservativeDPO, HeadLoss, JointLoss, PriorDecay
from calibrated_rewards.heads.losses import sft_loss, smoothed

SMOOTHING = st.floats(0.001, 0.499)
SCORE = st.floats(-20, 20)
LOSSES = [
    {"kind": kind, "smoothing": eps, "penalty": penalty, "centring": centring}
    for kind in ("separable", "contrastive")
    for eps in (0.02, 0.1, 0.4)
    for penalty, centring in ((0.0, 0.0), (0.1, 0.0), (0.3, 0.2))
]


def scores(seed: int = 0, n: int = 50) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected completions in float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))


def by_hand(chosen: float, rejected: float, kind: str, eps: float, penalty: float, centring: float) -> float:
    """The formula with math.log, in Python."""
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    if kind == "separable":
        value = -(1 - eps) * math.log(s(chosen)) - eps * math.log(s(-chosen))
        value += -(1 - eps) * math.log(s(-rejected)) - eps * math.log(s(rejected))
    else:
        value = -(1 - eps) * math.log(s(chosen - rejected)) - eps * math.log(s(rejected - chosen))
    return value + penalty * (chosen**2 + rejected**2) + centring * (chosen + rejected) ** 2


@pytest.mark.parametrize("settings", LOSSES)
def test_values_and_derivatives(settings: dict[str, Any]) -> None:
    """Values are the formula's; autograd's derivatives are those of finite differences of the formula."""
    loss, (chosen, rejected) = HeadLoss(**settings), scores()
    chosen.requires_grad_()
    rejected.requires_grad_()
    values = loss(chosen, rejected)
    values.sum().backward()
    formula = [by_hand(*pair, *settings.values()) for pair in zip(*scores(), strict=True)]
    np.testing.assert_allclose(values.detach(), formula, rtol=1e-10)
    step = 1e-6
    for i in range(5):
        w, r = float(chosen.detach()[i]), float(rejected.detach()[i])
        slope = by_hand(w + step, r, *settings.values()) - by_hand(w - step, r, *settings.values())
        assert float(chosen.grad[i]) == pytest.approx(slope / (2 * step), abs=1e-7)
        slope = by_hand(w, r + step, *settings.values()) - by_hand(w, r - step, *settings.values())
        assert float(rejected.grad[i]) == pytest.approx(slope / (2 * step), abs=1e-7)


def test_separable_is_two_cross_entropies() -> None:
    """Torch's own binary cross-entropy with targets 1 - eps and eps is the separable loss."""
    chosen, rejected = scores()
    targets = torch.full_like(chosen, 0.9)
    expected = sum(
        binary_cross_entropy_with_logits(*pair, reduction="none")
        for pair in ((chosen, targets), (rejected, 1 - targets))
    )
    torch.testing.assert_close(HeadLoss("separable", 0.1)(chosen, rejected), expected)


@pytest.mark.parametrize("settings", LOSSES)
def test_the_optimum_is_where_a_minimiser_ends(settings: dict[str, Any]) -> None:
    """The closed form, or the root with a penalty, is where scipy's BFGS ends."""
    loss = HeadLoss(**settings)
    end = minimize(lambda pair: by_hand(*pair, *settings.values()), [0.5, 0.2], tol=1e-10).x
    optimum = loss.optimum()
    assert optimum[0] == -optimum[1]
    assert optimum[0] - optimum[1] == pytest.approx(end[0] - end[1], abs=1e-5)
    if settings["kind"] == "separable" or settings["penalty"]:
        np.testing.assert_allclose(optimum, end, atol=1e-5)


@given(eps=SMOOTHING)
def test_closed_forms(eps: float) -> None:
    """r = +-ln((1-eps)/eps) for the separable loss, that margin for the contrastive one and for cDPO."""
    goal = math.log((1 - eps) / eps)
    assert HeadLoss("separable", eps).optimum() == (pytest.approx(goal), pytest.approx(-goal))
    chosen, rejected = HeadLoss("contrastive", eps).optimum()
    assert chosen - rejected == pytest.approx(goal)
    assert 0.3 * ConservativeDPO(0.3, eps).optimum() == pytest.approx(goal)
    margin = torch.tensor(goal, dtype=torch.float64, requires_grad=True)
    smoothed(margin, eps).backward()
    assert abs(float(margin.grad)) < 1e-9


@given(eps=SMOOTHING, chosen=SCORE, rejected=SCORE, other=st.tuples(SCORE, SCORE), share=st.floats(0, 1))
def test_losses_are_convex_and_symmetric(
    eps: float, chosen: float, rejected: float, other: tuple[float, float], share: float
) -> None:
    """Between two points no loss is above its chord; exchanging the pair and all signs changes nothing."""
    one, two = torch.tensor([chosen, rejected]).double(), torch.tensor(other).double()
    for kind in ("separable", "contrastive"):
        loss = HeadLoss(kind, eps, penalty=0.05, centring=0.1)
        between = loss(*(share * one + (1 - share) * two))
        assert between <= share * loss(*one) + (1 - share) * loss(*two) + 1e-9
        torch.testing.assert_close(loss(*one), loss(-one[1], -one[0]))


@pytest.mark.parametrize("kind", ["separable", "contrastive"])
def test_large_scores_stay_finite(kind: str) -> None:
    """Scores of any size have a finite loss and derivative in float32."""
    pair = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = HeadLoss(kind, 0.1)(pair[:, 0], pair[:, 1])
    loss.sum().backward()
    assert loss.isfinite().all()
    assert pair.grad.isfinite().all()


def test_descent_reaches_the_optimum() -> None:
    """A head that can give every completion its own score ends at +-ln(9), with eps = 0.1."""
    free = torch.zeros(6, 2, requires_grad=True)
    optimizer = torch.optim.SGD([free], lr=0.5)
    for _ in range(500):
        optimizer.zero_grad()
        HeadLoss("separable", 0.1)(free[:, 0], free[:, 1]).sum().backward()
        optimizer.step()
    torch.testing.assert_close(free.detach(), torch.tensor([math.log(9), -math.log(9)]).expand(6, 2), atol=1e-4, rtol=0)


def test_cdpo_is_trls() -> None:
    """DPO with label smoothing, as TRL writes its sigmoid loss: the same numbers from the four log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = (torch.randn(2, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    ratios = policy - reference
    logits = 0.2 * ((policy[0] - policy[1]) - (reference[0] - reference[1]))
    expected = -torch.log(torch.sigmoid(logits)) * 0.85 - torch.log(torch.sigmoid(-logits)) * 0.15
    torch.testing.assert_close(ConservativeDPO(0.2, 0.15)(*ratios), expected)


def test_the_joint_loss_is_a_weighted_sum() -> None:
    """Each part by itself, with its weight; parts without a weight are left out."""
    pair, ratios = scores(0), scores(1)
    logprobs = -torch.rand(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.5
    nll = sft_loss(logprobs, mask)
    assert float(nll) == pytest.approx(-float(np.mean(logprobs.numpy()[mask.numpy()])))

    total, parts = JointLoss(dpo_weight=0.5, sft_weight=2.0)(pair, ratios, nll)
    head, dpo = HeadLoss()(*pair).mean(), ConservativeDPO()(*ratios).mean()
    torch.testing.assert_close(total, head + 0.5 * dpo + 2 * nll)
    assert parts.keys() == {"loss/head", "loss/dpo", "loss/sft"}
    alone, parts = JointLoss()(pair)
    torch.testing.assert_close(alone, head)
    assert parts.keys() == {"loss/head"}
    with pytest.raises(ValueError, match="needs the log-ratios"):
        JointLoss(dpo_weight=1.0)(pair)
    with pytest.raises(ValueError, match="log-likelihood of the chosen"):
        JointLoss(sft_weight=1.0)(pair)


def weights_of(seed: int, n: int = 3) -> list[Tensor]:
    """Some weights."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2, generator=generator).requires_grad_() for _ in range(n)]


def step(optimizer: torch.optim.Optimizer, weights: list[Tensor], goal: float = 1.0) -> None:
    """One step towards a goal."""
    optimizer.zero_grad()
    sum((weight - goal).square().sum() for weight in weights).backward()
    optimizer.step()


def test_prior_decay_is_adamws_in_other_coordinates() -> None:
    """Measured from its start, a weight moves as AdamW with weight decay moves it: with start 0, exactly so."""
    moved, plain = weights_of(0), [torch.zeros(4, 2, requires_grad=True) for _ in range(3)]
    starts = [weight.detach().clone() for weight in moved]
    prior = torch.optim.AdamW([{"params": moved, "prior_decay": 0.3}], lr=0.05, weight_decay=0.0)
    decay = torch.optim.AdamW(plain, lr=0.05, weight_decay=0.3)
    PriorDecay(moved).register(prior)
    for _ in range(20):
        prior.zero_grad()
        sum((w - s - 1).square().sum() for w, s in zip(moved, starts, strict=True)).backward()
        prior.step()
        step(decay, plain)
    for weight, start, other in zip(moved, starts, plain, strict=True):
        torch.testing.assert_close(weight - start, other, atol=1e-5, rtol=1e-5)
        assert other.abs().min() > 0.3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_prior_decay_is_the_rule(kind: Any) -> None:
    """Before the optimiser's own step, theta - lr lambda (theta - theta_0); other groups and idle weights stay."""
    weights, twins = weights_of(1), weights_of(1)
    groups = [{"params": weights[:1], "prior_decay": 0.4}, {"params": weights[1:]}]
    optimizer = kind(groups, lr=0.1, weight_decay=0.0)
    twin = kind(twins, lr=0.1, weight_decay=0.0)
    PriorDecay(weights[:1]).register(optimizer)
    start = weights[0].detach().clone()
    for rate in (0.1, 0.02, 0.2):
        for group in (*optimizer.param_groups, *twin.param_groups):
            group["lr"] = rate
        optimizer.zero_grad()
        twin.zero_grad()
        for weight, other in zip(weights[:2], twins[:2], strict=True):
            weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
        optimizer.step()
        with torch.no_grad():
            twins[0] -= rate * 0.4 * (twins[0] - start)
        twin.step()
    for weight, other in zip(weights, twins, strict=True):
        torch.testing.assert_close(weight, other)
    torch.testing.assert_close(weights[2], weights_of(1)[2])


def test_prior_decay_holds_weights_back() -> None:
    """Between data and prior: with SGD on (theta - 1)^2 / 2 the fixed point is (1 + lambda theta_0) / (1 + lambda)."""
    weight = torch.full((1,), -2.0, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "prior_decay": 0.5}], lr=0.01)
    PriorDecay([weight]).register(optimizer)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (weight - 1).square()).sum().backward()
        optimizer.step()
    assert float(weight.detach()) == pytest.approx((1 + 0.5 * -2) / 1.5, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadLoss("sum"), "separable or contrastive, got kind=sum"),
        (lambda: HeadLoss(smoothing=0.5), "0 <= eps < 0.5, got smoothing=0.5"),
        (lambda: HeadLoss(penalty=-1.0), "penalty >= 0, got penalty=-1.0"),
        (lambda: ConservativeDPO(beta=0.0), "beta > 0, got beta=0.0"),
        (lambda: JointLoss(dpo_weight=-1.0), "dpo_weight >= 0, got dpo_weight=-1.0"),
    ],
)
def test_settings_that_no_loss_has(make: Any, message: str) -> None:
    """Settings are checked where they are made."""
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_without_a_start_do_not_decay() -> None:
    """A group that decays to a start nobody noted is refused."""
    optimizer = torch.optim.SGD([{"params": weights_of(0), "prior_decay": 0.5}], lr=0.01)
    with pytest.raises(ValueError, match="are noted first"):
        PriorDecay([]).register(optimizer)
