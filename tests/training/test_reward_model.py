"""Pairs to distil: the loss that they make, minimised by scipy, is least at the logits of the calibrated reward."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.special import log_expit, logit

from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.training.offline.reward_model import (
    CENTER,
    MarginPairs,
    calibrated_logits,
    distil,
    distillation_pairs,
)


def rollouts(scores: dict[str, list[float]]) -> tuple[ReferenceTable, list[str], list[str], list[float]]:
    """A table, and what it is made of: the completions of a prompt are numbered."""
    prompts = [prompt for prompt, own in scores.items() for _ in own]
    completions = [f"{prompt}{i}" for prompt, own in scores.items() for i in range(len(own))]
    return ReferenceTable.build(scores.items()), prompts, completions, [r for own in scores.values() for r in own]


def minimiser(pairs: MarginPairs, coefficient: float) -> dict[str, float]:
    """A free reward for each completion, at which TRL's loss (written anew) is least."""
    names = sorted({*map(str, pairs["chosen"] + pairs["rejected"])})
    chosen, rejected = (np.array([names.index(str(text)) for text in pairs[side]]) for side in ("chosen", "rejected"))
    margin = np.array(pairs["margin"])

    def loss(r: np.ndarray) -> float:
        gap, total = r[chosen] - r[rejected], r[chosen] + r[rejected]
        return float(-log_expit(gap - margin).mean() + coefficient * (total**2).mean())

    found = minimize(loss, np.random.default_rng(0).normal(size=len(names)), method="BFGS", options={"gtol": 1e-9})
    return dict(zip(names, found.x, strict=True))


SCORES = {"easy ": [7.0, 9.0, 8.0, 8.5, 7.5, 6.0], "hard ": [-1.0, -3.0, -2.0, 4.0]}


@pytest.mark.parametrize("coefficient", [0.01, CENTER, 1.0])
def test_the_optimum_is_the_logit(coefficient: float) -> None:
    """Of every completion of both prompts, and whatever the coefficient: nothing is left to a constant."""
    table, prompts, completions, scores = rollouts(SCORES)
    found = minimiser(distillation_pairs(table, prompts, completions, scores), coefficient)
    for prompt, own in SCORES.items():
        # Eq. 12 by hand: no ties, so the j-th of K has (j - 1/2) / K.
        u = (np.argsort(np.argsort(own)) + 0.5) / len(own)
        np.testing.assert_allclose([found[f"{prompt}{i}"] for i in range(len(own))], logit(u), atol=1e-4)


def test_without_centring_differences_are_the_logits() -> None:
    """A pair's difference is what the loss knows; their sum stays wherever the search began."""
    table, prompts, completions, scores = rollouts(SCORES)
    found = minimiser(distillation_pairs(table, prompts, completions, scores), 0.0)
    assert found["hard 3"] - found["hard 1"] == pytest.approx(2 * logit(7 / 8), abs=1e-4)
    assert abs(found["hard 3"] + found["hard 1"]) > 0.01


def test_hard_labels_have_no_optimum_there() -> None:
    """The reason for both orders: with the better one always chosen, the loss falls for ever."""
    table, prompts, completions, scores = rollouts(SCORES)
    pairs = distillation_pairs(table, prompts, completions, scores)
    one_way: Any = {name: column[::2] for name, column in pairs.items()}
    found = minimiser(one_way, CENTER)
    assert found["hard 3"] - found["hard 1"] > 2 * logit(7 / 8) + 3


def test_near_the_optimum_it_is_regression() -> None:
    """With the coefficient 1/8 a pair costs log 4 + (x^2 + y^2) / 2, x and y its errors."""
    m, x, y = 1.7, 0.01, -0.02
    chosen, rejected = m / 2 + x, -m / 2 + y
    both = -log_expit(chosen - rejected - m) - log_expit(rejected - chosen + m)
    assert both + 2 * CENTER * (chosen + rejected) ** 2 == pytest.approx(np.log(4) + (x**2 + y**2) / 2, abs=1e-7)


@given(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=9), st.integers(1, 6), st.integers(0, 9))
@settings(max_examples=40)
def test_pairs_are_mirrored(own: list[float], most: int, seed: int) -> None:
    """Each completion is in one pair at most, in both orders, the best with the worst; margins are logits' gaps."""
    table, prompts, completions, scores = rollouts({"p": own})
    targets = dict(zip(completions, calibrated_logits(table, [0] * len(own), scores), strict=True))
    pairs = distillation_pairs(table, prompts, completions, scores, most=most, seed=seed)
    assert len(pairs["prompt"]) == 2 * min(most, len(own) // 2)
    forth, back = ([*zip(pairs[a], pairs[b], strict=True)] for a, b in (("chosen", "rejected"), ("rejected", "chosen")))
    assert forth[::2] == back[1::2]
    assert len({text for pair in forth[::2] for text in pair}) == 2 * len(forth[::2])
    margins = [targets[str(chosen)] - targets[str(rejected)] for chosen, rejected in forth]
    np.testing.assert_allclose(pairs["margin"], margins)
    assert all(margin >= 0 for margin in pairs["margin"][::2])
    ranks = [*map(sorted(targets.values()).index, (targets[str(chosen)] for chosen, _ in forth[::2]))]
    assert ranks == sorted(ranks, reverse=True)


def test_scores_beyond_the_references() -> None:
    """The logit of a completion above all references is that of half a reference short of 1."""
    table = ReferenceTable.build([("p", [0.0, 1.0, 2.0, 3.0])])
    pairs = distillation_pairs(table, ["p", "p"], ["top", "bottom"], [9.0, -9.0])
    assert pairs["margin"] == pytest.approx([2 * logit(7 / 8), -2 * logit(7 / 8)])


def test_chats_are_chats() -> None:
    """Where the prompt is messages the completions are, as the trainer's template wants them."""
    chat = [{"role": "user", "content": "Hi"}]
    table = ReferenceTable.build([(chat, [0.0, 1.0])])
    pairs = distillation_pairs(table, [chat, chat], ["a", [{"role": "assistant", "content": "b"}]], [0.0, 1.0])
    assert pairs["chosen"] == [[{"role": "assistant", "content": text}] for text in "ba"]
    assert pairs["prompt"] == [chat, chat]


def test_bad_rollouts_are_refused() -> None:
    """Columns of different lengths, prompts that the table lacks, no pairs at all."""
    table, prompts, completions, scores = rollouts(SCORES)
    with pytest.raises(ValueError, match=r"a prompt, a completion and a score, got 10, 9 and 10"):
        distillation_pairs(table, prompts, completions[1:], scores)
    with pytest.raises(UnknownPromptError, match="no references for 'new'"):
        distillation_pairs(table, ["new"], ["x"], [0.0])
    with pytest.raises(ValueError, match="needs most >= 1, got most=0"):
        distillation_pairs(table, prompts, completions, scores, most=0)


# TRL sets an argument that its transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_reward_model_learns_the_logit(tmp_path: Path) -> None:
    """Some steps of TRL's own trainer bring a tiny model's scores near logit u, though raw scores are far apart."""
    rng = np.random.default_rng(0)
    own = {prompt: ["".join(rng.choice(list("xyz"), 4)) for _ in range(12)] for prompt in ("aa", "bb", "cc", "dd")}
    raw = {p: [30 * i + c.count("x") - c.count("y") + 0.01 * rng.normal() for c in own[p]] for i, p in enumerate(own)}
    table, prompts, _, scores = rollouts(raw)
    completions = [completion for each in own.values() for completion in each]
    pairs = distillation_pairs(table, prompts, completions, scores)
    model, tokenizer = tiny.classifier(), tiny.tokenizer()
    reward = SequenceClassifier(model, tokenizer, text=Text(append_eos=True), show_progress=False)
    targets = calibrated_logits(table, table.rows(prompts), scores)
    before = np.corrcoef(reward(prompts, completions), targets)[0, 1]
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    speed = {"max_steps": 70, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    distil(model, tokenizer, pairs, str(tmp_path), **quiet, **speed, use_cpu=True, bf16=False, seed=0)
    found = reward(prompts, completions)
    assert before < 0.5
    assert np.corrcoef(found, targets)[0, 1] > 0.85
    assert np.abs(found - targets).mean() < 0.6 * np.abs(targets).mean()
