"""A scorer is given in training what it was given in calibration, or the training stops with a reason."""

from dataclasses import dataclass

import numpy as np
import pytest

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate, import_rollouts
from calibrated_rewards.reward.combined import CombinedReward
from calibrated_rewards.reward.completions import CompletionForm
from calibrated_rewards.scorers.ensemble import Cost, Ensemble, Function
from calibrated_rewards.testing.suites import HashScorer, NumberScorer

CHATS = [[{"role": "user", "content": f"Say {word}"}] for word in ("one", "two", "three")]
WORDS = ["the cat", "a dog", "then", "no"]


def words(prompts, seeds):
    """A sampler of texts."""
    return [[WORDS[seed % 4] for seed in own] for _, own in zip(prompts, seeds, strict=True)]


def has_the(_, completions):
    """Whether a text has a word in it; of a list of messages that is never so."""
    return [float("the" in completion) for completion in completions]


def asks_of(prompts, completions):
    """What is in the prompt's last message, as a member, and in the completion."""
    return [float(len(p[-1]["content"]) + ("the" in c)) for p, c in zip(prompts, completions, strict=True)]


SCORERS = {
    "function": has_the,
    "function of the prompt": asks_of,
    "Function": Function(lambda prompt, completion: float("the" in completion), name="the"),
    "ensemble": Ensemble([has_the, HashScorer()]),
    "cost": Cost(has_the),
}


def said(text, **members):
    return [{"role": "assistant", "content": text, **members}]


@pytest.mark.parametrize("name", SCORERS)
def test_messages_are_scored_as_the_texts_of_calibration(name):
    """TRL's form, Arrow's None and parts of a content: the score is that of the text, and verify() takes that path."""
    scorer = SCORERS[name]
    table = calibrate(CHATS, words, scorer, k=8)
    reward = CalibratedReward(scorer, table)
    assert reward.verify().worst == 0
    prompts = [CHATS[i % 3] for i in range(4)]
    expected = np.asarray(scorer(prompts, WORDS), np.float32)
    with_none = [[{**chat[0], "name": None}] for chat in prompts]
    parts = [[{"role": "user", "content": [{"type": "text", "text": c[0]["content"]}]}] for c in prompts]
    for asked in prompts, with_none, parts:
        for wrap in (said, lambda t: said(t, tool_calls=None), lambda t: said([{"type": "text", "text": t}])):
            answers = [wrap(text) for text in WORDS]
            np.testing.assert_array_equal(reward.score(asked, answers).raw, expected)
    assert reward(prompts, WORDS) == reward(prompts, [said(text) for text in WORDS])


def test_each_component_of_a_combination_has_its_own_form():
    """One was calibrated with texts, the other with messages: both are given theirs."""
    by_text = CalibratedReward(has_the, calibrate(CHATS, words, has_the, k=4))

    def length(_, completions):
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": chat, "completions": [said(word) for word in WORDS]} for chat in CHATS]
    by_message = CalibratedReward(length, import_rollouts_in_memory(rows, length))
    assert by_message.table.meta["form"]["completions"] == "messages"
    both = CombinedReward({"the": by_text, "long": by_message})
    assert both(CHATS, WORDS[:3]) == both(CHATS, [said(word) for word in WORDS[:3]])
    np.testing.assert_array_equal(by_message.raw(CHATS[:1], ["four"]), [4.0])
    reward = CalibratedReward(both, calibrate(CHATS, words, both, k=4))
    assert reward(CHATS, WORDS[:3]) == reward(CHATS, [said(word) for word in WORDS[:3]])


def import_rollouts_in_memory(rows, scorer):
    """A table of rollouts made elsewhere, which needs no directory afterwards."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return import_rollouts(rows, folder, scorer).merge()


UNFAITHFUL = {
    "two messages": [*said("the"), {"role": "user", "content": "more"}],
    "a tool's answer": [*said(""), {"role": "tool", "content": "the"}, *said("the")],
    "tool calls": said("the", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
    "reasoning": said("the", reasoning_content="hm"),
    "another role": [{"role": "user", "content": "the"}],
    "no message": [],
    "a picture": [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}],
}


@pytest.mark.parametrize("what", UNFAITHFUL)
def test_what_is_no_text_is_an_error_for_a_function(what):
    """Which names the completion and the reason; a scorer that reads messages is given them as they are."""
    reward = CalibratedReward(has_the, calibrate(CHATS, words, has_the, k=4))
    with pytest.raises(ValueError, match=r"completion 1 is not the same as a text: it (has|is a message)"):
        reward(CHATS[:2], [said("fine"), UNFAITHFUL[what]])
    own = HashScorer()
    form = CompletionForm.of(calibrate(CHATS, words, own, k=4).meta)
    assert form.apply(own, CHATS[:1], [UNFAITHFUL[what]]) == (CHATS[:1], [UNFAITHFUL[what]])


def test_a_scorer_of_ones_own_may_read_messages():
    """It says so; an ensemble reads them if all of its members do."""

    @dataclass(frozen=True)
    class Both:
        reads_messages = True

        def __call__(self, prompts, completions):
            return [float(len(str(completion))) for completion in completions]

    table = calibrate(CHATS, words, Both(), k=4)
    assert CalibratedReward(Both(), table).raw(CHATS[:1], [UNFAITHFUL["two messages"]]).shape == (1,)
    mixed = Ensemble([Both(), has_the])
    reward = CalibratedReward(mixed, calibrate(CHATS, words, mixed, k=4))
    with pytest.raises(ValueError, match="not the same as a text"):
        reward.raw(CHATS[:1], [UNFAITHFUL["two messages"]])


def test_prefilled_and_empty_answers_are_texts_too():
    """A chat that ends with the beginning of an answer; an answer of no letters."""
    prefilled = [*CHATS[0], {"role": "assistant", "content": "Well, "}]
    reward = CalibratedReward(has_the, calibrate([prefilled], words, has_the, k=4))
    assert reward.raw([prefilled] * 3, [said("the"), said(""), said(None)]).tolist() == [1.0, 0.0, 0.0]


def test_older_tables_say_it_by_their_probes():
    """A table without any is scored as things come, as it always was."""
    probe = {"prompt": CHATS[0], "completion": "the", "score": 1.0}
    rows = [(CHATS[0], [0.0, 1.0])]
    old = ReferenceTable.build(rows, meta={"probes": [probe]})
    assert CalibratedReward(has_the, old).raw(CHATS[:1], [said("the")]).tolist() == [1.0]
    messages = ReferenceTable.build(rows, meta={"probes": [{**probe, "completion": said("the")}]})
    assert CompletionForm.of(messages.meta).apply(has_the, ["p"], ["the"]) == (["p"], [said("the")])
    bare = CalibratedReward(has_the, ReferenceTable.build(rows))
    assert bare.raw(CHATS[:1], [said("the")]).tolist() == [0.0]
    both = ReferenceTable.build(rows, meta={"probes": [probe, {**probe, "completion": said("the")}]})
    assert CompletionForm.of(both.meta).completions == "both"


def test_verify_takes_the_path_of_training():
    """Endings that are taken off in training are taken off the probes: a reward that would score others is refused."""
    table = calibrate(CHATS, lambda p, s: [["1<e>" if x % 2 else "22" for x in own] for own in s], Length(), k=6)
    CalibratedReward(Length(), table).verify()
    with pytest.raises(ValueError, match="not the one that the table was made with"):
        CalibratedReward(Length(), table, endings=("<e>",)).verify()
    assert CalibratedReward(NumberScorer(), table).score(CHATS[:1], [said("3")]).raw.tolist() == [3.0]


@dataclass(frozen=True)
class Length:
    """The length of a text."""

    def __call__(self, prompts, completions):
        """In letters."""
        return [float(len(completion)) for completion in completions]
