"""Function: one pair at a time, under a name that a calibration knows again."""

import math
import pickle

import numpy as np
import pytest

from calibrated_rewards.scorers.ensemble import Function
from calibrated_rewards.scorers.protocol import fingerprint, score


def overlap(prompt, completion):
    """Letters that both have."""
    return len(set(prompt) & set(completion))


class Counter:
    """Something with a method."""

    def count(self, prompt, completion):
        """A number."""
        return 1.0


def test_it_scores_pair_by_pair() -> None:
    """Each completion meets its own prompt, in order; the answer is float32."""
    prompts, completions = ["abc", "xyz", "abc"], ["bcd", "abc", "cab"]

    scores = Function(overlap)(prompts, completions)

    assert scores.dtype == np.float32
    assert scores.tolist() == [2.0, 0.0, 3.0]
    assert np.array_equal(
        scores, score(lambda p, c: [overlap(*pair) for pair in zip(p, c, strict=True)], prompts, completions)
    )


@pytest.mark.parametrize(
    "answer", [1, True, 1.0, np.float32(1), np.int64(1), np.array(1.0)], ids=lambda x: type(x).__name__
)
def test_any_number_will_do(answer) -> None:
    """Whatever Python, or numpy, calls a number."""
    assert Function(lambda prompt, completion: answer, name="one")(["p"], ["c"]).tolist() == [1.0]


def test_it_is_named_after_its_place() -> None:
    """Module and function, and the version that was given."""
    assert Function(overlap, version="3").fingerprint() == {
        "kind": "function",
        "name": f"{__name__}.overlap",
        "version": "3",
    }
    assert Function(math.copysign).name == "math.copysign"


def test_another_version_is_another_scorer() -> None:
    """Name and version each tell two apart."""
    prints = [fingerprint(Function(overlap, name, version)) for name in ("a", "b") for version in ("1", "2")]

    assert len({str(said) for said in prints}) == 4


@pytest.mark.parametrize("function", [lambda p, c: 0.0, Counter().count, Counter], ids=["lambda", "method", "class"])
def test_what_stands_nowhere_needs_a_name(function) -> None:
    """Two lambdas have one name, a method does not say what its object holds."""
    with pytest.raises(ValueError, match="say name="):
        Function(function)

    assert Function(function, name="mine").name == "mine"


def test_an_error_says_for_what() -> None:
    """The function's own error comes through, with the pair it was scoring."""
    with pytest.raises(ZeroDivisionError) as caught:
        Function(lambda prompt, completion: 1 / len(completion), name="inverse")(["p", "the prompt"], ["c", ""])

    assert caught.value.__notes__ == ["inverse was scoring '' for the prompt 'the prompt'"]


def test_nothing_to_score() -> None:
    """No pairs, no scores; unequal lists are refused."""
    assert Function(overlap)([], []).shape == (0,)
    with pytest.raises(ValueError, match="each completion needs its prompt"):
        Function(overlap)(["p"], [])


def test_what_is_no_score() -> None:
    """Its nan is its error, with the pair; a text in the place of a list is refused; it may be called by name."""
    with pytest.raises(ValueError, match="half gave nan for completion 'c' of prompt 'p'"):
        Function(lambda prompt, completion: math.nan, name="half")(prompts=["p"], completions=["c"])
    with pytest.raises(TypeError, match="got the text 'pq'"):
        Function(overlap)("pq", "ab")


def test_it_pickles() -> None:
    """By its place, as functions do."""
    assert pickle.loads(pickle.dumps(Function(overlap))) == Function(overlap)
