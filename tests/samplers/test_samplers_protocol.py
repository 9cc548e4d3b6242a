"""What a sampler is asked: a seed for each rollout, which depends on seed, prompt and number alone."""

import json

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st

from calibrated_rewards import prompt_key
from calibrated_rewards.samplers.protocol import Decoding, Particular, Rendering, Rollout, Sampler, sample, seeds_of
from calibrated_rewards.testing.suites import NumberSampler


@given(st.integers(), st.binary(min_size=16, max_size=16), st.integers(0, 50), st.integers(0, 50))
def test_a_seed_depends_on_its_number_alone(seed, key, first, count):
    """Whoever asks for rollouts 16 to 99 gets the seeds that a call for all 100 has there; each fits an int64."""
    seeds = seeds_of(seed, key, first, first + count)
    assert seeds == seeds_of(seed, key, 0, first + count)[first:]
    assert all(0 <= one < 2**63 for one in seeds)


def test_no_two_rollouts_have_one_seed():
    """Other run, other prompt, other number: another seed."""
    seeds = [one for seed in range(-3, 20) for i in range(20) for one in seeds_of(seed, prompt_key(f"{i}"), 0, 30)]
    assert len({*seeds}) == len(seeds)


def test_what_a_sampler_gives_is_made_rollouts():
    """Completions alone become rollouts of which nothing else is known."""

    def two(prompts, seeds):
        return [["a", [{"role": "assistant", "content": "b"}]] for _ in zip(prompts, seeds, strict=True)]

    assert sample(two, ["x"], [[1, 2]]) == [[Rollout("a"), Rollout([{"role": "assistant", "content": "b"}])]]
    assert sample(two, [], []) == []


@pytest.mark.parametrize("answer", ["ab", [["a", "b"]], None, [["a", "b"], "cd"], [["a", "b"], ["c"]]])
def test_a_wrong_number_of_lists_is_refused(answer):
    """A text is no list; nor is nothing, nor one list too few, nor a completion too few."""

    def wrong(prompts, seeds):
        return answer if prompts and seeds else None

    with pytest.raises(ValueError, match=r"wrong (gave|gives)"):
        sample(wrong, ["x", "y"], [[1, 2], [3, 4]])


def test_each_prompt_has_its_seeds():
    """A list of seeds for each."""
    with pytest.raises(ValueError, match="2 prompts and seeds for 1"):
        sample(NumberSampler(), ["x", "y"], [[1]])


def test_what_samplers_can_do_is_seen():
    """A plain sampler neither checks nor renders."""
    assert isinstance(NumberSampler(), Sampler)
    assert not isinstance(NumberSampler(), Particular | Rendering)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"max_tokens": True},
        {"max_tokens": float("inf")},
        {"max_tokens": float("nan")},
        {"max_tokens": "4"},
        {"temperature": 1e-5},
        {"top_k": True},
        {"top_k": float("inf")},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": (2.5,)},
        {"stop_token_ids": (True,)},
        {"stop_token_ids": ("</s>",)},
    ],
)
def test_decoding_settings_have_rules(wrong, monkeypatch):
    """Each is said with all settings."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"Decoding needs .*{next(iter(wrong))}"):
        Decoding(**{"max_tokens": 4, **wrong})


def test_decoding_is_json_and_compares_by_value(monkeypatch):
    """Lists become tuples; a text in the place of stop texts is refused."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert Decoding(4, stop=["a"]) == Decoding(4, stop=("a",))
    assert Decoding(4, stop=["a"]).fingerprint()["stop"] == ["a"]
    with pytest.raises(TypeError, match="a tuple of texts"):
        Decoding(4, stop="a")


def test_whole_numbers_are_ints_whatever_their_type(monkeypatch):
    """So that an engine takes them, and settings that are the same have one fingerprint."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = Decoding(4.0, top_k=np.float32(5), stop_token_ids=[np.int64(7), 8.0])
    assert json.dumps(given.fingerprint()) == json.dumps(Decoding(4, top_k=5, stop_token_ids=(7, 8)).fingerprint())
