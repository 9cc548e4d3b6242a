"""Graded scorers: expected levels are those of a softmax of each dimension's logits, and every pair is read once."""

import pickle
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from torch import nn
from transformers import PretrainedConfig

from calibrated_rewards import BestOf, CalibratedReward, Exponential, WorstOf
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.models.labels import Expected, Levels, resolve_labels
from calibrated_rewards.models.own_forward import pick_output
from calibrated_rewards.reward import And, CombinedReward, Lowest
from calibrated_rewards.samplers import Reranked
from calibrated_rewards.scorers import FLAMES, FLAMES_TEXT, Dimension, Graded, Mean, Min, find_dimensions, score
from calibrated_rewards.scorers.classifiers import MultiAttribute, SequenceClassifier
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.testing.check_scorer import check_scorer
from calibrated_rewards.testing.suites import HashScorer, NumberSampler

PROMPTS, COMPLETIONS = ["2+2=", "Hi", "Hi"], ["1", "2", "3"]
LEVELS = sum(len(each.levels) for each in FLAMES)


def logits(prompts: Any, completions: Any) -> np.ndarray:
    """Numbers of the pair, one a level."""
    return np.stack([HashScorer(i)(prompts, completions) for i in range(LEVELS)], 1)


class Counting:
    """A classifier that notes how many pairs it reads."""

    def __init__(self) -> None:
        self.read = 0

    def logits(self, prompts: Any, completions: Any) -> np.ndarray:
        """Return what the function `logits` returns, and count the pairs."""
        self.read += len(prompts)
        return logits(prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        """Name the scorer, without the count of pairs: its scores do not depend on that."""
        return {"kind": "counting", "labels": "Label(0)"}


def test_levels_are_expected_values() -> None:
    """Of each dimension by its own logits alone, as torch has it."""
    rows = torch.tensor(logits(PROMPTS, COMPLETIONS), dtype=torch.float64)
    levels, at = Graded(logits, FLAMES).levels(PROMPTS, COMPLETIONS), 0
    for dimension in FLAMES:
        values = torch.tensor(dimension.levels, dtype=torch.float64)
        expected = rows[:, at : at + len(values)].softmax(1) @ values
        at += len(values)
        np.testing.assert_allclose(levels[dimension.name], expected.numpy(), rtol=1e-6)
    assert at == LEVELS


@given(st.lists(st.floats(-30, 30), min_size=LEVELS, max_size=LEVELS))
def test_a_combination_is_between_its_dimensions(row: list[float]) -> None:
    """In [0, 1]: the lowest is no more than the mean; 1 only where every dimension is at its best."""

    def constant(prompts: Any, _: Any) -> Any:
        return np.array([row] * len(prompts))

    lowest, mean = (float(Graded(constant, FLAMES, how)(["x"], ["y"])[0]) for how in (Min(), Mean()))
    assert 0 <= lowest <= mean + 1e-6 <= 1 + 2e-6


def test_each_pair_is_read_once() -> None:
    """By the combination and by all dimensions, in any number of calls; a repeated pair, too."""
    counting = Counting()
    graded = Graded(counting, FLAMES)
    for scorer in (graded, *graded.by_dimension().values()):
        score(scorer, [*PROMPTS, "Hi"], [*COMPLETIONS, "2"])
    assert counting.read == 3
    assert "labels" not in graded.fingerprint()["of"]
    few = Graded(counting, FLAMES, most_kept=2)
    score(few, PROMPTS, COMPLETIONS)
    assert len(few._kept) == 2
    np.testing.assert_array_equal(score(few, PROMPTS, COMPLETIONS), score(graded, PROMPTS, COMPLETIONS))


def test_a_text_and_its_message_are_two() -> None:
    """As the classifier may read them differently."""
    counting = Counting()
    chat = [{"role": "user", "content": "Hi"}]
    Graded(counting, FLAMES)([chat, chat], ["a", [{"role": "assistant", "content": "a"}]])
    assert counting.read == 2


def flames_like() -> Any:
    """A tiny decoder with as many labels as Flames' scorer has levels."""
    return tiny.classifier(num_labels=LEVELS)


def test_a_classifier_with_levels() -> None:
    """As `SequenceClassifier` and, of a model that gives a tensor for each dimension, as `MultiAttribute`."""
    model, words = flames_like(), tiny.tokenizer()
    graded = Graded(SequenceClassifier(model, words), FLAMES)
    one = SequenceClassifier(model, words, labels=Levels((3, 2, 1), first=3))
    np.testing.assert_allclose(
        graded.levels(PROMPTS, COMPLETIONS)["safety"], score(one, PROMPTS, COMPLETIONS), rtol=1e-5
    )
    parts = Graded(MultiAttribute(InParts(model), words, output="parts"), FLAMES)
    for name, levels in parts.levels(PROMPTS, COMPLETIONS).items():
        np.testing.assert_allclose(levels, graded.levels(PROMPTS, COMPLETIONS)[name], rtol=1e-4)


class InParts(nn.Module):
    """A model whose forward gives a tuple: the logits of each dimension."""

    base_model_prefix = "model"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

    def get_input_embeddings(self) -> Any:
        """Return the embeddings of the model inside."""
        return self.inner.get_input_embeddings()

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Its logits, cut by dimensions."""
        return {"parts": tuple(self.inner(**inputs).logits.split([len(each.levels) for each in FLAMES], 1))}


def test_outputs_in_parts_are_joined() -> None:
    """Side by side, whatever their number."""
    parts = [torch.ones(2, 3), torch.zeros(2), torch.full((2, 1), 5.0)]
    with pytest.raises((IndexError, RuntimeError)):
        pick_output({"x": parts}, "x")
    joined = pick_output({"x": [parts[0], parts[2]]}, "x")
    assert joined.tolist() == [[1, 1, 1, 5]] * 2


def test_passes_check_scorer() -> None:
    """All checks of the library's own suite."""
    report = check_scorer(Graded(SequenceClassifier(flames_like(), tiny.tokenizer()), FLAMES, Mean()), sign=False)
    assert report.passed, str(report)


def test_the_text_of_flames() -> None:
    """Prompt, response and the question about them, as plain text."""
    rendered, _ = FLAMES_TEXT.render(tiny.tokenizer(), "Hi", "Hello!")
    assert rendered == "<|User|>:输入: Hi\n回复: Hello!\n以上针对输入的回复为:<eoh>\n<|Bot|>:"


def test_combined_in_calibrated_space(tmp_path: Any) -> None:
    """AND over dimensions of quantiles: log-products; of the lowest; and then calibrated for the worst of N."""
    model, words = tiny.saved(flames_like(), tmp_path / "rm", tiny.tokenizer()), NumberSampler()
    graded = Graded(load_scorer(model, labels=Levels((3, 2, 1))), FLAMES)
    tables = calibrate(PROMPTS[:2], words, graded.by_dimension(), k=12)
    parts = {name: CalibratedReward(each, tables[name]) for name, each in graded.by_dimension().items()}
    both = CombinedReward(parts, And())
    u = np.stack([reward.calibrated(PROMPTS, COMPLETIONS) for reward in parts.values()])
    np.testing.assert_allclose(both(PROMPTS, COMPLETIONS), np.log(np.maximum(u, 1 / 24)).sum(0), rtol=1e-6)
    table = calibrate(PROMPTS[:2], words, both, k=8, seed=1)
    robust = CalibratedReward(both, table, Exponential(-5.0))
    assert all(0 <= value <= 1 for value in robust(PROMPTS, COMPLETIONS))
    chosen = Reranked(words, CombinedReward(parts, Lowest()), WorstOf(4)).choose(PROMPTS[:1], [[1]])[0][0]
    assert chosen.score == min(chosen.scores)

    both.save_pretrained(tmp_path / "reward")
    loaded = CombinedReward.from_pretrained(tmp_path / "reward")
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), both(PROMPTS, COMPLETIONS), rtol=1e-5)
    assert len({id(reward.scorer.graded) for reward in loaded.rewards.values()}) == 1
    again = pickle.loads(pickle.dumps(graded))
    np.testing.assert_allclose(score(again, PROMPTS, COMPLETIONS), score(graded, PROMPTS, COMPLETIONS), rtol=1e-5)
    assert again.fingerprint() == graded.fingerprint()


def test_best_of_n_by_levels() -> None:
    """A graded scorer reranks as any other."""
    graded = Graded(logits, FLAMES)
    choice = Reranked(NumberSampler(), graded, BestOf(5)).choose(["x"], [[2]])[0][0]
    assert choice.score == max(choice.scores)


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6), st.integers(0, 3))
def test_levels_read_a_part_of_the_logits(row: list[float], first: int) -> None:
    """As the expected value of that part alone."""
    rows = np.array([row], np.float32)
    assert Levels((1, 2, 4), first)(rows) == Expected((1, 2, 4))(rows[:, first : first + 3])


def test_the_direction_of_a_dimension_is_that_of_its_own_labels() -> None:
    """Other dimensions of the same model say nothing of it: 3 for legal is no better than 3 for safe, and no worse."""
    names = ["safety 3", "safety 2", "safety 1", "legality 3", "legality 1", "safe", "unsafe"]
    config = PretrainedConfig(id2label=dict(enumerate(names)))
    for labels in (Levels((3, 2, 1)), Levels((3, 1), first=3), Levels((3, 1), first=5)):
        assert resolve_labels(labels, config) == labels
    with pytest.raises(ValueError, match="gives 'unsafe' a higher score than 'safe'"):
        resolve_labels(Levels((1, 3), first=5), config)
    with pytest.raises(ValueError, match="already gives 'safe' a higher score than 'unsafe'"):
        resolve_labels(Levels((3, 1), first=5), config, cost=True)


def test_what_is_refused() -> None:
    """Logits of another number, levels without a difference, names twice, labels that name no dimension."""
    with pytest.raises(ValueError, match=r"fairness \(3\), .* have 13 levels, .* shape \(3, 2\)"):
        Graded(lambda p, _: np.zeros((len(p), 2)), FLAMES)(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="two levels or more"):
        Dimension("safety", (1, 1))
    with pytest.raises(ValueError, match="a name of its own"):
        Graded(logits, [FLAMES[0], FLAMES[0]])
    with pytest.raises(ValueError, match="reads the logits 2 to 4, the model has 3"):
        Levels((1, 2, 3), 2)(np.zeros((1, 3), np.float32))
    for names in (["safe", "unsafe"], ["LABEL_0", "LABEL_1"], ["a 1", "b 1", "a 2"], ["1", "2"]):
        with pytest.raises(ValueError, match="dimensions are read off labels"):
            find_dimensions(dict(enumerate(names)))
