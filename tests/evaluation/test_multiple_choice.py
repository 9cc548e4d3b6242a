"""Multiple choice: the highest score answers, ties share, and answers are read in every form that data sets have."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from calibrated_rewards.evaluation import Question, answer_questions, read_questions
from calibrated_rewards.testing.suites import HashScorer, NumberScorer


@given(
    st.lists(st.tuples(st.lists(st.integers(-3, 3), min_size=2, max_size=5), st.integers(0, 9)), min_size=1, max_size=8)
)
def test_accuracy_is_the_chance_of_a_random_tie_break(rows):
    """One by one: the share of the best options that is right, averaged over questions."""
    questions = [Question(f"{i}", tuple(map(str, options)), at % len(options)) for i, (options, at) in enumerate(rows)]
    answers = answer_questions(questions, {"a": NumberScorer(), "b": NumberScorer(default=1.0)})
    expected = [(options[at % len(options)] == max(options)) / options.count(max(options)) for options, at in rows]
    assert answers.right["a"].value == pytest.approx(np.mean(expected))
    assert answers.differences["a", "b"].value == 0.0
    assert answers.tied["a"] == pytest.approx(np.mean([options.count(max(options)) > 1 for options, _ in rows]))
    assert [len(row) for row in answers.scores["a"]] == [len(options) for options, _ in rows]


def test_a_difference_is_paired():
    """Its interval is that of the differences, not of two independent accuracies."""
    questions = [Question(f"{i}", ("1", "0"), 0) for i in range(200)]
    answers = answer_questions(questions, {"right": NumberScorer(), "chance": HashScorer()})
    gap = answers.differences["right", "chance"]
    assert answers.right["right"].value == 1.0
    assert gap.value == pytest.approx(1 - answers.right["chance"].value)
    assert gap.low == pytest.approx(1 - answers.right["chance"].high, abs=0.01)
    assert str(answers).startswith("right is right on 1.000 of 200 questions.\nchance: 0.")


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"choices": ["3", "4"], "answer": 1}, 1),
        ({"choices": ["3", "4"], "answer": "B"}, 1),
        ({"choices": ["3", "4"], "answer": "4"}, 1),
        ({"choices": ["x", "y"], "answer": "1"}, 1),
        ({"choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answer": "2"}, 1),
        ({"choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answer": "1"}, 0),
    ],
)
def test_an_answer_is_a_number_a_letter_or_the_option(row, answer):
    """As the data sets of the field have it."""
    assert [*read_questions([{"prompt": "2+2=", **row}])] == [Question("2+2=", tuple(_texts(row)), answer)]


def _texts(row):
    return row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"choices": ["3"], "answer": 0}, "row 0: a question has two options or more"),
        ({"choices": ["3", "4"], "answer": "five"}, "row 0: .*answer=-1"),
        ({"choices": ["3", "4"], "answer": 2}, "answer=2"),
        ({"options": ["3", "4"], "answer": 0}, "row 0 has no column 'choices'"),
    ],
)
def test_a_wrong_row_is_named(row, why):
    """With its place."""
    with pytest.raises(ValueError, match=why):
        [*read_questions([{"prompt": "2+2=", **row}])]


def test_limit_and_none():
    """The first rows alone; no questions are an error."""
    rows = [{"prompt": f"{i}", "choices": ["a", "b"], "answer": 0} for i in range(5)]
    assert len([*read_questions(rows, limit=2)]) == 2
    with pytest.raises(ValueError, match="got 0 and 1"):
        answer_questions([], {"a": NumberScorer()})
