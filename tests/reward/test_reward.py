"""CalibratedReward: the same reward on every path, and the numbers that the paper's equations give."""

import asyncio
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import jaxtyping
import numpy as np
import pytest
import tiny
import torch
from hub import COMMIT, serving
from hypothesis import given, strategies as st
from scipy import stats

from calibrated_rewards import (
    BestOf,
    CalibratedReward,
    EmpiricalCDF,
    Exponential,
    Identity,
    Log,
    ReferenceTable,
    UnknownPromptError,
    id_key,
    optimum,
    prompt_key,
    scaled,
)
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.on_demand import OnTheSpot
from calibrated_rewards.reward.batching import ascore, ascore_one, score_one
from calibrated_rewards.reward.calibrators import SmoothedCDF, Uncalibrated, ZScore
from calibrated_rewards.reward.find_prompts import LONGEST_BEGINNING, RunPrompts, suggest_fix
from calibrated_rewards.reward.monitoring import compute_metrics
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.theory import finite_k

PROMPTS = [f"prompt {i}" for i in range(6)]
# That of a beta, for every test run solves for it: at a KL it would be solved for ten times.
TRANSFORMS = [Identity(), Log(), Exponential(10.0), Exponential(-10.0), optimum(BestOf(4), beta=0.083).transform]


def references(ties: bool = True) -> dict[str, np.ndarray]:
    """Of each prompt another number of references, half of them on a grid, so that there are ties."""
    rng = np.random.default_rng(0)
    scores = {prompt: rng.normal(size=3 + 4 * i) for i, prompt in enumerate(PROMPTS)}
    return {prompt: own.round(1) if ties and i % 2 else own for i, (prompt, own) in enumerate(scores.items())}


def reward_of(transform: Any = Identity(), **settings: Any) -> CalibratedReward:  # noqa: B008 (frozen)
    return CalibratedReward(NumberScorer(), ReferenceTable.build(references().items()), transform, **settings)


def asked(n: int = 60, seed: int = 1) -> tuple[list[str], list[str], np.ndarray]:
    """Prompts, completions that are numbers, and the numbers."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=n).round(1).astype(np.float32)
    return [PROMPTS[i] for i in rng.integers(len(PROMPTS), size=n)], [f"{x:.1f}" for x in raw], raw


def by_hand(prompts: Sequence[str], raw: np.ndarray) -> np.ndarray:
    """Eq. 12 by scipy: percentileofscore's "mean" counts ties half."""
    kept = {prompt: own.astype(np.float32) for prompt, own in references().items()}
    pairs = zip(prompts, raw, strict=True)
    return np.array([stats.percentileofscore(kept[p], x, kind="mean") / 100 for p, x in pairs])


def test_the_default_reward_is_equation_12() -> None:
    """(below + equal / 2) / K, as scipy's percentile with ties half, to the last bits of a float64."""
    prompts, completions, raw = asked()

    np.testing.assert_allclose(reward_of()(prompts, completions), by_hand(prompts, raw), rtol=0, atol=1e-15)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("estimator", ["empirical", "posterior", "unbiased", "randomised"])
def test_a_reward_is_the_value_of_its_rank(transform: Any, estimator: Any) -> None:
    """The vector of 2K + 1 values of finite_k, at twice the number below plus that of the equal, counted by hand."""
    prompts, completions, raw = asked()
    reward = reward_of(transform, estimator=estimator)
    kept = {prompt: own.astype(np.float32) for prompt, own in references().items()}

    expected = []
    for prompt, x in zip(prompts, raw, strict=True):
        own = kept[prompt]
        vector = finite_k.values(scaled(transform, "unit"), len(own), estimator)
        expected.append(vector[2 * (own < x).sum() + (own == x).sum()])

    np.testing.assert_allclose(reward(prompts, completions), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_every_way_of_asking_gives_the_same(transform: Any) -> None:
    """Called, scored, one by one, asynchronously, from scores, of texts in one: one list of numbers."""
    prompts, completions, raw = asked()
    reward = reward_of(transform)
    expected = reward(prompts, completions)

    async def alone() -> list[Any]:
        pairs = zip(prompts, completions, strict=True)
        return list(await asyncio.gather(*(ascore_one(reward, *pair) for pair in pairs)))

    assert reward.score(prompts, completions).reward == expected
    assert [score_one(reward, p, c).reward for p, c in zip(prompts, completions, strict=True)] == expected
    assert [score.reward for score in asyncio.run(alone())] == expected
    assert asyncio.run(ascore(reward, prompts, completions)).reward == expected
    assert reward.from_scores(prompts, raw).tolist() == expected
    assert reward.from_scores(reward.rows(prompts), raw).tolist() == expected
    glued = [f"{p} {c}" for p, c in zip(prompts, completions, strict=True)]
    assert reward.score_texts(glued).reward == expected


def test_scores_carry_what_was_found() -> None:
    """Raw scores, quantiles and rewards of the same pairs; one of them is a Score."""
    prompts, completions, raw = asked()
    scores = reward_of(Log()).score(prompts, completions)

    np.testing.assert_array_equal(scores.raw, raw)
    np.testing.assert_allclose(scores.u, by_hand(prompts, raw), atol=1e-15)
    np.testing.assert_array_equal(reward_of(Log()).calibrated(prompts, completions), scores.u)
    assert scores.known.all()
    assert (scores[3].reward, scores[3].raw, scores[3].u) == (scores.reward[3], float(raw[3]), float(scores.u[3]))
    assert len(scores) == len([*scores]) == 60


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.lists(st.floats(-6, 6, width=32), min_size=2))
def test_rewards_rise_with_raw_scores_and_are_finite(own: list[float], raw: list[float]) -> None:
    """For whatever references: finite, and in the order of the scores."""
    table = ReferenceTable.build([("p", own)])
    for transform in TRANSFORMS[:4]:
        values = CalibratedReward(None, table, transform).from_scores(["p"], np.sort([raw]))
        assert np.isfinite(values).all()
        assert (np.diff(values[0]) >= 0).all()


def test_tensors_give_tensors() -> None:
    """float32 and bfloat16 give float32, float64 float64; (P, G) keeps its shape; gradients stay out."""
    prompts, _, raw = asked()
    reward = reward_of(Exponential(10.0))
    expected = reward.from_scores(prompts, raw)

    for dtype, given_back in ((torch.float32, torch.float32), (torch.float64, torch.float64)):
        found = reward.from_scores(prompts, torch.tensor(raw, dtype=dtype, requires_grad=True))
        assert found.dtype == given_back
        assert not found.requires_grad
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    table = torch.tensor(raw[:60]).reshape(6, 10)
    rows = torch.from_numpy(reward.rows(PROMPTS))
    found = reward.from_scores(rows, table)
    np.testing.assert_allclose(found.numpy(), reward.from_scores(PROMPTS, table.numpy()), rtol=1e-6)
    assert found.shape == (6, 10)
    halves = torch.tensor([0.5, 1.5], dtype=torch.bfloat16)
    np.testing.assert_allclose(
        reward.from_scores(PROMPTS[:2], halves).numpy(), reward.from_scores(PROMPTS[:2], np.array([0.5, 1.5])), 1e-6
    )


def test_scores_without_a_prompt_are_refused() -> None:
    """A shape that does not begin with the number of prompts, and scores that are no numbers."""
    reward = reward_of()
    with pytest.raises(ValueError, match=r"got \(3,\) for P = 2 prompts"):
        reward.from_scores(PROMPTS[:2], np.zeros(3))
    with pytest.raises(ValueError, match=r"reshape\(3, 4\)"):
        reward.from_scores(PROMPTS[:3], torch.zeros(12))
    with pytest.raises(ValueError, match=r"got \(\) for"):
        reward.from_scores(PROMPTS[:1], 3.0)
    with pytest.raises(TypeError, match="without a mask"):
        reward.from_scores(PROMPTS[:1], np.ma.array([1.0], mask=[True]))
    with pytest.raises(TypeError, match="got rows and ids"):
        reward.from_scores(np.array([0]), [1.0], ids=["a"])
    with pytest.raises(ValueError, match="finite, got nan"):
        reward_of(on_missing="neutral").from_scores(["stranger"], np.array([np.nan]))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            reward.from_scores(PROMPTS[:2], np.array([0.0, bad]))
        with pytest.raises(ValueError, match="finite"):
            reward.from_scores(PROMPTS[:2], torch.tensor([0.0, bad]))


def test_unknown_prompts_are_loud_unless_something_else_is_said() -> None:
    """By default an error that names the prompt; "neutral" is the mean under the reference; "skip" is None."""
    prompts, completions = ["prompt 1", "stranger"], ["0.3", "0.3"]
    with pytest.raises(UnknownPromptError, match="stranger"):
        reward_of()(prompts, completions)
    with pytest.raises(UnknownPromptError, match="stranger"):
        reward_of().from_scores(prompts, np.zeros(2))

    neutral = reward_of(Exponential(5.0), on_missing="neutral")
    u = (np.arange(100_000) + 0.5) / 100_000
    mean = float(np.mean(scaled(Exponential(5.0), "unit")(u)))
    assert neutral(prompts, completions)[1] == pytest.approx(mean, rel=1e-6)
    assert neutral.from_scores(prompts, np.zeros(2))[1] == pytest.approx(mean, rel=1e-6)
    assert neutral.score(prompts, completions).known.tolist() == [True, False]

    skipping = reward_of(on_missing="skip")
    found = skipping(prompts, completions)
    assert found[1] is None
    assert found[0] == reward_of()(prompts[:1], completions[:1])[0]
    with pytest.raises(ValueError, match="no number"):
        skipping.from_scores(prompts, np.zeros(2))


def test_a_prompt_is_calibrated_when_it_comes() -> None:
    """With OnTheSpot a stranger gets what calibrate() would have given it."""
    everyone = calibrate([*PROMPTS, "stranger"], NumberSampler(), NumberScorer(), k=8)
    known = calibrate(PROMPTS, NumberSampler(), NumberScorer(), k=8)
    spot = OnTheSpot(known, NumberSampler(), NumberScorer())
    reward = CalibratedReward(NumberScorer(), known, Log(), on_missing=spot)
    prompts, completions = ["stranger", "prompt 1", "stranger"], ["0.1", "0.2", "-0.4"]

    assert reward(prompts, completions) == CalibratedReward(NumberScorer(), everyone, Log())(prompts, completions)
    assert reward.from_scores(prompts, np.array([0.1, 0.2, -0.4])).tolist() == reward(prompts, completions)
    with pytest.raises(ValueError, match="prompts, not rows"):
        reward.from_scores(np.array([-1, 0]), np.zeros(2))


def test_prompts_are_found_by_id() -> None:
    """Where the trainer passes the id column; a missing column is an error that says what came."""
    table = ReferenceTable.build([(p, own, [id_key(i)]) for i, (p, own) in enumerate(references().items())])
    by_id = ReferenceTable.build([(id_key(i), own) for i, own in enumerate(references().values())])
    expected = reward_of()(PROMPTS, ["0.3"] * 6)

    assert CalibratedReward(NumberScorer(), table, id_column="uid")(PROMPTS, ["0.3"] * 6, uid=[*range(6)]) == expected
    only = CalibratedReward(NumberScorer(), by_id, id_column="uid")
    assert only(["in other words"] * 6, ["0.3"] * 6, uid=[*range(6)]) == expected
    with pytest.raises(ValueError, match=r"'uid', the trainer passed \['other'\]"):
        only(PROMPTS, ["0.3"] * 6, other=[1] * 6)


CHAT = [{"role": "user", "content": "Hi"}]


def letters(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Scores a chat by its first letter."""
    return [float(ord(prompt[0]["content"][0])) for prompt, _ in zip(prompts, completions, strict=True)]


def reads(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Scores a prompt by its form, to see what a reward model is given."""
    return [float(not isinstance(prompt, str)) for prompt, _ in zip(prompts, completions, strict=True)]


def test_the_reward_model_reads_what_was_calibrated(tmp_path: Path) -> None:
    """A rendered prompt is scored as the messages that it was made of, and is an error where they are not known."""
    table = ReferenceTable.build([(CHAT, [0.0, 0.5, 1.0], ["<user>Hi</user>", id_key("a")])])
    lost = CalibratedReward(reads, table)
    with pytest.raises(UnknownPromptError, match="an alias of a prompt"):
        lost(["<user>Hi</user>"], ["Hello"])
    with pytest.raises(UnknownPromptError, match="an alias of a prompt"):
        lost.score(["Hi there"], ["Hello"], ids=["a"])
    assert lost([CHAT], ["Hello"]) == lost.score([CHAT], ["Hello"], ids=["a"]).reward == [5 / 6]

    from calibrated_rewards.reward.find_prompts import Originals

    found = CalibratedReward(reads, table, originals=Originals.write(tmp_path / "prompts.jsonl", table, [CHAT]))
    assert found(["<user>Hi</user>"], ["Hello"]) == [5 / 6]
    assert found.score(["Hi there"], ["Hello"], ids=["a"]).reward == [5 / 6]
    assert found.score([None], ["Hello"], ids=["a"]).reward == [5 / 6]
    with pytest.raises(UnknownPromptError, match="prompt 0 is None, and the table does not have its id 'b'"):
        found.score([None, CHAT], ["Hello", "Hello"], ids=["b", "a"])
    with pytest.raises(UnknownPromptError, match="an alias of a prompt"):
        CalibratedReward(reads, ReferenceTable.build([(id_key("a"), [0.0])])).score([None], ["Hello"], ids=["a"])
    assert found.score_texts(["<user>Hi</user>Hello"]).reward == [5 / 6]


def test_prompts_of_another_table_are_not_read(tmp_path: Path) -> None:
    """The file goes by rows: with a table of other rows it is an error, never somebody else's prompt."""
    from calibrated_rewards.reward.find_prompts import Originals

    chats = [[{"role": "user", "content": text}] for text in "abcd"]
    rows = [(chat, [0.0, 1.0], [f"<user>{text}"]) for chat, text in zip(chats, "abcd", strict=True)]
    originals = Originals.write(tmp_path / "prompts.jsonl", ReferenceTable.build(rows), chats)
    refused = 0
    for few in (rows[:2], rows[1:], rows[2:], rows[::2], [*rows, (CHAT, [0.0], ["<user>Hi"])]):
        reward = CalibratedReward(letters, ReferenceTable.build(few), originals=originals)
        try:
            read = reward.score([row[2][0] for row in few], ["x"] * len(few)).raw
        except ValueError as error:
            assert "another table" in str(error)  # noqa: PT017 (where rows happen to agree there is none)
            refused += 1
        else:
            assert read.tolist() == [ord(row[0][0]["content"]) for row in few]
    assert refused >= 3


def test_an_id_of_another_prompt_is_seen() -> None:
    """A column of ids in another order than the prompts would spoil a whole run."""
    table = ReferenceTable.build([(p, own, [id_key(i)]) for i, (p, own) in enumerate(references().items())])
    reward = CalibratedReward(NumberScorer(), table)
    with pytest.raises(UnknownPromptError, match=r"two prompts of the table, for 2 of 6: the first is number 1"):
        reward.score(PROMPTS, ["0.3"] * 6, ids=[0, 2, 1, 3, 4, 5])
    with pytest.raises(UnknownPromptError, match="two prompts of the table"):
        reward.from_scores(PROMPTS, np.zeros(6), ids=[5, 1, 2, 3, 4, 5])
    assert reward.score(PROMPTS, ["0.3"] * 6, ids=[0, None, 2, "new", 4, 5]).known.all()


def test_a_chat_is_not_taken_for_the_text_of_its_id() -> None:
    """The policy reads a chat otherwise than the text that was calibrated."""
    table = ReferenceTable.build([("Hi", [0.0, 1.0], [id_key("a")])])
    reward = CalibratedReward(reads, table, originals=None)
    with pytest.raises(UnknownPromptError, match="an alias"):
        reward.score([CHAT], ["Hello"], ids=["a"])


def test_an_unknown_id_is_named() -> None:
    """A prompt that is None has no other name than its id: the error has it, and its key, wherever it stands."""
    reward = CalibratedReward(reads, ReferenceTable.build([("Hi", [0.0, 1.0])]))
    for prompts, ids in ([None], ["b"]), (["Hi", None], [None, "b"]):
        with pytest.raises(UnknownPromptError, match=rf"no references for the id 'b', key {id_key('b').hex()}"):
            reward.rows(prompts, ids)
    with pytest.raises(UnknownPromptError, match=r"prompt 1, which is None and has no id.*; 1 of 2 are unknown"):
        reward.rows(["Hi", None])


def test_an_unknown_id_is_not_looked_up_as_a_text() -> None:
    """A table that has the very text of the error does not make the id known."""
    reward = CalibratedReward(reads, ReferenceTable.build([("the id 0", [0.0, 1.0]), ("the id 'b'", [0.0])]))
    with pytest.raises(UnknownPromptError, match="the id 'b'"):
        reward.rows([None], ["b"])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (" Hi there", "without the white space around it"),
        ("<pad><s>Hi there", "without '<pad><s>' at its beginning"),
        ("Yo", r"`calibrated-rewards calibrate` with more prompts"),
    ],
)
def test_texts_get_a_hint_too(text: str, hint: str) -> None:
    """Also where prompt and completion come in one text, and another form of it begins with a known prompt."""
    reward = CalibratedReward(reads, ReferenceTable.build([("Hi", [0.0, 1.0])]))
    with pytest.raises(UnknownPromptError, match=hint):
        reward.score_texts(["Hi you", text])


def test_strangers_get_a_hint() -> None:
    """In which other form the table knows them."""
    table = ReferenceTable.build([("Hi", [0.0, 1.0]), (CHAT[:1] + CHAT, [0.0, 1.0])])
    reward = CalibratedReward(NumberScorer(), table)
    for prompt, said in (
        (CHAT, "as a plain prompt"),
        (" Hi\n", "white space"),
        ("<s>Hi", "without '<s>'"),
        ("Ho", "calibrate"),
        ([*CHAT, {"role": "user", "content": CHAT[0]["content"] + "!"}], r"without '!' at the end .* id_column"),
    ):
        with pytest.raises(UnknownPromptError, match=said):
            reward([prompt], ["1"])
        with pytest.raises(UnknownPromptError, match=said):
            reward.rows(iter([prompt]))


def test_hints_say_what_to_do() -> None:
    """Each names what was added, and an action that is possible: an id would not make a text of a chat."""
    system, more = {"role": "system", "content": "You are terse."}, {"role": "assistant", "content": "Hello!"}
    reward = CalibratedReward(NumberScorer(), ReferenceTable.build([("Hey", [0.0, 1.0]), (CHAT, [0.0, 1.0])]))
    for prompt, hint in (
        ([{"role": "user", "content": "Hey"}], ": the table has the text .* calibrate these messages as they are$"),
        ([system, *CHAT], r"its first message \('You are terse.'\): calibrate with this message, or stop the trainer"),
        ([*CHAT, more], r"its last message \('Hello!'\): if that is a completion, pass it apart"),
        ([more], "no similar form is in the table. Compare the prompts that the trainer passes"),
    ):
        with pytest.raises(UnknownPromptError, match=hint) as caught:
            reward.rows([prompt])
        assert "id_column" not in str(caught.value)


def test_additions_are_recognised_up_to_a_length() -> None:
    """The calibrated part of a message has at most LONGEST_BEGINNING characters: longer ones are not tried."""
    for over, known in (0, True), (1, False):
        chat = [{"role": "user", "content": "x" * (LONGEST_BEGINNING + over)}]
        hint = suggest_fix(ReferenceTable.build([(chat, [1.0])]), [{**chat[0], "content": chat[0]["content"] + "!"}])
        assert ("without '!'" in hint) is known


def test_prompts_in_any_sequence() -> None:
    """A column that makes each prompt anew when it is asked for, an array of objects, an iterator."""
    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(40)]
    table = ReferenceTable.build([(chat, [float(i), i + 1.0]) for i, chat in enumerate(chats)])
    reward = CalibratedReward(None, table)
    expected = table.rows(chats)
    column = datasets.Dataset.from_dict({"prompt": chats})["prompt"]
    objects = np.empty(40, object)
    objects[:] = chats

    for prompts in (column, objects, iter(chats), tuple(chats)):
        np.testing.assert_array_equal(reward.rows(prompts), expected)
    raw = np.arange(40) + 0.5
    assert reward.from_scores(column, raw).tolist() == [0.5] * 40


def test_texts_without_a_known_prompt_are_unknown_prompts() -> None:
    """score_texts does what on_missing says; a text in the place of a list is refused."""
    texts = ["prompt 1 0.3", "stranger 0.3"]
    with pytest.raises(UnknownPromptError):
        reward_of().score_texts(texts)
    assert reward_of(on_missing="neutral").score_texts(texts).known.tolist() == [True, False]
    assert reward_of(on_missing="skip").score_texts(texts).reward[1] is None
    with pytest.raises(TypeError, match="list of texts"):
        reward_of().score_texts("prompt 1 0.3")


def test_more_pairs_than_may_wait_are_scored_all_the_same() -> None:
    """A large batch is a batch, and waits in no queue."""
    found = asyncio.run(ascore(reward_of(), ["prompt 1"] * 10_000, ["0.3"] * 10_000))
    assert found.reward == reward_of()(["prompt 1"], ["0.3"]) * 10_000


def test_what_looks_like_a_special_token_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A trainer that leaves them changes what the reward model reads."""
    reward = reward_of()
    for _ in range(3):
        reward(["prompt 1"], ["0.3</s>"])
    assert [record.getMessage() for record in caplog.records] == [
        f"{reward.__name__}: a completion ends with '</s>', which looks like a special token that the trainer left "
        "there, and the reward model will read it. If so, say endings=('</s>',)"
    ]
    reward_of(endings=("</s>",))(["prompt 1"], ["0.3</s>"])
    assert len(caplog.records) == 1


def test_a_run_knows_its_own_prompts(tmp_path: Path) -> None:
    """A table in its calibration run's directory needs no originals; what is saved has them in a file."""
    policy, words = tiny.causal(), tiny.tokenizer()
    from calibrated_rewards.samplers.hf import HfSampler
    from calibrated_rewards.samplers.protocol import Decoding

    sampler = HfSampler(policy, words, Decoding(max_tokens=4))
    table = calibrate([CHAT, "plain"], sampler, reads, k=3, out=tmp_path / "run")
    rendered = words.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    reward = CalibratedReward(reads, table)

    assert reward.score([rendered, "plain"], ["x", "x"]).raw.tolist() == [1.0, 0.0]
    reward.save_pretrained(tmp_path / "reward")
    again = CalibratedReward.from_pretrained(tmp_path / "reward", scorer=reads)
    assert again.originals is not None
    assert again.score([rendered, "plain"], ["x", "x"]).raw.tolist() == [1.0, 0.0]


def test_endings_are_taken_off() -> None:
    """Special tokens that a trainer leaves behind, one after the other, from the end and nowhere else."""
    length = CalibratedReward(lambda ps, cs: [len(c) for c in cs], ReferenceTable.build([("p", [1.0])]))
    cut = CalibratedReward(length.scorer, length.table, endings=("<|end|>", "<pad>"))

    completions = ["abc", "abc<|end|>", "abc<|end|><pad><pad>", "<|end|>abc"]
    assert cut.raw(["p"] * 4, completions).tolist() == [3, 3, 3, 10]
    assert length.raw(["p"] * 4, completions).tolist() == [3, 10, 20, 10]


@pytest.mark.parametrize("batch_size", [1, 7, 60, 100])
def test_micro_batches_change_nothing(batch_size: int) -> None:
    """The scorer is never given more than it should be, and the rewards are the same."""
    prompts, completions, _ = asked()
    given_at_once: list[int] = []

    def counted(ps: Sequence[Any], cs: Sequence[Any]) -> Any:
        given_at_once.append(len(ps))
        return NumberScorer()(ps, cs)

    reward = CalibratedReward(counted, reward_of().table, batch_size=batch_size)
    assert reward(prompts, completions) == reward_of()(prompts, completions)
    assert max(given_at_once) == min(batch_size, 60)


def test_a_reward_model_runs_without_gradients() -> None:
    """Trainers call rewards with gradients on."""
    seen: list[bool] = []

    def looks(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        seen.append(torch.is_grad_enabled())
        return [float(len(c)) for _, c in zip(prompts, completions, strict=True)]

    assert torch.is_grad_enabled()
    CalibratedReward(looks, ReferenceTable.build([("p", [0.0])]))(["p"], ["x"])
    assert seen == [False]


def test_what_is_logged() -> None:
    """The measures by the reward's name, as often as TRL asks; quantiles of the completions beside them."""
    prompts, completions, raw = asked()
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    reward = reward_of(Log(), name="calm")
    reward(prompts, completions, log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
    u = by_hand(prompts, raw)

    assert metrics["calm/u"] == pytest.approx(u.mean())
    assert metrics["calm/saturated"] == pytest.approx((u > 1 - 1e-9).mean())
    assert metrics["calm/raw"] == pytest.approx(raw.mean(dtype=np.float64))
    assert metrics["calm/log_u"] == pytest.approx(np.log(np.maximum(u, 1e-3)).mean())
    assert metrics["calm/misses"] == 0
    assert extra["calm/u"] == pytest.approx(u)
    for transform in TRANSFORMS:  # without a name: the same names for every transform, so that charts can be compared
        unnamed: dict[str, float] = {}
        reward_of(transform)(prompts, completions, log_metric=unnamed.__setitem__)
        assert unnamed == {f"calibrated/{name.removeprefix('calm/')}": value for name, value in metrics.items()}
    nobody = compute_metrics(reward_of(on_missing="neutral").score(["stranger"], ["1"]))
    assert {*nobody} == {name.removeprefix("calm/") for name in metrics}
    assert nobody["misses"] == 1


def test_names_are_of_their_own() -> None:
    """A trainer's log goes by __name__: another transform, another name; one that is given is kept."""
    names = {reward_of(transform).__name__ for transform in TRANSFORMS}
    assert len(names) == len(TRANSFORMS)
    assert all(name.isidentifier() for name in names)
    assert reward_of(name="calm").__name__ == "calm"
    settings = ({}, {"estimator": "unbiased"}, {"scale": "standard"}, {"scale": "raw"}, {"calibration": ZScore()})
    names = [reward_of(Exponential(5.0), **each).__name__ for each in settings]
    assert len(set(names)) == len(settings)
    assert all(name.isidentifier() for name in names)


def test_the_measures_of_a_batch_of_none() -> None:
    """An empty batch gives no rewards and no error."""
    logged: dict[str, float] = {}
    assert reward_of()([], [], log_metric=logged.__setitem__) == []
    assert reward_of().from_scores([], np.empty(0)).shape == (0,)
    assert logged


def test_other_calibrations_take_the_place_of_the_paper_s() -> None:
    """PAR's and z-scores go through the transform as they are; what makes no sense with them is refused."""
    prompts, completions, raw = asked()
    table = reward_of().table
    for calibration in (ZScore(), SmoothedCDF(), EmpiricalCDF(tolerance=0.2)):
        expected = calibration(table, table.rows(prompts), raw)
        reward = reward_of(calibration=calibration)
        np.testing.assert_allclose(reward(prompts, completions), expected)
        square = raw.reshape(6, 10)
        each = [calibration(table, table.rows([p] * 10), own) for p, own in zip(PROMPTS, square, strict=True)]
        np.testing.assert_allclose(reward.from_scores(PROMPTS, square), each)
        np.testing.assert_allclose(reward.from_scores(PROMPTS, torch.tensor(square)), each, rtol=1e-6)
    np.testing.assert_allclose(
        reward_of(Exponential(5.0), calibration=SmoothedCDF())(prompts, completions),
        scaled(Exponential(5.0), "unit")(SmoothedCDF()(table, table.rows(prompts), raw)),
    )
    with pytest.raises(ValueError, match="is for quantiles"):
        reward_of(Exponential(5.0), calibration=ZScore())(prompts, completions)
    with pytest.raises(ValueError, match="estimator"):
        reward_of(calibration=ZScore(), estimator="posterior")
    with pytest.raises(ValueError, match="neutral"):
        reward_of(calibration=ZScore(), on_missing="neutral")


def test_settings_that_make_no_sense_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with the rule and the value."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would be quicker with wrong types
    table = reward_of().table
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"on_missing": "silently"}, ValueError, "on_missing is one of"),
        ({"batch_size": 0}, ValueError, "whole batch_size >= 1"),
        ({"endings": "</s>"}, TypeError, "tuple of texts"),
        ({"endings": (5,)}, TypeError, "tuple of texts"),
        ({"name": {"a": 1}}, TypeError, "a text or None"),
        ({"batch_size": 2.5}, ValueError, "whole batch_size"),
        ({"beta": -1.0}, ValueError, "finite beta"),
        ({"transform": "exp:10"}, TypeError, "as Exponential"),
        ({"scale": "loud"}, ValueError, "scale must be"),
        ({"estimator": "best"}, ValueError, "estimator in"),
        ({"transform": lambda u: 0 * np.asarray(u)}, ValueError, "must rise"),
    ]
    for settings, error, said in wrong:
        with pytest.raises(error, match=said):
            CalibratedReward(NumberScorer(), table, **settings)
    with pytest.raises(ValueError, match="no scorer"):
        CalibratedReward(None, table)(["prompt 1"], ["1"])


def saved(tmp_path: Path) -> str:
    """A tiny reward model on disk."""
    return tiny.saved(tiny.classifier(), tmp_path / "rm", tiny.tokenizer())


def model_reward(tmp_path: Path, **settings: Any) -> CalibratedReward:
    scorer = load_scorer(saved(tmp_path))
    table = calibrate(PROMPTS, NumberSampler(), scorer, k=8, out=tmp_path / "table")
    return CalibratedReward(scorer, table, Exponential(5.0), **settings)


def test_thirty_two_threads_give_the_same_rewards(tmp_path: Path) -> None:
    """All at once, one sample each and in lists, of a real model."""
    reward = model_reward(tmp_path)
    completions = tiny.texts(32)
    prompts = [PROMPTS[i % 6] for i in range(32)]
    expected = reward.score(prompts, completions)
    barrier = threading.Barrier(32)

    def one(at: int) -> tuple[float | None, list[Any]]:
        barrier.wait()
        alone = score_one(reward, prompts[at], completions[at]).reward
        return alone, reward(prompts[at : at + 3], completions[at : at + 3])

    with ThreadPoolExecutor(32) as pool:
        found = [*pool.map(one, range(32))]

    assert [alone for alone, _ in found] == expected.reward
    assert [several for _, several in found] == [expected.reward[at : at + 3] for at in range(32)]


def test_two_ranks_give_the_same_rewards(tmp_path: Path) -> None:
    """Each of two processes, started as torchrun starts them, scores its half of a batch, by two ways to the reward.

    It loads the saved one, and one that was pickled: without weights, in a few kilobytes, which it loads on arrival.
    """
    reward = model_reward(tmp_path)
    reward.save_pretrained(tmp_path / "reward")
    data = pickle.dumps(reward)
    assert len(data) < 10_000
    (tmp_path / "reward.pickle").write_bytes(data)
    completions = tiny.texts(8)
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, pickle, sys\n"
        "from calibrated_rewards import CalibratedReward\n"
        "where, out, asked = sys.argv[1:]\n"
        "sent = pickle.load(open(f'{where}.pickle', 'rb'))\n"
        "rank = int(os.environ['RANK'])\n"
        "prompts, completions = json.loads(asked)\n"
        "mine = slice(rank, None, 2)\n"
        "loaded = CalibratedReward.from_pretrained(where)\n"
        "found = [each(prompts[mine], completions[mine]) for each in (loaded, sent)]\n"
        "open(f'{out}/{rank}.json', 'w').write(json.dumps(found))\n"
    )
    prompts = [PROMPTS[i % 6] for i in range(8)]
    command = [sys.executable, script, tmp_path / "reward", tmp_path, json.dumps([prompts, completions])]
    # What torchrun would set, without a third process that imports torch.
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    halves = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    expected = reward(prompts, completions)
    for way in (0, 1):
        assert [halves[i % 2][way][i // 2] for i in range(8)] == expected
    assert pickle.loads(data)(prompts, completions) == expected


def test_a_saved_reward_comes_back(tmp_path: Path) -> None:
    """Scorer, table, transform and settings; changes can be made on the way."""
    settings: dict[str, Any] = {"estimator": "posterior", "name": "calm", "endings": ("</s>",), "id_column": "uid"}
    reward = model_reward(tmp_path, **settings, on_missing="neutral", scale="standard")
    reward.save_pretrained(tmp_path / "reward")
    again = CalibratedReward.from_pretrained(tmp_path / "reward")
    completions = tiny.texts(6)

    for name, value in settings.items():
        assert getattr(again, name) == value
    assert (again.transform, again.scale, again.on_missing) == (reward.transform, "standard", "neutral")
    uid: dict[str, Any] = {"uid": [None] * 6}
    assert again(PROMPTS, completions, **uid) == reward(PROMPTS, completions, **uid)
    changed = CalibratedReward.from_pretrained(tmp_path / "reward", transform=Log(), scorer=HashScorer())
    assert (changed.transform, changed.scorer) == (Log(), HashScorer())
    again.save_pretrained(tmp_path / "reward")  # over itself
    assert CalibratedReward.from_pretrained(tmp_path / "reward").name == "calm"


def test_what_is_no_reward_is_said_to_be_none(tmp_path: Path) -> None:
    """A table's directory, an empty one, a setting that does not exist."""
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), k=2, out=tmp_path / "table")
    with pytest.raises(FileNotFoundError, match=r"it is a table.*calibrated-rewards reward"):
        CalibratedReward.from_pretrained(tmp_path / "table")
    for nowhere in ("./rewrad/", "rewrad", str(tmp_path / "rewrad"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no directory"):
            CalibratedReward.from_pretrained(nowhere)
    with pytest.raises(FileNotFoundError, match=r"no reward\.json"):
        CalibratedReward.from_pretrained(tmp_path)
    reward_of().save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="no setting volume"):
        CalibratedReward.from_pretrained(tmp_path / "reward", volume=11)
    with pytest.raises(ValueError, match="function, which is not saved"):
        reward_of(on_missing=lambda prompts: reward_of().table).save_pretrained(tmp_path / "other")


def through_the_hub(code: str, home: Path) -> tuple[Any, list[str]]:
    """What is stored on a hub of its own after a process has talked to it, and what that said."""
    setup = """
        import json
        from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
        from calibrated_rewards.testing.suites import NumberScorer
        table = ReferenceTable.build([("p", [1.0, 2.0, 3.0])])
    """
    with serving("someone/reward", "", home) as (hub, environment):
        command = [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    return hub, done.stdout.splitlines()


def test_push_and_pull_through_the_real_client(tmp_path: Path) -> None:
    """What was pushed to the Hub comes back from it."""
    code = """
        reward = CalibratedReward(NumberScorer(), table, Exponential(3.0), name="calm")
        print(reward.push_to_hub("someone/reward", private=True, token="secret"))
        again = CalibratedReward.from_pretrained("someone/reward", revision="main", token="secret")
        assert (again.name, again(["p"], ["2.5"])) == ("calm", reward(["p"], ["2.5"]))
    """
    hub, (url,) = through_the_hub(code, tmp_path)

    assert url.endswith(f"/someone/reward/commit/{COMMIT}")
    files = ["reward.json", "scores.png", "table/table.json", "table/table.safetensors"]
    assert sorted(hub.stored) == ["README.md", *files]
    assert json.loads(hub.requests[0][2])["type"] == "model"


def test_what_others_pushed_runs_no_code(tmp_path: Path) -> None:
    """A function is imported for those who say that they trust the repository."""
    code = """
        CalibratedReward(json.dumps, table).push_to_hub("someone/reward", token="secret")
        try:
            CalibratedReward.from_pretrained("someone/reward", token="secret")
        except ValueError as error:
            print(error)
        print(CalibratedReward.from_pretrained("someone/reward", trust_remote_code=True).scorer.__name__)
    """
    _, (refused, trusted) = through_the_hub(code, tmp_path)

    assert "function 'json:dumps' would be imported" in refused
    assert trusted == "dumps"


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is cut off between its files is an error, not a mixture."""
    reward_of(name="first").save_pretrained(tmp_path / "reward")
    other = CalibratedReward(NumberScorer(), ReferenceTable.build([("p", [1.0])]), name="second")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(ReferenceTable, "save", full)
        with pytest.raises(OSError, match="no space"):
            other.save_pretrained(tmp_path / "reward")
    assert CalibratedReward.from_pretrained(tmp_path / "reward").name == "first"
    with monkeypatch.context() as patched:
        patched.setattr("calibrated_rewards.reward.saving._save_prompts", full)
        with pytest.raises(OSError, match="no space"):
            other.save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="not of one save"):
        CalibratedReward.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\0", "[" * 100_000])
def test_settings_that_cannot_be_read_name_the_file(tmp_path: Path, text: str) -> None:
    """Empty, cut, of another kind, or too deep: the error says which file cannot be read."""
    reward_of().save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "reward.json").write_text(text)
    with pytest.raises(ValueError, match=r"reward\.json"):
        CalibratedReward.from_pretrained(tmp_path / "reward")


def test_a_reward_on_the_hub_needs_a_reward_model_on_the_hub(tmp_path: Path) -> None:
    """A folder of this machine is nobody else's."""
    with pytest.raises(ValueError, match="folder of this machine"):
        model_reward(tmp_path).push_to_hub("someone/reward")


@pytest.mark.parametrize("transform", [Identity(), Exponential(10.0)])
@pytest.mark.parametrize("estimator", ["empirical", "unbiased"])
@pytest.mark.parametrize("scale", ["unit", "standard"])
def test_without_calibration(transform: Any, estimator: Any, scale: Any) -> None:
    """The raw score is the reward, whatever transform was there; names, quantiles and misses stay what they were."""
    calibrated = reward_of(transform, estimator=estimator, scale=scale, on_missing="neutral", beta=0.1)
    raw = replace(calibrated, calibration=Uncalibrated(), beta=None)
    prompts, numbers = [*PROMPTS[:3], "unknown"], [-1e6, 0.125, 3.5, 1e6]
    completions = [str(number) for number in numbers]
    logs: dict[str, float] = {}
    assert raw(prompts, completions, log_metric=logs.__setitem__) == numbers
    assert raw.__name__ == f"raw_{calibrated.__name__}"
    expected = compute_metrics(calibrated.score(prompts, completions))
    assert logs == {f"calibrated/{name}": value for name, value in expected.items()}
    assert raw.calibrated(prompts, completions).tolist() == calibrated.calibrated(prompts, completions).tolist()
    exact = np.array([[0.1, 1 / 3], [-2.0, 1e-9]])
    assert np.array_equal(raw.from_scores(PROMPTS[:2], exact), exact)
    tensor = torch.tensor(exact, dtype=torch.bfloat16)
    found = raw.from_scores(PROMPTS[:2], tensor)
    assert (found.dtype, found.tolist()) == (torch.float32, tensor.float().tolist())
    assert replace(raw, on_missing="skip")(prompts, completions) == [*numbers[:3], None]
    with pytest.raises(UnknownPromptError):
        replace(raw, on_missing="raise")(prompts, completions)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            raw.from_scores(PROMPTS[:1], [bad])
        with pytest.raises(ValueError, match="finite"):
            raw.from_scores(["unknown"], [bad])


def test_without_calibration_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """A run on raw scores is not warned of responses that are better than the references."""
    table = ReferenceTable.build([(f"p{i}", np.arange(8.0)) for i in range(64)])
    raw = CalibratedReward(NumberScorer(), table, calibration=Uncalibrated())
    prompts = [f"p{i % 64}" for i in range(300)]
    raw(prompts, [f"{8 + i}" for i in range(300)])
    assert caplog.text == ""
    replace(raw, calibration=EmpiricalCDF())(prompts, [f"{8 + i}" for i in range(300)])
    assert "standard errors" in caplog.text


def test_a_run_s_prompts_are_read_without_calibration(tmp_path: Path) -> None:
    """The Parquet files beside a table have texts and chats as they were given; a damaged one is named."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"}]
    prompts = ["2+2=", chat, '["no chat"]']
    table = calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path, k=2, prompts_per_shard=2, show_progress=False)
    run = RunPrompts.beside(table)
    assert run is not None
    assert dict(run.items()) == {prompt_key(prompt): prompt for prompt in prompts}
    assert run(table.rows(prompts)) == prompts
    assert RunPrompts.beside(ReferenceTable.build([("2+2=", [1.0])])) is None
    (tmp_path / "prompts" / "00001 (1).parquet").write_bytes(b"a copy")
    assert len(dict(run.items())) == 3
    (tmp_path / "prompts" / "00001.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"00001\.parquet must hold a run's prompts"):
        dict(run.items())
