"""Rows of a dataset: weights against sums by hand, draws and pairs against their laws, and what is left out."""

from collections import Counter
from math import comb, exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_runs import chat, save_run
from scipy.stats import chisquare

from calibrated_rewards import CalibratedReward, Exponential
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.training.offline.datasets import (
    CUT,
    EMPTY,
    LIGHT,
    NO_RESOLUTION,
    TIED,
    TOO_FEW,
    Row,
    Selection,
    resample,
)
from calibrated_rewards.training.offline.rollouts import PromptRollouts, iterate_rollouts

# Ragged K, ties at the top, at the bottom and in between.
SCORES = {"a": [1.0, 3.0, 2.0, 3.0, 2.0], "b": [0.5, -1.0, 4.0], "c": [1.0, 1.0, 2.0, 0.0, 0.0, 5.0, 2.0]}
T, BETA = 5.0, 0.2


def make_prompt(scores: Any, key: bytes = b"k" * 16, completions: Any = None, beta: float = BETA) -> PromptRollouts:
    """A prompt whose rewards are its quantiles."""
    values = np.array(scores, np.float32)
    u = np.array([sum(values < each) + sum(values == each) / 2 for each in values]) / len(values)
    texts = completions or [f"{i}" for i in range(len(values))]
    rollouts = [each if isinstance(each, Rollout) else Rollout(each, 1, "stop") for each in texts]
    return PromptRollouts(key, "p", rollouts, values, u, u, beta)


def rows_of(selection: Selection, prompt: PromptRollouts) -> tuple[list[Row], Counter[str]]:
    """The rows of one prompt, and what is in none."""
    left_out = Counter[str]()
    rows = selection.rows(prompt, left_out)
    return rows, +left_out


def enumerate_weights(scores: list[float]) -> tuple[list[float], list[float], float]:
    """Quantiles, weights and partition by sums: Eq. 12 among the others, e^{tu} onto [0, 1], e^{Phi / beta}."""
    others = [scores[:i] + scores[i + 1 :] for i in range(len(scores))]
    pairs = zip(scores, others, strict=True)
    u = [(sum(b < a for b in own) + sum(b == a for b in own) / 2) / len(own) for a, own in pairs]
    phi = [(exp(T * each) - 1) / (exp(T) - 1) for each in u]
    factors = [exp(each / BETA) for each in phi]
    return u, [each / sum(factors) for each in factors], sum(factors) / len(scores)


@pytest.mark.parametrize("kind", ["scored", "weighted"])
def test_weights_are_those_of_the_optimum(kind: Any, tmp_path: Path) -> None:
    """With ties and ragged K: the sums by hand, which add up to 1 for each prompt."""
    table = save_run(tmp_path, [(p, [f"{p}{i}" for i in range(len(s))], s) for p, s in SCORES.items()])
    reward = CalibratedReward(None, table, Exponential(T), beta=BETA)
    for prompt in iterate_rollouts(tmp_path, reward):
        rows, left_out = rows_of(Selection(kind, floor=0.0), prompt)
        u, weights, z = enumerate_weights(SCORES[str(prompt.prompt)])
        assert not left_out
        assert [row["completion"] for row in rows] == [f"{prompt.prompt}{i}" for i in range(len(u))]
        assert sum(row["weight"] for row in rows) == pytest.approx(1, abs=1e-12)
        assert [row["weight"] for row in rows] == pytest.approx(weights, rel=1e-9)
        if kind == "weighted":
            continue
        assert [row["raw"] for row in rows] == SCORES[str(prompt.prompt)]
        assert [row["u"] for row in rows] == pytest.approx(u)
        assert [exp(row["log_z"]) for row in rows] == pytest.approx([z] * len(u))
        assert [exp(row["log_ratio"]) for row in rows] == pytest.approx([len(u) * w for w in weights])
        assert [row["reward"] / BETA - row["log_z"] - row["log_ratio"] for row in rows] == pytest.approx([0.0] * len(u))
        assert {(row["tokens"], row["logprob"], row["key"]) for row in rows} == {
            (1, -1.5, prompt_key(prompt.prompt).hex())
        }


def test_draws_follow_the_weights() -> None:
    """One draw a prompt over 4,000 prompts, by a chi-square test; and of many, each comes as often as it can."""
    scores = [0.0, 1.0, 2.0, 2.0, 3.0]
    weights = make_prompt(scores).weights
    seen = Counter(
        row["completion"]
        for i in range(4000)
        for row in rows_of(Selection("sft", draws=1), make_prompt(scores, i.to_bytes(16, "big")))[0]
    )
    counts = [seen[str(i)] for i in range(len(scores))]
    assert chisquare(counts, 4000 * weights).pvalue > 1e-3
    drawn = Counter(row["completion"] for row in rows_of(Selection("sft", draws=50), make_prompt(scores))[0])
    assert sum(drawn.values()) == 50
    assert all(abs(drawn[str(i)] - 50 * weight) < 1 for i, weight in enumerate(weights))


def test_no_weight_is_no_draw() -> None:
    """At either end and in the middle, from the first to the last point that a generator gives."""
    weights = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    for start in (0.0, 0.5, float(np.nextafter(1, 0))):
        for draws in (1, 3, 1_000_001):
            assert {*resample(weights, draws, start).tolist()} <= {1, 3}


def test_weights_that_round_to_0_beside_one_that_is_left_out_are_drawn_by() -> None:
    """The best rollout is empty and has all the weight: of the others the best comes, at a beta of 1e-6."""
    prompt = make_prompt([0.0, 1.0, 2.0, 3.0], completions=["0", "1", "2", ""], beta=1e-6)
    assert prompt.weights[:3].sum() == 0
    assert [row["completion"] for row in rows_of(Selection("sft", draws=3), prompt)[0]] == ["2"] * 3


@pytest.mark.parametrize("n", [2, 3])
def test_pairs_are_best_and_worst_of_n(n: int) -> None:
    """The i-th of K by score is the best of a random set of n with chance C(i - 1, n - 1) / C(K, n)."""
    scores = [3.0, 0.0, 4.0, 1.0, 2.0, 5.0]
    best, worst, margins = Counter[float](), Counter[float](), set[float]()
    for i in range(3000):
        rows, _ = rows_of(Selection("pairs", of=n, draws=1), make_prompt(scores, i.to_bytes(16, "big")))
        best[rows[0]["score_chosen"]] += 1
        worst[rows[0]["score_rejected"]] += 1
        margins.add(round(rows[0]["margin"] - (rows[0]["score_chosen"] - rows[0]["score_rejected"]) / 6, 12))
    law = np.array([comb(i, n - 1) / comb(6, n) for i in range(6)])
    for counts, expected in ((best, law), (worst, law[::-1])):
        held = expected > 0
        assert {score for score, count in counts.items() if count} <= {float(i) for i in np.flatnonzero(held)}
        assert chisquare([counts[float(i)] for i in np.flatnonzero(held)], 3000 * expected[held]).pvalue > 1e-3
    assert margins == {0.0}  # quantiles of six scores without ties are a sixth apart


def test_sets_of_n_are_disjoint() -> None:
    """All K // n of them, no rollout twice; of all rollouts the best and the worst."""
    scores = list(range(11))
    rows, left_out = rows_of(Selection("pairs", of=4), make_prompt(scores))
    used = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert (len(rows), len({*used}), left_out) == (2, 4, Counter())
    (row,), _ = rows_of(Selection("pairs"), make_prompt(scores))
    assert (row["chosen"], row["rejected"], row["score_chosen"], row["score_rejected"]) == ("10", "0", 10.0, 0.0)
    assert row["margin"] == pytest.approx(10 / 11)


def test_ties_are_left_out_or_the_first_counts() -> None:
    """A prompt of one reward has no row but as it is; of several at the top the first drawn; a tied pair is none."""
    for kind in ("sft", "pairs", "weighted"):
        assert rows_of(Selection(kind), make_prompt([2.0, 2.0, 2.0])) == ([], {NO_RESOLUTION: 1})
        assert rows_of(Selection(kind), make_prompt([2.0])) == ([], {NO_RESOLUTION: 1})
    assert len(rows_of(Selection("scored"), make_prompt([2.0, 2.0, 2.0]))[0]) == 3
    (row,), _ = rows_of(Selection("scored"), make_prompt([2.0]))
    assert (row["u"], row["weight"], row["log_ratio"]) == (0.5, 1.0, 0.0)
    assert rows_of(Selection("sft"), make_prompt([0.0, 3.0, 3.0]))[0][0]["completion"] == "1"
    found = [rows_of(Selection("pairs", of=2), make_prompt([0.0, 0.0, 1.0, 1.0], bytes([i] * 16))) for i in range(9)]
    assert {len(rows) + left_out[TIED] for rows, left_out in found} == {2}
    assert any(left_out[TIED] for _, left_out in found)
    assert all(row["margin"] == 0.5 for rows, _ in found for row in rows)
    assert rows_of(Selection("pairs", of=5), make_prompt([0.0, 1.0, 2.0])) == ([], {TOO_FEW: 1})


def test_what_a_trainer_cannot_use_is_left_out() -> None:
    """Empty completions, those that the limit cut if it is asked for, and weights under the floor; each counted."""
    texts = [Rollout("", 0, "length"), Rollout("long", 9, "length"), Rollout("b", 1, "stop"), Rollout("a", 1, "stop")]
    prompt = make_prompt([3.0, 2.0, 1.0, 0.0], completions=texts)
    assert rows_of(Selection("sft"), prompt) == (
        [{"prompt": "p", "completion": "long", "score": 2.0, "u": 0.625}],
        {EMPTY: 1},
    )
    (row,), left_out = rows_of(Selection("pairs", finished_only=True), prompt)
    assert (row["chosen"], row["rejected"], left_out) == ("b", "a", {EMPTY: 1, CUT: 1})
    heavy, left_out = rows_of(Selection("weighted", floor=0.1), prompt)
    assert {row["weight"] for row in heavy} == {w for w in prompt.weights[1:] if w >= 0.1}
    assert left_out == {EMPTY: 1, LIGHT: 3 - len(heavy)}
    assert len(heavy) < 3
    assert [row["completion"] for row in rows_of(Selection("scored"), prompt)[0]] == ["", "long", "b", "a"]


def test_a_chat_is_completed_by_messages(tmp_path: Path) -> None:
    """A text becomes the assistant's message; messages after a text are refused; a tool call is not empty."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
    table = save_run(tmp_path, [(chat("Hi"), ["ho", [call], []], [0.0, 2.0, 3.0])])
    (prompt,) = iterate_rollouts(tmp_path, CalibratedReward(None, table, beta=1.0))
    (row,), left_out = rows_of(Selection("pairs"), prompt)
    assert (row["prompt"], row["chosen"], left_out) == (chat("Hi"), [call], {EMPTY: 1})
    assert row["rejected"] == [{"role": "assistant", "content": "ho"}]
    with pytest.raises(ValueError, match="a text is completed by a text"):
        rows_of(Selection("sft"), make_prompt([0.0, 1.0], completions=[Rollout([call]), Rollout([call])]))


def test_rows_depend_on_seed_and_key_alone() -> None:
    """The same again, others for another seed or key."""
    scores = [float(i) for i in range(40)]
    for selection in (Selection("sft", draws=3), Selection("pairs", of=4)):
        other = Selection(selection.kind, selection.draws, selection.of, seed=1)
        first = rows_of(selection, make_prompt(scores, beta=10.0))
        assert first == rows_of(selection, make_prompt(scores, beta=10.0))
        assert first != rows_of(other, make_prompt(scores, beta=10.0))
        assert first != rows_of(selection, make_prompt(scores, b"l" * 16, beta=10.0))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kind": "sft", "draws": 0}, "draws=0"),
        ({"kind": "scored", "draws": 2}, "sft or pairs"),
        ({"kind": "pairs", "of": 1}, "of=1"),
        ({"kind": "sft", "of": 2}, "pairs"),
        ({"kind": "weighted", "floor": 1.0}, "floor=1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], rule: str) -> None:
    """By name, with the value."""
    with pytest.raises(ValueError, match=rule):
        Selection(**settings)
