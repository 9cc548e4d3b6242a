"""The plain loops of PPO and GRPO: each piece against another route, and both against an enumerable optimum."""

import math
from dataclasses import replace
from typing import Any

import enumerable
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.testing.suites import HashScorer, NumberScorer
from calibrated_rewards.theory.transforms import Log
from calibrated_rewards.training import loop
from calibrated_rewards.training.loop import build_reference, list_trainable, prepare_model
from calibrated_rewards.training.online import GRPOSettings, PPOSettings, TRLSettings, grpo, ppo

LOOPS: dict[str, tuple[Any, Any]] = {"ppo": (ppo, PPOSettings), "grpo": (grpo, GRPOSettings)}
CHAT = [{"role": "user", "content": "Hi"}]
PROMPTS = ["a", "how are you", CHAT]
numbers = st.floats(-3, 3, width=32)


def tiny_policy(tokens: int = 6, temperature: float = 1.0, **model: Any) -> Policy:
    """A Llama that ends completions early now and then: the end token is as likely as a hundred others."""
    made = tiny.causal(**model)
    with torch.no_grad():
        made.lm_head.weight[tiny.EOS] = made.lm_head.weight.mean(0) + 0.1
        made.lm_head.weight.mul_(10)
    return Policy(made, tiny.tokenizer(), Decoding(tokens, temperature), Text())


def gpt2() -> Any:
    """A GPT-2 of one layer whose positions matter."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": tiny.VOCABULARY}
    made = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=tiny.EOS, bos_token_id=tiny.BOS)).eval()
    with torch.no_grad():
        made.transformer.wpe.weight.normal_()
        made.transformer.wte.weight[tiny.EOS] = made.transformer.wte.weight.mean(0)
    return made


def exact_policy(length: int) -> Policy:
    """The enumerable model."""
    return Policy(enumerable.Tabular(length), enumerable.tokenizer(), Decoding(length), Text())


def plain_reward(prompts: Any = PROMPTS) -> CalibratedReward:
    """A reward without a model, whose references are drawn by nobody."""
    rng = np.random.default_rng(0)
    return CalibratedReward(HashScorer(), ReferenceTable.build([(p, rng.normal(size=16)) for p in prompts]))


@st.composite
def paths(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers for tokens, twice, and a mask: each row has one token or more."""
    n, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ends = torch.tensor(draw(st.lists(st.integers(1, length), min_size=n, max_size=n)))
    mask = torch.arange(length) < ends[:, None]
    one, two = (
        torch.tensor(draw(st.lists(numbers, min_size=n * length, max_size=n * length)), dtype=torch.float32)
        for _ in range(2)
    )
    return one.view(n, length) * mask, two.view(n, length) * mask, mask


@given(paths(), st.floats(0, 1))
def test_gae_is_the_sum_of_all_discounted_surprises(path: Any, lam: float) -> None:
    """Against the double sum of the definition, each row by itself and without padding."""
    rewards, values, mask = path

    found = ppo.estimate_advantages(rewards, values, mask, lam)

    for i, end in enumerate(mask.sum(1).tolist()):
        v = [*values[i, :end].tolist(), 0.0]
        surprise = [float(rewards[i, t]) + v[t + 1] - v[t] for t in range(end)]
        expected = [sum(lam ** (k - t) * surprise[k] for k in range(t, end)) for t in range(end)]
        np.testing.assert_allclose(found[i, :end], expected, atol=1e-4)
        assert not found[i, end:].any()


@given(paths(), st.floats(0, 2))
def test_tokens_earn_score_less_kl(path: Any, beta: float) -> None:
    """What a completion's tokens earn is its score less beta times its log-ratio, and the score comes last."""
    log_ratio, more, mask = path
    score = more[:, 0]

    paid = ppo.share_rewards(score, log_ratio, mask, beta)

    np.testing.assert_allclose(paid.sum(1), score - beta * log_ratio.sum(1), atol=1e-4)
    for row, ratio, own, end in zip(paid, log_ratio, score, mask.sum(1).tolist(), strict=True):
        np.testing.assert_allclose(row[: end - 1], -beta * ratio[: end - 1], atol=1e-5)
        np.testing.assert_allclose(row[end - 1], own - beta * ratio[end - 1], atol=1e-5)


@pytest.mark.parametrize(("how", "moments"), [("centre", (0, None)), ("scale", (0, 1))])
def test_whitening_counts_tokens_and_no_padding(how: str, moments: Any) -> None:
    """Mean 0, and deviation 1 where asked, over the tokens alone."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    given = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])

    found = ppo.whiten(given, mask, how)

    assert found[mask].mean() == pytest.approx(moments[0], abs=1e-6)
    assert found[mask].std(correction=0) == pytest.approx(moments[1] or given[mask].std(correction=0))
    assert not found[~mask].any()
    assert ppo.whiten(given, mask, "no") is given


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=3))
def test_the_baseline_leaves_itself_out(rewards: list[list[float]]) -> None:
    """Against a loop; the group's mean is (G-1)/G of it."""
    found = grpo.compute_advantages(torch.tensor(rewards))

    expected = [[own - np.mean(row[:i] + row[i + 1 :]) for i, own in enumerate(row)] for row in rewards]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(grpo.compute_advantages(torch.tensor(rewards), "group-mean"), found * 3 / 4, atol=1e-5)


@pytest.mark.parametrize(("family", "temperature"), [("llama", 1.0), ("gpt2", 0.7)])
def test_logprobs_are_those_of_a_plain_forward(family: str, temperature: float) -> None:
    """Prompts of many lengths in one batch; each completion read alone, without padding, gives the same.

    GPT-2 counts positions from the first column if nobody says where a prompt begins; a Llama would not notice.
    """
    policy = tiny_policy(temperature=temperature)
    if family == "gpt2":
        policy = replace(policy, model=gpt2())
    prompts = PROMPTS * 4
    torch.manual_seed(0)
    episodes = loop.generate(policy, prompts)

    found = loop.compute_logprobs(policy.model, episodes, temperature, rows=5)

    lengths = episodes.mask.sum(1).tolist()
    assert max(lengths) == 6
    assert family == "gpt2" or min(lengths) < 6
    for i, (row, begins) in enumerate(zip(episodes.mask, policy.ids(prompts), strict=True)):
        own = episodes.ids[i, -len(row) :][row]
        logits = policy.model(torch.tensor([[*begins, *own.tolist()]])).logits[0, len(begins) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, own[:, None])[:, 0]
        np.testing.assert_allclose(found[i][row], expected.detach(), atol=1e-5)
        assert not found[i][~row].any()


def test_completions_end_with_the_first_end_token() -> None:
    """The mask goes to the end token and no further, and the text is what is left of the tokens before it."""
    policy = tiny_policy(tokens=12)
    torch.manual_seed(1)
    episodes = loop.generate(policy, ["ab"], 40)

    own = [row[mask].tolist() for row, mask in zip(episodes.ids[:, -12:], episodes.mask, strict=True)]
    assert all(tiny.EOS not in row[:-1] for row in own)
    assert {row[-1] == tiny.EOS for row in own if len(row) < 12} == {True}
    assert any(len(row) == 12 and row[-1] != tiny.EOS for row in own)
    assert episodes.texts == policy.tokenizer.batch_decode(own, skip_special_tokens=True)
    assert (episodes.attention.sum(1) == episodes.mask.sum(1) + 3).all()  # BOS, a, b


def test_completions_are_drawn_from_the_whole_distribution() -> None:
    """In proportion to the enumerated law, whatever the checkpoint's generation config would have."""
    policy = exact_policy(2)
    policy.model.generation_config.update(top_k=2, temperature=0.1, repetition_penalty=3.0)
    torch.manual_seed(0)
    n = 8000
    written = loop.generate(policy, ["bc"], n)
    own = [tuple(r[m].tolist()) for r, m in zip(written.ids[:, -2:], written.mask, strict=True)]

    law = enumerable.law(policy.model, "bc", 2)

    seen = np.array([own.count(each) for each in enumerable.completions(2)])
    assert seen.sum() == n
    kept = law * n > 5
    chi = ((seen - law * n) ** 2 / (law * n))[kept].sum()
    assert chi < kept.sum() + 5 * np.sqrt(2 * kept.sum())


@pytest.mark.parametrize("loops", [ppo, grpo])
def test_the_first_gradient_is_that_of_the_policy_gradient(loops: Any) -> None:
    """Where nothing was updated yet all ratios are 1, and clipping is idle."""
    torch.manual_seed(0)
    old, mask = torch.randn(5, 3), torch.tensor([[1.0, 1.0, 0.0]])
    shape = (5, 3) if loops is ppo else (5,)
    advantage, new = torch.randn(shape), (old * mask).clone().requires_grad_()

    losses = loops.compute_losses(new, old * mask, advantage, 0.2)
    losses.sum().backward()

    np.testing.assert_allclose(losses.detach(), -advantage, atol=1e-6)
    np.testing.assert_allclose(new.grad, -(advantage if loops is ppo else advantage[:, None].expand(5, 3)), atol=1e-6)


@pytest.mark.parametrize("loops", [ppo, grpo])
def test_clipping_ends_the_gradient_beyond_the_bound_only(loops: Any) -> None:
    """A ratio that went too far the right way has no gradient any more; one that went the wrong way has."""
    new = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    loops.compute_losses(
        new, torch.zeros(4, 1), advantage[:, None] if loops is ppo else advantage, 0.2
    ).sum().backward()

    expected = [0.0, 0.0, np.exp(0.5), -np.exp(-0.5)]
    np.testing.assert_allclose(new.grad[:, 0], expected, atol=1e-6)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 3))
def test_each_prompt_comes_once_before_any_comes_again(many: int, n: int, seed: int) -> None:
    """Turns are of the size that was asked for, and passes over the prompts are whole."""
    turns = loop.iterate_batches([Asked(str(i)) for i in range(many)], n, seed)
    seen = [asked.prompt for _ in range(many) for asked in next(turns)]

    assert len(seen) == many * n
    passes = [sorted(seen[i : i + many]) for i in range(0, len(seen), many)]
    assert passes == [sorted(map(str, range(many)))] * n


@pytest.mark.parametrize("name", LOOPS)
def test_rows_at_once_change_nothing_and_seeds_everything(name: str) -> None:
    """Two steps with any size of batches in memory give the same weights; another seed gives others."""

    def trained(rows: int, seed: int) -> torch.Tensor:
        policy = tiny_policy()
        module, settings_class = LOOPS[name]
        size = {"completions": 6 if module is ppo else 2, "prompts_a_step": 3}
        settings = settings_class(steps=2, lr=1e-2, rows=rows, seed=seed, **size)
        module.train(policy, plain_reward(), [Asked(p) for p in PROMPTS], settings)
        return policy.model.lm_head.weight.detach()

    whole = trained(100, 0)
    np.testing.assert_allclose(trained(4, 0), whole, atol=2e-4)  # 4 and 2: equal parts would hide a wrong mean
    assert (trained(100, 1) - whole).abs().max() > 1e-3


# 4 prompts x 64 completions a step: a few seconds. benchmarks/plain_loops.py has more cases, and what biases them.
@pytest.mark.parametrize(("name", "phi", "steps"), [("ppo", "exp:10", 150), ("grpo", "identity", 200)])
def test_it_converges_to_the_optimum(name: str, phi: str, steps: int) -> None:
    """pi_ref(y) e^{Phi(C)/beta} / Z, by enumeration, for each prompt: total variation below 0.03, from above 0.5."""
    policy = exact_policy(2)
    problem = enumerable.Problem.of(policy.model, 2, phi)
    beta = problem.beta()
    assert problem.distances(policy.model, beta).max() > 0.5
    reward = CalibratedReward(enumerable.TiedScorer(), problem.table(), problem.transform)
    module, settings_class = LOOPS[name]
    size = {"completions": 256, "epochs": 1, "value_lr": 3e-2} if module is ppo else {"completions": 64}
    settings = settings_class(beta=beta, steps=steps, prompts_a_step=4, lr=0.1, rows=256, **size)

    module.train(policy, reward, [Asked(p) for p in enumerable.PROMPTS], settings)

    assert problem.distances(policy.model, beta).max() < 0.03


def test_below_its_adapter_a_model_is_the_reference() -> None:
    """Whatever the adapters are; a copy of a model that is trained as a whole stays as well."""
    ids = torch.arange(8)[None]
    for rank in (0, 2):
        start = tiny.causal()(ids).logits.detach()
        model = prepare_model(tiny.causal(), rank)
        reference = build_reference(model)
        with torch.no_grad():
            for weight in list_trainable(model):
                weight.add_(0.1)
        assert (model(input_ids=ids).logits - start).abs().max() > 0.01
        assert torch.equal(reference(input_ids=ids).logits, start)
        assert (
            sum(p.numel() for p in list_trainable(model)) < sum(p.numel() for p in tiny.causal().parameters())
            or not rank
        )


def test_prompts_are_shared_out_evenly() -> None:
    """A number that cannot be shared out among the processes is refused."""
    loop.check_shares(6, 3)
    with pytest.raises(ValueError, match="multiple of 3, got 7"):
        loop.check_shares(7, 3)


def test_quantiles_are_of_what_is_known() -> None:
    """The mean quantile of a step, against a count by hand, leaves out a prompt that is worth the neutral value."""
    table = ReferenceTable.build([("a", [0.0, 1.0, 2.0, 3.0])])
    reward = CalibratedReward(NumberScorer(), table, Log(), on_missing="neutral")
    ones = torch.ones(4, 1, dtype=torch.long)
    episodes = loop.Episodes(["1.5", "9", "-9", "-9"], ones, ones, ones.bool())
    *_, u = grpo.score(reward, [Asked("a"), Asked("?")], episodes, 2)
    assert u == (0.5 + 1) / 2


def test_ppo_refuses_a_reward_that_is_none() -> None:
    """A prompt without references, skipped: there is no number to learn from."""
    reward = CalibratedReward(HashScorer(), plain_reward().table, on_missing="skip")
    with pytest.raises(ValueError, match="'neutral'"):
        ppo.train(tiny_policy(), reward, [Asked("unknown")], PPOSettings(steps=1, completions=1, prompts_a_step=1))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        *[
            (settings, {"lr": rate})
            for settings in (PPOSettings, GRPOSettings, TRLSettings)
            for rate in (0.0, -1e-3, math.inf, math.nan)
        ],
        (PPOSettings, {"value_lr": math.nan}),
        (PPOSettings, {"prompts_a_step": 0}),
        (TRLSettings, {"beta": math.inf}),
        (TRLSettings, {"beta": 0.0}),
        (GRPOSettings, {"beta": math.nan}),
        (GRPOSettings, {"max_grad_norm": math.nan}),
        (GRPOSettings, {"steps": 0}),
        (PPOSettings, {"whiten": "yes"}),
        (PPOSettings, {"completions": 5}),
        (GRPOSettings, {"completions": 1}),
        (GRPOSettings, {"baseline": "x"}),
    ],
)
def test_settings_are_checked(settings: Any, wrong: dict[str, Any]) -> None:
    """The error names the setting and what it got."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        settings(**wrong)
