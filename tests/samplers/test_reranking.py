"""Best-of-N as a policy: the choice is that of the procedure, on candidates that depend on seed and number alone."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings, strategies as st
from scipy.stats import kstest

from calibrated_rewards import (
    BestOf,
    BestOfUpTo,
    CalibratedReward,
    ReferenceTable,
    RewindAndRepeat,
    SoftBestOf,
    Standard,
    WorstOf,
    prompt_key,
)
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.reward import Quantiles
from calibrated_rewards.samplers import Reranked, Rollout, sample
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding, seeds_of
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.protocol import score
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = ["2+2=", [{"role": "user", "content": "Hi"}], "Tell me"]


@dataclass(frozen=True)
class UniformSampler:
    """Completions that are uniform numbers in [0, 1), and a count of those drawn."""

    drawn: list[int] = field(default_factory=list)

    def __call__(self, prompts, seeds):
        """A number of the seed alone, of so few digits that some are tied."""
        self.drawn.append(sum(map(len, seeds)))
        return [[Rollout(f"{np.random.default_rng(s).random():.2f}", 1, "stop", -1.0) for s in own] for own in seeds]

    def fingerprint(self):
        """It has no settings."""
        return {"kind": "uniform"}


procedures = st.one_of(
    st.builds(BestOf, st.integers(1, 6)),
    st.builds(WorstOf, st.integers(1, 6)),
    st.builds(SoftBestOf, st.integers(1, 6), st.floats(0.01, 2.0)),
    st.builds(RewindAndRepeat, st.sampled_from([0.3, 0.5, 0.7, 0.9]), st.integers(1, 9)),
    st.builds(BestOfUpTo, st.integers(2, 6)),
    st.just(Standard()),
)


@settings(deadline=None)
@given(procedures, st.lists(st.integers(0, 2**62), min_size=1, max_size=4))
def test_the_choice_is_that_of_the_procedure(procedure, seeds):
    """All draws made at once, scored and handed to `choose` with the seed's own numbers: the same completion."""
    for prompt, choices in zip(
        PROMPTS, Reranked(UniformSampler(), NumberScorer(), procedure).choose(PROMPTS, [seeds] * 3), strict=True
    ):
        for seed, choice in zip(seeds, choices, strict=True):
            key = prompt_key(prompt)
            drawn = UniformSampler()([prompt], [seeds_of(seed, key, 0, procedure.draws)])[0]
            numbers = np.array([float(each.completion) for each in drawn])
            rng = np.random.Generator(np.random.Philox(key=seeds_of(seed, key, -1, 0)[0]))
            expected = int(procedure.choose(numbers, rng))
            assert choice.rollout.completion == drawn[expected].completion
            assert choice.candidates == drawn[: len(choice.candidates)]
            assert choice.score == pytest.approx(numbers[expected], abs=1e-7)
            assert choice.rollout.logprob is None


@given(st.permutations(range(3)), st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_a_prompt_does_not_depend_on_those_beside_it(order, n):
    """Alone, in another order, with fewer seeds, and with a larger N: the same candidates."""
    best = Reranked(NumberSampler(), HashScorer(), BestOf(n))
    seeds = [[1, 2], [3], [2, 5]]
    together = best.choose(PROMPTS, seeds)
    moved = best.choose([PROMPTS[i] for i in order], [seeds[i] for i in order])
    assert [moved[order.index(i)] for i in range(3)] == together
    assert best.choose(PROMPTS[2:], [seeds[2][1:]])[0][0] == together[2][1]
    more = replace(best, procedure=BestOf(n + 3)).choose(PROMPTS, seeds)
    assert all(
        a.candidates == b.candidates[:n] for x, y in zip(together, more, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("procedure", [BestOf(4), WorstOf(3), SoftBestOf(4, 0.2), RewindAndRepeat(0.8, 5)], ids=repr)
def test_its_law_is_the_one_of_theory(procedure):
    """Of scores that are uniform, the chosen ones have the procedure's own law."""
    sampler = Reranked(_fine, NumberScorer(), procedure)
    chosen = np.array([float(each.completion) for each in sampler(["x"], [range(4000)])[0]])
    rng = np.random.default_rng(0)
    numbers = rng.random((200_000, procedure.draws))
    law = np.take_along_axis(numbers, np.asarray(procedure.choose(numbers, rng))[:, None], 1)[:, 0]
    assert kstest(chosen, law).pvalue > 1e-3


def _fine(prompts, seeds):
    numbers = [[f"{np.random.default_rng(s).random():.7f}" for s in own] for own in seeds]
    return numbers[: len(prompts)]


def test_rewinding_stops_drawing():
    """About 1 / (1 - threshold) draws, not max_tries; and no draw more once all have passed."""
    sampler = UniformSampler()
    Reranked(sampler, NumberScorer(), RewindAndRepeat(0.5, 64))(["x"], [range(300)])
    assert 300 * 1.9 < sum(sampler.drawn) < 300 * 3.2
    assert len(sampler.drawn) <= 7  # rounds of 1, 1, 2, 4, ..., 32 for those that go on
    sampler.drawn.clear()
    Reranked(sampler, lambda p, c: [1.0] * len(c), RewindAndRepeat(0.5, 64))(["x"], [range(10)])
    assert sampler.drawn == [10]


@pytest.mark.parametrize("threshold", [0.1 * i for i in range(1, 10)])
def test_a_score_at_the_threshold_passes(threshold):
    """Also where float32 rounds it down."""
    choice = Reranked(_fine, lambda p, c: [threshold] * len(c), RewindAndRepeat(threshold, 9)).choose(["x"], [[1]])[0][
        0
    ]
    assert (choice.index, len(choice.candidates)) == (0, 1)


def test_a_raw_score_has_no_threshold():
    """The error names the procedure, the score and the quantiles that it takes."""
    with pytest.raises(ValueError, match=r"RewindAndRepeat\(.* got 7.0 .*reward.Quantiles"):
        Reranked(lambda p, s: [["7"] * len(own) for own in s], NumberScorer(), RewindAndRepeat(0.9, 4))(["x"], [[1]])


def test_quantiles_are_what_rewinding_looks_at():
    """With a table, the chosen completion's quantile passes wherever one of the candidates' does."""
    table = calibrate(PROMPTS, NumberSampler(), NumberScorer(), k=40)
    quantiles = Quantiles(CalibratedReward(NumberScorer(), table))
    for choice in Reranked(NumberSampler(), quantiles, RewindAndRepeat(0.8, 30)).choose(PROMPTS[:1], [range(50)])[0]:
        assert choice.score >= 0.8 or max(choice.scores) < 0.8
        assert choice.score == pytest.approx(
            CalibratedReward(NumberScorer(), table)(PROMPTS[:1], [choice.rollout.completion])[0], abs=1e-6
        )
    assert quantiles.fingerprint()["of"] == NumberScorer().fingerprint()
    json.dumps(quantiles.fingerprint())


def test_calibration_changes_no_best_of_n():
    """Of a reward without ties among the candidates, the plain reward model chooses the same."""
    table = ReferenceTable.build([("x", np.linspace(-3, 3, 1001))])
    raw = Reranked(NumberSampler(), NumberScorer(), BestOf(3))
    ranked = replace(raw, scorer=Quantiles(CalibratedReward(NumberScorer(), table)))
    pairs = zip(raw.choose(["x"], [range(60)])[0], ranked.choose(["x"], [range(60)])[0], strict=True)
    untied = [(a, b) for a, b in pairs if len({*b.scores}) == 3]
    assert len(untied) > 30
    assert all(a.rollout == b.rollout for a, b in untied)


def test_best_of_n_is_a_policy():
    """It is evaluated and calibrated as any other; its win rate over one draw is that of theory, 4 / 5."""
    best = Reranked(NumberSampler(), NumberScorer(), BestOf(4))
    prompts = [f"prompt {i}" for i in range(60)]
    found = evaluate(
        {"best": best},
        NumberSampler(),
        prompts,
        {"reward": NumberScorer()},
        m=24,
        show_progress=False,
        procedures=[Standard()],
    )
    assert found.policies[0].win_rates["reward"]["Standard()"].value == pytest.approx(0.8, abs=0.02)
    assert found.policies[0].kl is None
    table = calibrate(prompts[:2], best, NumberScorer(), k=6)
    assert table.meta["sampler"]["procedure"] == "BestOf(n=4)"
    assert table.scores(0).min() > calibrate(prompts[:2], NumberSampler(), NumberScorer(), k=6).scores(0).min()


def test_with_a_language_model():
    """A tiny model and a tiny reward model: the rollout that comes out has the highest score of its candidates."""
    policy = HfSampler(tiny.causal(), tiny.tokenizer(), Decoding(6))
    scorer = SequenceClassifier(tiny.classifier(), tiny.tokenizer())
    choice = Reranked(policy, scorer, BestOf(3)).choose(PROMPTS[1:2], [[5]])[0][0]
    again = score(scorer, PROMPTS[1:2] * 3, [each.completion for each in choice.candidates])
    np.testing.assert_allclose(choice.scores, again, atol=1e-4)
    assert choice.index == int(again.argmax())
    assert Reranked(policy, scorer, BestOf(3)).rendered(PROMPTS[1]) == policy.rendered(PROMPTS[1])
    with pytest.raises(ValueError, match="at most"):
        Reranked(policy, scorer, BestOf(3)).check(["x" * 600])


def test_what_is_refused():
    """No procedure, no draws, seeds for other prompts, and a choice that is no candidate."""
    with pytest.raises(TypeError, match="8"):
        Reranked(NumberSampler(), NumberScorer(), 8)
    with pytest.raises(ValueError, match="3 prompts and seeds for 1"):
        Reranked(NumberSampler(), NumberScorer(), BestOf(2))(PROMPTS, [[1]])
    with pytest.raises(ValueError, match="chose 2"):
        Reranked(NumberSampler(), NumberScorer(), _Beyond())(["x"], [[1]])


@dataclass(frozen=True)
class _Beyond:
    draws: int = 2

    def choose(self, scores, rng):
        """One behind the last."""
        return len(scores)


def test_any_sampler_is_reranked():
    """A plain function of texts; and what `sample` makes of a reranked one is what it gives."""
    best = Reranked(_fine, NumberScorer(), BestOf(2))
    assert sample(best, ["x"], [[1, 2]]) == best(["x"], [[1, 2]])
