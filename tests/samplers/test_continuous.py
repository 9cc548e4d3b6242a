"""Continuous batching: what the engine gives, checked, and as completions of the policy."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import causal
from words import ids_of, spread, words

from calibrated_rewards.samplers.continuous import ContinuousSampler
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding

SMALL = {"num_blocks": 32, "max_batch_tokens": 64, "page_size": 32}


def model() -> Any:
    return spread(causal(vocab_size=6, eos_token_id=0), seed=3)


def sampler(decoding: Decoding, **options: Any) -> ContinuousSampler:
    options = {"batching": SMALL, "show_progress": False, **options}
    return ContinuousSampler(options.pop("model", model()), words(6), decoding, **options)


def test_completions_are_the_models() -> None:
    """Their log-probabilities are a plain forward's, bent as the decoding says; as many as asked for; ends are seen."""
    policy, decoding = model(), Decoding(6, temperature=0.8, top_k=4)
    rollouts = sampler(decoding, model=policy)(["w2 w1", "w3", "w4"], [[1, 2, 3, 4], [5], [6, 7, 8, 9]])

    assert [len(own) for own in rollouts] == [4, 1, 4]
    assert {rollout.finish for own in rollouts for rollout in own} == {"stop", "length"}
    for read, own in zip(([2, 1], [3], [4]), rollouts, strict=True):
        for rollout in own:
            drawn = ids_of(rollout, words(6))
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([[*read, *drawn]])).logits[0, len(read) - 1 : -1] / 0.8
            kept = logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf).double().log_softmax(1)
            assert rollout.tokens == len(drawn)
            assert rollout.logprob == pytest.approx(float(kept[range(len(drawn)), drawn].sum()), abs=1e-4)


def test_they_have_the_models_distribution() -> None:
    """First tokens by chi-square, and not the same for every completion of a prompt."""
    policy = model()
    rollouts = sampler(Decoding(1), model=policy, batching={**SMALL, "max_batch_tokens": 256})(
        ["w2 w1"], [list(range(300))]
    )
    with torch.no_grad():
        expected = policy(input_ids=torch.tensor([[2, 1]])).logits[0, -1].double().softmax(0).numpy()
    counts = np.bincount([ids_of(rollout, words(6))[0] for rollout in rollouts[0]], minlength=6)

    assert stats.chisquare(counts, 300 * expected / expected.sum()).pvalue > 1e-3


def test_the_same_call_gives_the_same_and_other_seeds_others() -> None:
    """Seeds hold for the call as a whole."""
    found = sampler(Decoding(8))
    first, again, other = (found(["w2 w1", "w3 w1"], [[1, seed], [3, 4]]) for seed in (2, 2, 5))

    assert first == again
    assert first[1] != other[1]


def test_what_fails_in_the_engine_is_an_error() -> None:
    """Which only logs it, and leaves the completions out."""
    with pytest.raises(RuntimeError, match=r"gives 2 completions for each of 1 prompts, got 0 for 'w2 w2 w2"):
        sampler(Decoding(20), batching={**SMALL, "num_blocks": 1})(["w2 " * 30], [[1, 2]])


def test_it_is_the_policy_of_the_other_sampler() -> None:
    """The same prompts are read in the same way, and refused; what the engine does not have is refused at once."""
    policy = model()
    found, other = sampler(Decoding(6), model=policy), HfSampler(policy, words(6), Decoding(6))

    assert {**found.fingerprint(), "kind": ""} == {**other.fingerprint(), "kind": ""}
    assert found.fingerprint()["kind"] != other.fingerprint()["kind"]
    assert found.rendered("w2") == "w2"
    with pytest.raises(ValueError, match="at least one token"):
        found.check([""])
    with pytest.raises(ValueError, match="no repetition penalty and no stop texts"):
        sampler(Decoding(6, repetition_penalty=1.1))
    with pytest.raises(ValueError, match="no repetition penalty and no stop texts"):
        sampler(Decoding(6, stop=("w5",)))
    with pytest.raises(TypeError, match="load_sampler"):
        pickle.dumps(found)
    assert found([], []) == []
