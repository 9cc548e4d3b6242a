"""Any callable is a scorer; what it answers is checked in one place."""

import functools
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import classifier, tokenizer

from calibrated_rewards.scorers import fingerprint, score
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.protocol import Fingerprinted


def lengths(_prompts: Sequence[Any], completions: Sequence[Any]) -> list[int]:
    return [len(completion) for completion in completions]


class Answers:
    """A scorer that answers what it was made with."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, _prompts: Sequence[Any], _completions: Sequence[Any], /) -> Any:
        """That."""
        return self.answer


ANSWERS = {
    "list": [1, 2.5, True],
    "tuple": (1.0, 2.5, 1.0),
    "float64": np.array([1, 2.5, 1]),
    "float16": np.array([1, 2.5, 1], np.float16),
    "numpy scalars": [np.float64(1), np.float32(2.5), np.int64(1)],
    "tensor": torch.tensor([1, 2.5, 1]),
    "bfloat16": torch.tensor([1, 2.5, 1], dtype=torch.bfloat16),
    "with a gradient": torch.tensor([1, 2.5, 1], requires_grad=True),
    "integers": torch.tensor([2, 5, 2]) / 2,
    "tensors": [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(1.0)],
    "tensors of a training step": list(torch.tensor([1, 2.5, 1], dtype=torch.bfloat16, requires_grad=True)),
    "a mapped array": np.array([1, 2.5, 1], np.float32)[::1],
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_answers_of_all_kinds(answer: Any) -> None:
    """Lists, arrays and tensors of any precision become one float32 array."""
    found = score(Answers(answer), ["p"] * 3, ["a", "b", "c"])

    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [1, 2.5, 1])


def test_functions_methods_and_models() -> None:
    """What can be called with two lists is a scorer."""
    expected = [2.0, 1.0]
    for scorer in (lengths, lambda _, completions: [len(c) for c in completions], functools.partial(lengths)):
        np.testing.assert_array_equal(score(scorer, ["p", "q"], ["ab", "c"]), expected)
    made = SequenceClassifier(classifier(), tokenizer(), show_progress=False)
    np.testing.assert_array_equal(score(made, ["p", "q"], ["ab", "c"]), made(["p", "q"], ["ab", "c"]))


def test_functions_as_trl_calls_them() -> None:
    """TRL calls by name: no prompts, another order, keywords only; what needs another column is refused."""

    def alone(completions, **_):
        return [len(completion) for completion in completions]

    def swapped(completions, prompts, **_):
        return [len(c) - len(p) for p, c in zip(prompts, completions, strict=True)]

    def by_name(*, completions, prompts, scale=1.0):
        return [scale * (len(c) - len(p)) for p, c in zip(prompts, completions, strict=True)]

    def without_prompts(completions, weight=2.0):
        return [weight * len(completion) for completion in completions]

    def solved(completions, solution, **_):
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    prompts, completions = ["ab", "abc"], ["x", "wxyz"]
    assert score(alone, prompts, completions).tolist() == [1.0, 4.0]
    assert score(swapped, prompts, completions).tolist() == [-1.0, 1.0]
    assert score(by_name, prompts, completions).tolist() == [-1.0, 1.0]
    assert score(without_prompts, prompts, completions).tolist() == [2.0, 8.0]
    assert score(functools.partial(by_name, scale=2.0), prompts, completions).tolist() == [-2.0, 2.0]

    def by_place(prompts, completions, solution, **_):
        return solved(completions, solution)[: len(prompts)]

    for lacking in (solved, by_place):
        with pytest.raises(TypeError, match=f"{lacking.__name__} needs solution beside prompts and completions"):
            score(lacking, prompts, completions)


def test_functions_for_messages_are_given_texts() -> None:
    """A function that reads messages alone fails on texts of chats; its own error says what it is given."""

    def reads_messages(completions, **_):
        return [len(completion[0]["content"]) for completion in completions]

    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TypeError) as raised:
        score(reads_messages, [chat], ["Hello"])
    assert "completions are texts here" in "".join(raised.value.__notes__)
    with pytest.raises(TypeError) as raised:
        score(reads_messages, ["Hi"], ["Hello"])
    assert not hasattr(raised.value, "__notes__")


def test_answers_of_other_functions() -> None:
    """A function of one pair, and an asynchronous one, are told what to do."""

    async def waits(completions, **_):
        return [1.0 for _ in completions]

    with pytest.raises(TypeError, match=r"waits is asynchronous, .* asyncio\.run"):
        score(waits, ["p"], ["c"])
    with pytest.raises(ValueError, match=r"shape \(\) for 2. A function of one prompt .* .*\.scorers\.Function"):
        score(lambda prompt, completion: 1.0, ["p", "q"], ["a", "b"])


def test_nothing_to_score() -> None:
    """The scorer is not asked."""
    found = score(Answers(ZeroDivisionError), [], [])

    assert (found.shape, found.dtype) == ((0,), np.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_scores_that_are_no_numbers(bad: Any) -> None:
    """The first one's prompt and completion are named, and how many others there are."""
    with pytest.raises(
        ValueError, match=r"finite number, .*Answers gave .* for completion 'b' of prompt 'q' \(and 1 other"
    ):
        score(Answers([1.0, bad, bad]), ["p", "q", "r"], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("answer", "shape"),
    [([1.0], r"\(1,\)"), ([1.0] * 3, r"\(3,\)"), ([[1.0], [2.0]], r"\(2, 1\)"), (1.0, r"\(\)"), ([], r"\(0,\)")],
)
def test_answers_of_another_shape(answer: Any, shape: str) -> None:
    """One number for each completion, not fewer, more, or rows of them."""
    with pytest.raises(ValueError, match=rf"one number a completion, .*Answers gave shape {shape} for 2"):
        score(Answers(answer), ["p", "q"], ["a", "b"])


@pytest.mark.parametrize("answer", [["good", "bad"], [[1.0], [1.0, 2.0]], {"score": 1.0}, [{}, {}]])
def test_answers_that_are_no_numbers(answer: Any) -> None:
    """A TypeError shows them."""
    with pytest.raises(TypeError, match=r"Answers gave no list of numbers: [\[{]"):
        score(Answers(answer), ["p", "q"], ["a", "b"])


@pytest.mark.parametrize("answer", [["1", "2"], [1 + 2j, 0], np.array([b"1", b"2"])], ids=str)
def test_what_only_looks_like_numbers(answer: Any) -> None:
    """Digits are text, and a complex number has no order."""
    with pytest.raises(TypeError, match="gave no list of numbers"):
        score(Answers(answer), ["p", "q"], ["a", "b"])


def test_lists_are_lists() -> None:
    """Iterators are read once, before anybody is asked; texts in the place of lists and no completions are refused."""
    assert score(lengths, iter(["p", "q"]), (c for c in ("ab", "c"))).tolist() == [2, 1]
    for prompts, completions in (("ab", ["a", "b"]), (["a", "b"], "ab"), (["a"], iter([None])), (["a"], iter([3]))):
        with pytest.raises(TypeError, match="a list"):
            score(lengths, prompts, completions)


def test_scores_are_a_copy() -> None:
    """The scorer may go on to use its own array."""
    own = np.array([1.0, 2.0], np.float32)
    score(Answers(own), ["p", "q"], ["a", "b"])[0] = 9

    assert own[0] == 1


def test_lists_of_two_lengths() -> None:
    """Each completion needs its prompt."""
    with pytest.raises(ValueError, match="each completion needs its prompt, got 1 prompts and 2 completions"):
        score(lengths, ["p"], ["a", "b"])


def test_fingerprints() -> None:
    """A scorer's own; for one that has none, its name and its code."""
    made = SequenceClassifier(classifier(), tokenizer(), show_progress=False)

    assert isinstance(made, Fingerprinted)
    assert fingerprint(made) == made.fingerprint()
    said = fingerprint(lengths)
    assert (said["kind"], said["name"]) == ("callable", f"{__name__}.lengths")
    assert said["code"] == fingerprint(FunctionType(lengths.__code__, {}))["code"] != fingerprint(score)["code"]
    assert fingerprint(Answers(1))["name"] == f"{__name__}.Answers"
    assert fingerprint(Answers(1))["state"] == {"answer": 1} != fingerprint(Answers(2))["state"]
    logits = fingerprint(made.logits)
    assert logits["name"] == "calibrated_rewards.SequenceClassifier.logits"
    other = SequenceClassifier(classifier(seed=1), tokenizer(), show_progress=False)
    assert logits["state"] != fingerprint(other.logits)["state"]
    assert fingerprint(functools.partial(lengths, x=1))["name"] == said["name"]
    assert fingerprint(functools.partial(lengths, x=1)) != fingerprint(functools.partial(lengths, x=2))
