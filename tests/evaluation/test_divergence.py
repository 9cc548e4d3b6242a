"""The KL of completions: against all of them enumerated, and against plain forwards of each beginning."""

import copy
import logging
from dataclasses import replace
from typing import Any

import enumerable
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from scipy.special import rel_entr, softmax

from calibrated_rewards.evaluation import kl as divergence
from calibrated_rewards.evaluation.kl import Divergence, _terms, build_divergence
from calibrated_rewards.evaluation.results import Precision
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding, Rollout
from calibrated_rewards.testing.suites import NumberSampler

CHAT = [{"role": "user", "content": "Hi"}]
LENGTH = 2


def tabular(seed: int, temperature: float = 1.0, skew: float = 1.5) -> HfSampler:
    """The enumerable model as a sampler."""
    model = enumerable.Tabular(LENGTH, seed, skew)
    return HfSampler(model, enumerable.tokenizer(), Decoding(LENGTH, temperature), show_progress=False)


def everything() -> list[Rollout]:
    """Each completion that there is."""
    return [
        Rollout(enumerable.text(ids), len(ids), "stop" if ids[-1] == enumerable.END else "length")
        for ids in enumerable.completions(LENGTH)
    ]


def law(sampler: HfSampler, prompt: str) -> np.ndarray:
    """Of all completions, from a model whose logits are divided by the temperature."""
    cooled = enumerable.Tabular(LENGTH)
    cooled.load_state_dict(sampler.model.state_dict())
    with torch.no_grad():
        cooled.get_output_embeddings().weight.div_(sampler.decoding.temperature)
    return enumerable.law(cooled, prompt, LENGTH)


def llama(seed: int, tokens: int, temperature: float = 1.0, scale: float = 10.0, **more: Any) -> HfSampler:
    """A tiny Llama, with logits that are far from equal."""
    model = tiny.causal(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return HfSampler(model, tiny.tokenizer(), Decoding(tokens, temperature, **more), show_progress=False)


@torch.no_grad()
def plainly(sampler: HfSampler, opening: str, ids: list[int]) -> np.ndarray:
    """Next-token probabilities after each beginning of some tokens, each by a forward of its own."""
    start = sampler.tokenizer(opening, add_special_tokens=opening == "a").input_ids
    rows = [start + ids[:n] for n in range(len(ids) + 1)]
    logits = [sampler.model(torch.tensor([row])).logits[0, -1].double().numpy() for row in rows]
    return softmax(np.array(logits) / sampler.decoding.temperature, axis=1)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.3)])
def test_over_all_completions_the_mean_is_the_exact_kl(temperatures):
    """Weighted by their probabilities; the log-ratio has the same mean and a larger variance."""
    policy, reference = tabular(1, temperatures[0]), tabular(0, temperatures[1])
    found = Divergence(policy, reference)(enumerable.PROMPTS, [everything()] * len(enumerable.PROMPTS))
    for prompt, own in zip(enumerable.PROMPTS, found, strict=True):
        p, q = law(policy, prompt), law(reference, prompt)
        kl = np.array([each.kl for each in own])
        exact = float(rel_entr(p, q).sum())
        assert p @ kl == pytest.approx(exact, abs=1e-5)
        assert p @ (kl - exact) ** 2 < 0.7 * p @ (np.log(p / q) - exact) ** 2
        assert kl.min() >= 0
        assert all(each.as_drawn for each in own)


@pytest.mark.parametrize("cells", [None, 1, 3000])
def test_each_completion_is_the_sum_of_its_tokens(cells):
    """Ended and cut ones of many lengths, after text and after messages, whatever is held at once."""
    policy, reference = llama(0, 9, 0.8), llama(1, 9)
    rollouts = [Rollout("abc", 4, "stop"), Rollout("", 1, "stop"), Rollout("hello abc", 9, "length")]
    found = Divergence(policy, reference, cells)(["a", CHAT], [rollouts, rollouts[::-1]])
    for opening, own in (("a", found[0]), ("<s><|user|>Hi<|end|><|assistant|>", found[1][::-1])):
        for rollout, distance in zip(rollouts, own, strict=True):
            ids = tiny.tokenizer()(rollout.completion, add_special_tokens=False).input_ids
            fed = ids if rollout.finish == "stop" else ids[:-1]
            terms = rel_entr(plainly(policy, opening, fed), plainly(reference, opening, fed)).sum(1)
            assert distance.kl == pytest.approx(terms.sum(), rel=1e-4)
            assert distance.as_drawn


def test_says_where_text_makes_other_tokens():
    """Bytes that are no character are lost in the text; with a stop text, the tokens that it was made of count."""
    policy, reference = llama(0, 9, stop=("END",)), llama(1, 9, stop=("END",))
    own = [Rollout("ab", 5, "stop"), Rollout("ab", 4, "stop"), Rollout("ab", 3, "stop"), Rollout("ab", 2, "length")]
    (found,) = Divergence(policy, reference)(["a"], [own])
    assert [each.as_drawn for each in found] == [True, False, True, True]
    fed = tiny.tokenizer()("abEN", add_special_tokens=False).input_ids
    terms = rel_entr(plainly(policy, "a", fed), plainly(reference, "a", fed)).sum(1)
    assert found[0].kl == pytest.approx(terms.sum(), rel=1e-4)
    assert found[2].kl == pytest.approx(terms[:3].sum(), rel=1e-4)
    assert found[3].kl == pytest.approx(terms[:2].sum(), rel=1e-4)


def test_what_a_sampler_draws_is_read_again():
    """As many tokens as were drawn, and on the mean the log-ratio's KL, within its error."""
    ids = {"vocab_size": len(enumerable.tokenizer()), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    samplers = []
    for seed in range(2):
        model = tiny.causal(seed, **ids)
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
        samplers.append(HfSampler(model, enumerable.tokenizer(), Decoding(6), show_progress=False))
    policy, reference = samplers
    rollouts = policy(["bc"], [[*range(300)]])
    assert {"stop", "length"} == {each.finish for each in rollouts[0]}
    (found,) = Divergence(policy, reference)(["bc"], rollouts)
    assert all(each.as_drawn for each in found)
    kl, ratio = np.array([each.kl for each in found]), np.array([_log_ratio(*samplers, each) for each in rollouts[0]])
    assert abs(kl.mean() - ratio.mean()) < 4 * (ratio - kl).std() / np.sqrt(300)
    assert kl.std() < ratio.std()


@torch.no_grad()
def _log_ratio(policy: HfSampler, reference: HfSampler, rollout: Rollout) -> float:
    """What was drawn, by a plain forward of each model; the policy's agrees with what the sampler says."""
    opening, ids = [2, 3], [1 + "abcdefg".index(letter) for letter in rollout.completion]
    row = [*opening, *ids, *([enumerable.END] if rollout.finish == "stop" else [])]
    p, q = (
        each.model(torch.tensor([row])).logits[0, 1:-1].log_softmax(-1).gather(1, torch.tensor(row[2:])[:, None]).sum()
        for each in (policy, reference)
    )
    assert float(p) == pytest.approx(rollout.logprob, abs=1e-3)
    return float(p - q)


def test_the_same_model_is_at_zero():
    """Exactly, at any precision of the rest."""
    policy = llama(0, 9)
    assert Divergence(policy, policy)(["a"], [[Rollout("abc", 4, "stop")]])[0][0].kl == 0.0


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=6), st.floats(0.2, 5))
def test_terms_are_the_kl_and_not_negative(logits, temperature):
    """Against scipy, with a token that the policy never draws."""
    p, q = (
        torch.tensor([[[*side, -torch.inf if i == 0 else 0.0]]]) for i, side in enumerate(zip(*logits, strict=True))
    )
    found = float(_terms(p, q, temperature, 1.0)[0, 0])
    a, b = (softmax(each.double().numpy() / t) for each, t in ((p, temperature), (q, 1.0)))
    assert found >= 0
    assert found == pytest.approx(rel_entr(a, b).sum(), rel=1e-4, abs=1e-4)


def test_refuses_what_has_no_kl(caplog):
    """No model, decoding that bends, other tokens; `between` says why, and gives None."""
    plain = llama(0, 9)
    with pytest.raises(TypeError, match="the reference is a NumberSampler"):
        Divergence(plain, NumberSampler())
    with pytest.raises(ValueError, match=r"nothing but a temperature, policy has .*top_p=0\.9"):
        Divergence(replace(plain, decoding=Decoding(9, top_p=0.9)), plain)
    with pytest.raises(ValueError, match="cells >= 1, got cells=0"):
        Divergence(plain, plain, 0)
    with caplog.at_level(logging.WARNING):
        assert build_divergence(NumberSampler(), plain) is None
    assert "the policy is a NumberSampler" in caplog.text
    with pytest.raises(ValueError, match="make other tokens of a completion of 'a'"):
        Divergence(plain, tabular(0))(["a"], [[Rollout("abc", 4, "stop")]])
    larger = HfSampler(tiny.causal(0, vocab_size=300), tiny.tokenizer(), Decoding(9))
    with pytest.raises(ValueError, match="of the same tokens, got 264 and 300"):
        Divergence(plain, larger)(["a"], [[Rollout("abc", 4, "stop")]])
    with pytest.raises(TypeError, match="completions that are text, got messages for 'a'"):
        Divergence(plain, plain)(["a"], [[Rollout(CHAT, 4, "stop")]])
    with pytest.raises(ValueError, match="each prompt needs its rollouts, got 1 prompts, rollouts of 0"):
        Divergence(plain, plain)(["a"], [])


def saved_in(sampler: HfSampler, dtype: torch.dtype) -> HfSampler:
    """The same model, its weights rounded to a dtype and held in it."""
    return replace(sampler, model=copy.deepcopy(sampler.model).to(dtype))


def means(policy: HfSampler, reference: HfSampler) -> float:
    """The mean KL of what the policy draws."""
    prompts = [f"prompt {i}" for i in range(4)]
    found = Divergence(policy, reference)(prompts, policy(prompts, [range(8)] * len(prompts)))
    return float(np.mean([[each.kl for each in own] for own in found]))


def test_the_dtype_of_a_model_is_no_kl():
    """A model in 16 bits against the same weights in float32 is at 0, whichever of the two is the policy."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = saved_in(llama(0, 16), dtype)
        wide = saved_in(narrow, torch.float32)
        assert means(wide, narrow) == 0.0
        assert means(narrow, wide) == 0.0
        assert Divergence(wide, narrow).precision() == Precision("float32")


def test_models_in_16_bits_are_read_in_float32():
    """The KL of a small step in weights, by forwards in float64 of the same weights, in each pair of dtypes."""
    reference = saved_in(llama(0, 9), torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        policy = saved_in(reference, dtype)
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.mul_(1 + 2**-6 * torch.randint(-1, 2, weight.shape, generator=torch.manual_seed(0)))
        exact = [saved_in(each, torch.float64) for each in (policy, reference)]
        ids = tiny.tokenizer()("hello", add_special_tokens=False).input_ids
        terms = rel_entr(*(plainly(each, "a", ids) for each in exact)).sum()
        (found,) = Divergence(policy, reference)(["a"], [[Rollout("hello", 6, "stop")]])
        assert found[0].kl == pytest.approx(terms, rel=1e-3)
        assert {each.dtype for each in reference.model.parameters()} == {torch.bfloat16}


def test_a_model_saved_in_two_dtypes_is_known():
    """Rounded weights are another model by a little, which is said; trained or shared or other weights are not."""
    whole = llama(0, 16)
    rounded = saved_in(whole, torch.bfloat16)
    assert 0 < means(whole, rounded) < 1e-3
    for one, other in [(whole, rounded), (rounded, whole), (whole, saved_in(rounded, torch.float32))]:
        assert Divergence(one, other).precision() == Precision("float32", "bfloat16")
    assert Divergence(saved_in(whole, torch.float16), rounded).precision().rounding == "bfloat16"
    assert Divergence(whole, saved_in(whole, torch.float16)).precision().rounding == "float16"
    wide = saved_in(whole, torch.float64)
    with torch.no_grad():
        for weight in wide.model.parameters():
            weight.mul_(1 + 1e-10)
    assert Divergence(wide, saved_in(wide, torch.float32)).precision().rounding == "float32"
    assert Divergence(saved_in(wide, torch.bfloat16), wide).precision().rounding == "bfloat16"
    trained = saved_in(rounded, torch.float32)
    with torch.no_grad():
        for weight in trained.model.parameters():
            weight.add_(1e-5)
    for one, other in [(trained, rounded), (whole, whole), (whole, llama(1, 16)), (whole, tabular(0))]:
        assert Divergence(one, other).precision().rounding is None


def test_models_are_left_as_they_were():
    """Dtypes, values and ties of weights, also where a forward fails; mixed dtypes stay mixed."""
    model = saved_in(llama(0, 9), torch.bfloat16).model
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    sampler = HfSampler(model, tiny.tokenizer(), Decoding(9), show_progress=False)
    Divergence(sampler, llama(0, 9))(["a"], [[Rollout("abc", 4, "stop")]])
    larger = HfSampler(tiny.causal(0, vocab_size=300), tiny.tokenizer(), Decoding(9))
    with pytest.raises(ValueError, match="of the same tokens"):
        Divergence(sampler, larger)(["a"], [[Rollout("abc", 4, "stop")]])
    after = model.state_dict()
    assert all(after[name].dtype == each.dtype and torch.equal(after[name], each) for name, each in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.norm.weight.data = model.model.norm.weight.data.bfloat16()
    model.train()(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


def test_without_memory_for_float32_the_wider_dtype_is_used(monkeypatch, caplog):
    """And named: its rounding is in the KL. Quantised models stay in the dtype that they compute in."""
    narrow = saved_in(llama(0, 9), torch.bfloat16)
    convert = divergence._convert

    def full(tensors: Any, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError
        convert(tensors, dtype)

    monkeypatch.setattr(divergence, "_convert", full)
    assert Divergence(narrow, narrow).precision().read_in == "bfloat16"
    assert "no memory for both models in float32: the KL is read in bfloat16" in caplog.text
    monkeypatch.undo()
    narrow.model.is_quantized = True
    assert Divergence(narrow, narrow).precision().read_in == "bfloat16"
