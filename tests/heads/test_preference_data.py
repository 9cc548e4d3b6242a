"""Rows to pairs as TRL reads them, templates and choices, and the order of tasks."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from trl.data_utils import maybe_extract_prompt

from calibrated_rewards.heads import Pair, PairReader, TaskTemplate, order_pairs, parse_pairs

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "2+2="), ("assistant", "4"), ("assistant", "5"))
)
TURNS = [USER, {"role": "assistant", "content": "Why?"}, {"role": "user", "content": "Homework."}]

ROWS = {
    "explicit text": ({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, ("2+2=", " 4", " 5")),
    "explicit chat": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
    "implicit chat": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
    "several turns": ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, (TURNS, [GOOD], [BAD])),
    "several turns, explicit": ({"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}, (TURNS, [GOOD], [BAD])),
    "prompt repeated": ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
    "text of the prompt beside chats": (
        {"prompt": "2+2=", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        ([USER], [GOOD], [BAD]),
    ),
    "text of the prompt before answers": (
        {"prompt": "2+2=", "chosen": [GOOD], "rejected": [BAD]},
        ([USER], [GOOD], [BAD]),
    ),
    "None-valued keys": (
        {"prompt": None, "chosen": [{**USER, "name": None}, GOOD], "rejected": [USER, {**BAD, "name": None}]},
        ([USER], [GOOD], [BAD]),
    ),
    "implicit text": ({"chosen": "To be good", "rejected": "To be bad"}, ("To be", " good", " bad")),
    "nothing in common": ({"chosen": "good", "rejected": "gone"}, ("", "good", "gone")),
    "chat prompt, text answers": ({"prompt": [USER], "chosen": "4", "rejected": "5"}, ([USER], "4", "5")),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_trls_formats(name: str) -> None:
    """Each form of TRL's preference format gives its prompt and its two completions."""
    row, expected = ROWS[name]
    assert [tuple(pair)[:3] for pair in parse_pairs(row)] == [expected]


@pytest.mark.parametrize("name", ["explicit chat", "implicit chat", "several turns"])
def test_as_trl_extracts_prompts(name: str) -> None:
    """TRL's own extraction gives the same three columns."""
    row, _ = ROWS[name]
    theirs = maybe_extract_prompt(dict(row))
    (pair,) = parse_pairs(row)
    assert [pair.prompt, pair.chosen, pair.rejected] == [theirs[column] for column in ("prompt", "chosen", "rejected")]


@given(shared=st.text("ab ", max_size=12), good=st.text("ab ", max_size=8), bad=st.text("ab ", max_size=8))
def test_implicit_texts_stay_whole(shared: str, good: str, bad: str) -> None:
    """Prompt and completion together are the text of the row, whatever they share, and no word is cut."""
    if shared + good == shared + bad:
        return
    (pair,) = parse_pairs({"chosen": shared + good, "rejected": shared + bad})
    assert pair.prompt + pair.chosen == shared + good
    assert pair.prompt + pair.rejected == shared + bad
    assert not pair.prompt or (pair.chosen[0].isspace() and pair.rejected[0].isspace())


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"chosen": "a", "rejected": "a"}, ValueError, "row 7: a preference has two completions, got 'a' twice"),
        ({"prompt": "a", "chosen": "b"}, ValueError, "row 7 has no 'rejected', it has prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, TypeError, "both texts or both messages"),
        ({"chosen": [USER, GOOD], "rejected": [USER, TURNS[2]]}, ValueError, "ends with an assistant's message"),
        (
            {"prompt": "a", "chosen": 1, "rejected": 2},
            TypeError,
            "row 7: chosen is a text or a list of messages, got 1",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, ValueError, "row 7: chats without a prompt begin with it, both alike"),
        ({"prompt": "a", "choices": ["b", "c"], "label": 2}, ValueError, "one of 2 answers, from 0 to 1, got 2"),
        ({"prompt": "a", "choices": ["b", "c"], "label": True}, ValueError, "got True"),
        ({"prompt": "a", "choices": ["b", "c"], "label": 1.0}, ValueError, "got 1.0"),
        ({"prompt": "a", "choices": ["b", "c"], "label": "c"}, ValueError, "from 0 to 1, got 'c'"),
        ({"prompt": "a", "choices": ["b", "c"], "label": "-1"}, ValueError, "from 0 to 1, got '-1'"),
        ({"prompt": "a", "choices": ["1", "2"], "label": "1"}, ValueError, "is the number of the answer '2', and is"),
        (
            {"prompt": 5, "chosen": "a", "rejected": "b"},
            TypeError,
            "row 7: prompt is a text or a list of messages, got 5",
        ),
        ({"prompt": {"a": 1}, "chosen": "a", "rejected": "b"}, TypeError, "row 7: prompt is a text or a list of"),
        ({"prompt": [{"content": "x"}], "chosen": [GOOD], "rejected": [BAD]}, TypeError, "row 7: prompt is .*role"),
        (
            {"prompt": "a", "chosen": ["a"], "rejected": ["b"]},
            TypeError,
            "row 7: chosen is a text or a list of messages",
        ),
        ({"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}, ValueError, "row 7: a text is whole characters"),
        ({"prompt": "a", "choices": "bc", "label": 0}, TypeError, "row 7: choices is a list of answers, got 'bc'"),
        (
            {"prompt": "a", "choices": {"text": ["b"]}, "label": 0},
            TypeError,
            "row 7: choices is a list of answers, got",
        ),
        ({"prompt": "a", "choices": ["b"], "label": 0}, ValueError, "row 7: .* which needs 2 answers, got 1"),
        ({"prompt": "a", "choices": [], "label": 0}, ValueError, "which needs 2 answers, got 0"),
        (
            {"prompt": "a", "choices": ["b", "c"], "answer": 1},
            ValueError,
            "row 7 has no 'label', it has prompt, choices",
        ),
        ({"choices": ["b", "c"], "label": 1}, ValueError, "row 7 has no 'prompt', it has choices, label"),
    ],
)
def test_rows_without_a_pair(row: dict[str, Any], error: type[Exception], message: str) -> None:
    """What is no preference is refused by its place."""
    with pytest.raises(error, match=message):
        list(PairReader().read([("row 7", row)]))
    with pytest.raises(TypeError, match="row 8: a preference is a row with chosen and rejected, got 'text'"):
        list(PairReader().read([("row 8", "text")]))


@pytest.mark.parametrize("label", [1, "1", " 1\n", np.int64(1)], ids=repr)
def test_a_label_may_be_a_text(label: Any) -> None:
    """A whole number in quotes, as CSV files and many data sets have it, is the number."""
    assert parse_pairs({"prompt": "a", "choices": ["b", "c"], "label": label}) == [Pair("a", "c", "b")]
    assert TaskTemplate("{x}", answers=("b", "c")).make_pairs({"x": "a", "label": label}) == [Pair("a", "c", "b")]


def test_templates_of_tasks() -> None:
    """Each task's rows are written by its own template; answers come from labels, choices or columns."""
    reader = PairReader(
        {
            "entailment": TaskTemplate("{premise}|{claim}", answers=("yes", "no", "maybe"), label="y", system="Judge."),
            "choice": TaskTemplate("Q: {question}", choices="options", chat=True),
            "written": TaskTemplate("{topic}?"),
        }
    )
    rows: list[tuple[str, dict[str, Any]]] = [
        ("0", {"task": "entailment", "premise": "{claim}", "claim": "b", "y": 2}),
        ("1", {"task": "choice", "question": "q", "options": ["x", "y"], "label": 0, "head": "truth"}),
        ("2", {"task": "written", "topic": "t", "chosen": "c", "rejected": "r"}),
        ("3", {"task": "plain", "prompt": "p", "chosen": "c", "rejected": "r"}),
    ]
    system = {"role": "system", "content": "Judge."}
    entailment = [system, {"role": "user", "content": "{claim}|b"}]
    assert list(reader.read(rows)) == [
        Pair(entailment, "maybe", "yes", "entailment"),
        Pair(entailment, "maybe", "no", "entailment"),
        Pair([{"role": "user", "content": "Q: q"}], "x", "y", "choice", "truth"),
        Pair("t?", "c", "r", "written"),
        Pair("p", "c", "r", "plain"),
    ]
    assert [pair.task for pair in reader.read([rows[2]], task="written")] == ["written"]
    with pytest.raises(ValueError, match="4 has no 'topic', it has task"):
        list(reader.read([("4", {"task": "written"})]))
    with pytest.raises(ValueError, match="names columns in braces"):
        TaskTemplate("no columns")


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(sizes=SIZES, epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_by_size_each_pair_comes_once_an_epoch(sizes: list[int], epochs: int, seed: int) -> None:
    """With mix="size" every epoch is a permutation of all pairs."""
    tasks = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    order = order_pairs(tasks, epochs, seed=seed).reshape(epochs, len(tasks))
    assert (np.sort(order) == np.arange(len(tasks))).all()
    assert (order_pairs(tasks, epochs, seed=seed).reshape(order.shape) == order).all()


@given(sizes=SIZES, epochs=st.integers(1, 5), seed=st.integers(0, 9))
def test_uniform_tasks_come_equally_often(sizes: list[int], epochs: int, seed: int) -> None:
    """With mix="uniform" tasks come equally often, but for rounding, and a task's pairs too, pass after pass."""
    tasks = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    order = order_pairs(tasks, epochs, mix="uniform", seed=seed)
    counts = Counter(tasks[i] for i in order.tolist())
    assert len(order) == epochs * len(tasks)
    assert max(counts.values()) - min(counts.get(name, 0) for name in set(tasks)) <= 1
    for name in set(tasks):
        times = [list(order).count(i) for i, task in enumerate(tasks) if task == name]
        assert max(times) - min(times) <= 1


def test_tasks_are_interleaved_and_shuffled() -> None:
    """Tasks are spread over an epoch, in another order in each; no part of it is of one task alone."""
    tasks = ["a"] * 300 + ["b"] * 100
    order = order_pairs(tasks, 2, seed=3)
    share = np.array([tasks[i] == "b" for i in order.tolist()]).reshape(16, 50).sum(1)
    assert share.min() >= 11
    assert share.max() <= 14
    assert not (order[:400] == order[400:]).any() or (order[:400] == order[400:]).mean() < 0.05
    assert (np.diff(order[:40]) != 1).sum() > 30
    with pytest.raises(ValueError, match="mixed by size or uniform, got mix=root"):
        order_pairs(tasks, mix="root")


def test_columns_that_are_null() -> None:
    """Rows of both kinds in one Parquet file have each other's columns, without values."""
    both = {"prompt": "a", "chosen": None, "rejected": None, "choices": None, "label": None}
    assert parse_pairs(both | {"chosen": "b", "rejected": "c"}) == [Pair("a", "b", "c")]
    assert parse_pairs(both | {"choices": ["b", "c"], "label": 1}) == [Pair("a", "c", "b")]
