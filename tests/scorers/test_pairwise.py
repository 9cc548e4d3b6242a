"""Pairwise: mean win chances against loops by hand, references on disk, and what leaving one out is for."""

import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from calibrated_rewards.prompts import UnknownPromptError, prompt_key
from calibrated_rewards.scorers.pairwise import BothOrders, MeanWin, References, check_references, compare
from calibrated_rewards.scorers.protocol import fingerprint, score

CHAT = [{"role": "user", "content": "Hi"}]
REPLY = [{"role": "assistant", "content": "2.0"}]
values = st.floats(-3, 3, width=16).map(str)
lists = st.lists(values, min_size=1, max_size=6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def worth(completion):
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(text if isinstance(text, str) else text[0]["text"])


@dataclass(frozen=True)
class BradleyTerry:
    """Completions are numbers; the difference, and a liking for the first place, are log-odds."""

    first: float = 0.0

    def __call__(self, prompts, firsts, seconds):
        """P(first beats second)."""
        return [sigmoid(worth(a) - worth(b) + self.first) for a, b in zip(firsts, seconds, strict=True)]


def by_hand(preference, completion, others):
    return sum(preference(["p"], [completion], [other])[0] for other in others) / len(others)


@given(lists, lists)
def test_the_score_is_the_mean_chance_to_win(completions, references) -> None:
    """Against a loop over the references that are not the completion itself."""
    scores = MeanWin(BradleyTerry(), References.of([("p", references)]))(["p"] * len(completions), completions)

    assert scores.dtype == np.float32
    for completion, found in zip(completions, scores, strict=True):
        others = list(references)
        if completion in others:
            others.remove(completion)
        assert found == pytest.approx(by_hand(BradleyTerry(), completion, others) if others else 0.5, abs=1e-6)


def test_each_prompt_has_its_own_references() -> None:
    """Texts and chats, prompts in any order, lists of any length; a chat is found however it is written."""
    references = References.of([("p", ["0", "1"]), (CHAT, ["3", REPLY, "-1"])])
    same_chat = ({"content": [{"type": "text", "text": "Hi"}], "role": "user", "name": None},)
    scorer = MeanWin(BradleyTerry(0.3), references)

    scores = scorer([CHAT, "p", same_chat], ["1", "1.5", "0"])

    expected = [
        by_hand(BradleyTerry(0.3), c, others)
        for c, others in [("1", ["3", "2", "-1"]), ("1.5", ["0", "1"]), ("0", ["3", "2", "-1"])]
    ]
    assert scores == pytest.approx(expected, abs=1e-6)


@given(st.lists(values, min_size=2, max_size=6, unique_by=float), st.data())
def test_a_reference_is_scored_as_if_it_were_fresh(references, data) -> None:
    """It has the score that it would have against the others, had it never been among them."""
    one = data.draw(st.sampled_from(references))
    others = [other for other in references if other != one]
    among, fresh = (MeanWin(BradleyTerry(1.0), lambda _, known=known: known) for known in (references, others))

    assert among(["p"], [one]) == pytest.approx(fresh(["p"], [one]))


def test_leaving_one_out_takes_the_bias_away() -> None:
    """The best of K references wins always, it is not drawn towards 1/2; of doubles only one is left out."""
    scorer = MeanWin(BradleyTerry(), lambda _: ["9", "-9", "-9"])

    assert scorer(["p"], ["9"]) == pytest.approx(1.0, abs=1e-6)
    assert scorer(["p"], ["-9"]) == pytest.approx((0.5 + sigmoid(-18)) / 2)


def test_messages_are_the_reference_they_are_equal_to() -> None:
    """By content, not by the way they are written."""
    other_way = ({"content": [{"type": "text", "text": "2.0"}], "role": "assistant"},)
    scorer = MeanWin(BradleyTerry(), References.of([(CHAT, [REPLY, "0"])]))

    assert scorer([CHAT, CHAT], [REPLY, other_way]) == pytest.approx([sigmoid(2.0)] * 2)


def test_the_only_reference_ties_with_itself() -> None:
    """Nothing is left to compare with."""
    assert MeanWin(BradleyTerry(), lambda _: ["1"])(["p", "p"], ["1", "2"]) == pytest.approx([0.5, sigmoid(1.0)])


def test_an_unknown_prompt_is_named() -> None:
    """By its text and its key, as the table does."""
    scorer = MeanWin(BradleyTerry(), References.of([("p", ["1"])]))

    with pytest.raises(UnknownPromptError, match="none for 'never seen', key " + prompt_key("never seen").hex()):
        scorer(["p", "never seen"], ["1", "1"])


@given(st.floats(-3, 3), values, values)
def test_both_orders_add_up(first, a, b) -> None:
    """However much the first place is liked: P(a, b) + P(b, a) = 1, and the mean of both answers by hand."""
    preference = BradleyTerry(first)
    there, back = BothOrders(preference)(["p", "p"], [a, b], [b, a])

    assert there + back == pytest.approx(1)
    assert there == pytest.approx((preference(["p"], [a], [b])[0] + 1 - preference(["p"], [b], [a])[0]) / 2)


def test_both_orders_is_one_call() -> None:
    """So that a model batches both, and shares what they share."""
    calls = []

    def preference(prompts, firsts, seconds):
        calls.append((prompts, firsts, seconds))
        return [0.5] * len(prompts)

    BothOrders(preference)(["p", "q"], ["a", "b"], ["c", "d"])

    assert calls == [(["p", "q", "p", "q"], ["a", "b", "c", "d"], ["c", "d", "a", "b"])]


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ([1.2], r"in \[0, 1\], got 1.2"),
        ([-0.1], r"in \[0, 1\]"),
        ([float("nan")], r"in \[0, 1\]"),
        ([], "shape"),
        ([[0.5]], "shape"),
    ],
)
def test_a_preference_is_a_probability(answer, rule) -> None:
    """Log-odds, nan, and answers of another length are refused."""
    with pytest.raises(ValueError, match=rule):
        compare(lambda *_: answer, ["p"], ["a"], ["b"])


def test_tensors_are_answers_too() -> None:
    """In bfloat16, and with a gradient."""
    given = torch.tensor([0.25, 0.75], dtype=torch.bfloat16, requires_grad=True)

    assert compare(lambda *_: given, ["p"] * 2, ["a"] * 2, ["b"] * 2).tolist() == [0.25, 0.75]
    with pytest.raises(TypeError, match="no list of probabilities"):
        compare(lambda *_: ["high"], ["p"], ["a"], ["b"])


def test_both_orders_of_three_lists() -> None:
    """Lists that are too short and too long are not made up for by their sum."""
    with pytest.raises(ValueError, match="got 2, 1 and 3"):
        BothOrders(BradleyTerry())(["p", "q"], ["1"], ["1", "2", "3"])


@pytest.mark.parametrize("given", ["12", b"12", 3, None, [], [1, 2], [b"a"], [None], [{"role": "user"}]], ids=str)
def test_references_are_lists_of_completions(given) -> None:
    """From a file or from a function: no letters, bytes or numbers, and not nothing."""
    with pytest.raises(ValueError, match="for 'p'"):
        check_references(given, "p")
    with pytest.raises(ValueError, match="for 'p'"):
        MeanWin(BradleyTerry(), lambda _: given)(["p"], ["1"])


def test_it_is_short_and_has_a_hash() -> None:
    """A repr does not show thousands of references; a set may hold both."""
    references = References.of([("p", ["1"]), ("q", ["a reference"])])
    scorer = MeanWin(BradleyTerry(), references)

    assert "References(2 prompts)" in repr(scorer)
    assert "a reference" not in repr(scorer)
    assert {scorer, references, References.of([("q", ["a reference"]), ("p", ["1"])])} == {scorer, references}


def test_a_file_that_was_edited(tmp_path) -> None:
    """A byte order mark, an empty line, and line ends of Windows are no harm."""
    References.of([("p", ["a"])]).save(tmp_path / "r.jsonl")
    line = (tmp_path / "r.jsonl").read_bytes().strip()
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")

    assert References.load(tmp_path / "r.jsonl")("p") == ("a",)


def test_pairs_are_checked() -> None:
    """Called by name; texts in the place of lists are refused, not compared by letters."""
    scorer = MeanWin(BradleyTerry(), lambda _: ["0"])

    assert scorer(prompts=["p"], completions=["0.5"]) == pytest.approx([sigmoid(0.5)])
    with pytest.raises(TypeError, match="got the text '12'"):
        scorer(["p", "p"], "12")


def test_rounding_is_no_error() -> None:
    """A softmax in float32 may end a little outside."""
    assert compare(lambda *_: [1 + 1e-7, -1e-7], ["p"] * 2, ["a"] * 2, ["b"] * 2).tolist() == [1.0, 0.0]


def test_lists_of_one_length() -> None:
    """A comparison without its second is refused."""
    with pytest.raises(ValueError, match="got 1, 1 and 0"):
        compare(BradleyTerry(), ["p"], ["1"], [])


def test_references_on_disk(tmp_path) -> None:
    """Texts, halves of emojis, messages: as they were; in whatever order they came, the same bytes."""
    rows = [("p", ["a\n", "\ud83d", "ü"]), (CHAT, [REPLY, "b"])]
    first, second = References.of(rows), References.of(rows[::-1])
    first.save(tmp_path / "a.jsonl")
    second.save(str(tmp_path / "b.jsonl"))

    loaded = References.load(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert [list(loaded(prompt)) for prompt, _ in rows] == [completions for _, completions in rows]
    assert fingerprint(loaded) == fingerprint(first) == fingerprint(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    "rows",
    [[("p", ["a"])], [("q", ["a", "b"])], [("p", ["b", "a"])], [("p", ["a", "b"]), ("q", ["c"])]],
    ids=["fewer", "another prompt", "another order", "one more prompt"],
)
def test_other_references_are_another_scorer(rows) -> None:
    """Their digest is part of the fingerprint."""
    scorers = [MeanWin(BradleyTerry(), References.of(given)) for given in ([("p", ["a", "b"])], rows)]

    assert fingerprint(scorers[0]) != fingerprint(scorers[1])


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "line 2 is no row"),
        ('{"key": "00"}', "line 2 is no row"),
        ('{"key": "xy", "completions": ["a"]}', "line 2 is no row"),
        ('{"key": "00", "completions": ["a"]}', "line 2 needs a key of 16 bytes, got 1"),
        ('{"key": "' + "00" * 16 + '", "completions": []}', "references are a list of completions"),
        ('{"key": "' + prompt_key("p").hex() + '", "completions": ["a"]}', "got two"),
    ],
)
def test_files_that_are_none(tmp_path, line, rule) -> None:
    """Each broken line with what is wrong with it."""
    References.of([("p", ["a"])]).save(tmp_path / "r.jsonl")
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write(line + "\n")

    with pytest.raises(ValueError, match=rule):
        References.load(tmp_path / "r.jsonl")


@pytest.mark.parametrize("rows", [[("p", [])], [("p", "text")], [("p", ["a"]), ("p", ["b"])]])
def test_references_that_make_no_sense(rows) -> None:
    """None, a text in place of a list, and two lists for one prompt."""
    with pytest.raises(ValueError, match="references"):
        References.of(rows)


def test_it_is_a_scorer() -> None:
    """It goes through the one check of scores, pickles, and takes nothing."""
    scorer = MeanWin(BothOrders(BradleyTerry(2.0)), References.of([("p", ["0"])]))

    assert score(pickle.loads(pickle.dumps(scorer)), ["p"], ["1"]) == pytest.approx(
        [sigmoid(3) / 2 + (1 - sigmoid(1)) / 2]
    )
    assert scorer([], []).shape == (0,)
    assert fingerprint(scorer)["preference"]["kind"] == "both orders"
