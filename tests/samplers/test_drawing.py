"""The next token: uniforms that belong to a seed, transformers' processors in generate's order, and exact draws."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import special, stats
from tiny import causal
from transformers import GenerationConfig

from calibrated_rewards.samplers.drawing import HALVINGS, draw, processors, uniforms
from calibrated_rewards.samplers.protocol import Decoding


def drawn(scores: list[float], number: int, first_seed: int = 0) -> np.ndarray:
    """Tokens that are drawn from the same scores by different seeds."""
    chances = torch.from_numpy(uniforms(range(first_seed, first_seed + number), 0, 1)[:, 0])
    return draw(torch.tensor(scores).expand(number, -1), chances).tokens.numpy()


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.integers(0, 50), st.integers(1, 9))
def test_uniforms_belong_to_a_seed_and_a_token(seeds: list[int], first: int, count: int) -> None:
    """They do not depend on the other seeds, nor on how many tokens are asked for at a time."""
    together = uniforms(seeds, 0, first + count)
    parts = [uniforms([seed], first, count)[0] for seed in seeds]

    assert together.shape == (len(seeds), first + count, HALVINGS)
    assert (together[:, first:] == np.stack(parts)).all()
    assert (together >= 0).all()
    assert (together < 1).all()


def test_uniforms_are_uniform_and_independent() -> None:
    """Over seeds, tokens and halvings: the distribution, and no correlation between neighbours of any kind."""
    numbers = uniforms(range(300), 0, 4)

    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers[..., 1:], numbers[..., :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / a.size**0.5


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_draws_have_the_probabilities_of_the_scores(size: int) -> None:
    """Chi-square against scipy's softmax, for vocabularies that halve evenly or not."""
    scores = np.random.default_rng(size).normal(size=size) * 1.5
    counts = np.bincount(drawn(scores.tolist(), 10_000), minlength=size)
    expected = special.softmax(scores) * counts.sum()

    assert len(counts) == size
    assert size == 1 or stats.chisquare(counts, expected).pvalue > 1e-3


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """A twentieth of the mass on 5,000 tokens: as often, and anywhere among them."""
    size, mass = 5_001, 0.05
    scores = [np.log(1 - mass)] + [np.log(mass / (size - 1))] * (size - 1)
    tokens = drawn(scores, 4000)
    rare = tokens[tokens > 0]

    assert stats.binomtest(len(rare), len(tokens), mass).pvalue > 1e-3
    assert stats.kstest((rare - 1) / (size - 1), "uniform").pvalue > 1e-3


@given(st.lists(st.one_of(st.just(-np.inf), st.floats(-30, 30)), min_size=1, max_size=40), st.integers(0, 2**40))
def test_tokens_without_probability_are_never_drawn(scores: list[float], seed: int) -> None:
    """Whatever the chances, their ends included; and the log-probability is the softmax's."""
    if not np.isfinite(scores).any():
        scores[0] = 0.0
    chances = np.concatenate([uniforms([seed], 0, 5)[0], np.zeros((1, HALVINGS)), np.full((1, HALVINGS), 1 - 2**-53)])
    tokens, logprobs = draw(torch.tensor(scores, dtype=torch.float32).expand(7, -1), torch.from_numpy(chances))
    expected = special.log_softmax(np.asarray(scores, np.float32).astype(np.float64))[tokens.numpy()]

    assert np.isfinite(expected).all()
    assert np.abs(logprobs.numpy() - expected).max() < 1e-5


def test_a_little_noise_changes_few_tokens() -> None:
    """Where rounding moves the scores, inverting the cumulative probability goes astray at every boundary."""
    torch.manual_seed(0)
    scores = torch.randn(200, 10_000) * 3
    noisy = scores + 5e-3 * torch.randn_like(scores)
    chances = torch.from_numpy(uniforms(range(200), 0, 1)[:, 0])
    sums = [each.double().softmax(1).cumsum(1) for each in (scores, noisy)]
    inverted = [torch.searchsorted(each, chances[:, :1].contiguous()) for each in sums]

    assert int((draw(scores, chances).tokens != draw(noisy, chances).tokens).sum()) <= 3
    assert int((inverted[0] != inverted[1]).sum()) > 20


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(5),
        Decoding(5, temperature=0.7, top_p=0.8),
        Decoding(5, top_k=20, min_p=0.05),
        Decoding(5, temperature=1.3, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.3),
    ],
)
def test_processors_are_those_of_generate(decoding: Decoding) -> None:
    """The scores that generate draws from, from the logits that it had."""
    model = causal(initializer_range=1.0)
    prompt = torch.randint(3, 200, (3, 6))
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    settings = {name: getattr(decoding, name) for name in names}
    options = {"do_sample": True, "max_new_tokens": decoding.max_tokens, "pad_token_id": 0, "eos_token_id": None}
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(0)
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(**options, **settings, **told),
    )
    ours = processors(decoding)
    bent = [ours(found.sequences[:, : 6 + step], logits.float().clone()) for step, logits in enumerate(found.logits)]

    for a, b in zip(bent, found.scores, strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(bent, found.logits, strict=True)) == (len(ours) > 0)


@pytest.mark.parametrize("wrong", [[float("nan"), 0.0], [float("inf"), 0.0], [-float("inf")] * 2])
def test_scores_that_are_no_probabilities_are_refused(wrong: list[float]) -> None:
    """Nothing is drawn beside nan, nor where no token may be."""
    chances = torch.from_numpy(uniforms([1, 2], 0, 1)[:, 0])

    with pytest.raises(FloatingPointError, match=r"in 1 of 2 rows of torch.float32 scores: .*try --policy-dtype"):
        draw(torch.tensor([[0.0, 1.0], wrong]), chances)


def test_the_lowest_temperature_keeps_scores_finite() -> None:
    """The likeliest token is drawn, with all of the probability; what is lower is refused."""
    bent = processors(Decoding(4, temperature=1e-4))(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[3e4, -3e4]]))
    found = draw(bent, torch.from_numpy(uniforms([1], 0, 1)[:, 0]))

    assert (found.tokens.tolist(), found.logprobs.tolist()) == ([0], [0.0])
    with pytest.raises(ValueError, match="temperature > 0, of 1e-4 or more"):
        Decoding(4, temperature=1e-40)
