"""Labels: each rule against its formula in torch, and the choice of one by number and names."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from calibrated_rewards.models.labels import (
    FIRST_PAIRS,
    Difference,
    Expected,
    Label,
    Labels,
    Ordinal,
    Weighted,
    apply_first_rules,
    labels_of,
    resolve_labels,
)

LOGITS = np.random.default_rng(0).normal(scale=3, size=(50, 4)).astype(np.float32)
TENSOR = torch.tensor(LOGITS, dtype=torch.float64)
VALUES = (1.0, 2.0, 3.0, 5.0)

BY_TORCH = {
    Label(): TENSOR[:, 0],
    Label(2): TENSOR[:, 2],
    Label(-1): TENSOR[:, 3],
    Difference(): TENSOR[:, 1] - TENSOR[:, 0],
    Difference(good=0, bad=-1): TENSOR[:, 0] - TENSOR[:, 3],
    Expected(VALUES): TENSOR.softmax(1) @ torch.tensor(VALUES, dtype=torch.float64),
    Ordinal(): TENSOR.sigmoid().sum(1),
    Weighted(VALUES): TENSOR @ torch.tensor(VALUES, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (Expected, (1, float("nan"))),
        (Expected, (2, 2)),
        (Expected, ()),
        (Weighted, (1, float("inf"))),
        (Weighted, (0, 0)),
    ],
)
def test_numbers_that_make_no_score_are_refused(make: Any, numbers: tuple[float, ...]) -> None:
    """With equal values, or weights of 0, all scores would be the same; with nan they would be none."""
    with pytest.raises(ValueError, match=f"{make.__name__} needs finite .* got "):
        make(numbers)


@pytest.mark.parametrize("labels", BY_TORCH, ids=repr)
def test_each_rule_is_its_formula(labels: Labels) -> None:
    """In float32, one number for each row."""
    found = labels(LOGITS)

    assert (found.shape, found.dtype) == ((50,), np.float32)
    np.testing.assert_allclose(found, BY_TORCH[labels].numpy(), rtol=1e-6, atol=1e-6)
    assert labels(LOGITS[:0]).shape == (0,)


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_no_number_is_too_large(logits: list[float]) -> None:
    """Softmax and sigmoid neither overflow nor warn; the mean of the values lies among them."""
    rows = np.array([logits], np.float32)

    assert 1 - 1e-6 <= Expected(VALUES)(rows)[0] <= 5 + 1e-6
    assert 0 <= Ordinal()(rows)[0] <= 4


def test_two_labels_order_alike() -> None:
    """The log-odds of two labels are those of their softmax, and tell apart what probabilities make 1."""
    two = LOGITS[:, :2] * 20
    probability = torch.tensor(two).softmax(1)[:, 1].numpy()
    odds = Difference()(two)

    assert (np.diff(probability[np.argsort(odds)]) >= 0).all()
    assert len(set(odds)) > len(set(probability))


def test_a_label_minus_itself_is_no_score() -> None:
    """A difference of a label with itself is refused: all scores would be 0."""
    with pytest.raises(ValueError, match="a difference is of two labels"):
        Difference(good=1, bad=1)


def test_labels_that_there_are_not() -> None:
    """The rule and how many there are is in the error."""
    for labels in (Label(4), Label(-5), Difference(good=4, bad=0), Difference(good=0, bad=4)):
        with pytest.raises(IndexError, match=r"no label .*, it has 4: name one that it has, with labels=Label\(i\)$"):
            labels(LOGITS)
    for rule in (Expected, Weighted):
        with pytest.raises(ValueError, match=rf"{rule.__name__}\(.*\) has 3 values, the model has 4 labels"):
            rule((1, 2, 3))(LOGITS)


@pytest.mark.parametrize("labels", BY_TORCH, ids=repr)
def test_rules_are_values(labels: Any) -> None:
    """They compare and print as the call that makes them, which a fingerprint is made of."""
    assert eval(repr(labels)) == labels
    assert hash(labels) == hash(eval(repr(labels)))
    assert repr(Expected((1, 2))) == repr(Expected((1.0, 2.0)))


# Which is the better one is said by each of these pairs of names, good first: none but a few is in a list of pairs.
GOOD_FIRST = [
    *sorted(FIRST_PAIRS),
    ("preferred", "dispreferred"),
    ("preferred", "not preferred"),
    ("win", "lose"),
    ("WINNER", "LOSER"),
    ("won", "lost"),
    ("good answer", "bad answer"),
    ("a better response", "a worse response"),
    ("1", "0"),
    ("1.0", "0.0"),
    ("+1", "-1"),
    ("5 stars", "1 star"),
    ("five stars", "one star"),
    ("rank 1", "rank 2"),
    ("1st", "2nd"),
    ("rank_0", "rank_1"),
    ("helpful", "not helpful"),
    ("helpful", "NotHelpful"),
    ("not toxic", "toxic"),
    ("non-toxic", "toxic"),
    ("nontoxic", "toxic"),
    ("NOT_HATE", "HATE"),
    ("neutral", "toxic"),
    ("harmless", "toxic"),
    ("acceptable", "offensive"),
    ("inoffensive", "offensive"),
    ("high quality", "low quality"),
    ("low risk", "high risk"),
    ("less harmful", "more harmful"),
    ("0: safe", "1: unsafe"),
    ("toxicity 0", "toxicity 1"),
    ("no harm", "harm"),
    ("upvoted", "downvoted"),
    ("success", "failure"),
    ("solved", "unsolved"),
    ("pos", "neg"),
    ("LIKED", "DISLIKED"),
]


def test_one_and_two() -> None:
    """One label is its logit, two are log-odds, the second's where nobody named them."""
    assert labels_of({0: "3 stars"}) == Label(0)
    assert labels_of({0: "LABEL_0", 1: "LABEL_1"}) == labels_of({0: "label_0", 1: "label_1"}) == Difference(1, 0)


@pytest.mark.parametrize(("good", "bad"), GOOD_FIRST)
def test_names_of_good_and_bad(good: str, bad: str) -> None:
    """Where the names say which of two labels is the good one, it is, in either order and any case."""
    assert labels_of({0: good.upper(), 1: f" {bad}"}) == Difference(good=0, bad=1)
    assert labels_of({0: bad, 1: good.capitalize()}) == Difference(good=1, bad=0)


@pytest.mark.parametrize(
    "names",
    [
        ("good", "something else"), ("cat", "dog"), ("A", "B"), ("first", "second"), ("response 1", "response 2"),
        ("gpt4", "llama2"), ("model1", "model2"), ("entailment", "not_entailment"), ("high", "low"), ("left", "right"),
        ("toxic", "severe_toxic"), ("false positive", "true positive"), ("refusal", "compliance"), ("3", "3"),
        ("good", "LABEL_1"), ("1-2", "3-4"), ("human", "ai"), ("", ""), ("yes", "yes"), ("v1", "v2"),
        ("1", "2"), ("one", "two"), ("class 1", "class 2"), ("A is better", "B is better"), ("A wins", "B wins"),
        ("tier 1", "tier 2"),
        ("chosen_a", "chosen_b"), ("0 good", "1 good 2"), ("ham", "spam"),
    ],
)  # fmt: skip
def test_names_that_do_not_say_it_are_asked_about(names: tuple[str, str]) -> None:
    """In either order, with both labels and how each is said, in Python and on the command line."""
    for first, second in (names, names[::-1]):
        with pytest.raises(ValueError, match="do not say which is the better one") as raised:
            labels_of({0: first, 1: second})
        told = f"if it is {first!r}, say labels=Difference(good=0, bad=1); if {second!r}, "
        for part in (told, "labels=Difference(good=1, bad=0)"):
            assert part in str(raised.value)


def test_ids_that_do_not_count_from_zero() -> None:
    """The outputs are in the order of the ids, also where these are 1 to n or stand in another order."""
    assert labels_of({3: "3 stars", 1: "1 star", 2: "2 stars"}) == Expected((1, 2, 3))
    assert labels_of({10: "bad", 9: "good"}) == Difference(good=0, bad=1)


@pytest.mark.parametrize("names", [["LABEL_0"], ["bad", "good"], ["good", "bad"], ["1", "2", "3"]])
def test_head_of_another_width(names: list[str]) -> None:
    """A head with another number of outputs than the config has names is not read by its first columns."""
    with pytest.raises(ValueError, match=rf"{len(names)} (labels|values).* 4"):
        labels_of(dict(enumerate(names)))(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], (1, 2, 3, 4, 5)),
        (["-1", "0", "+1"], (-1, 0, 1)),
        (["grade-1", "grade-2", "grade-3"], (1, 2, 3)),
        (["score -1", "score: .5", "\u22122"], (-1, 0.5, -2)),
        (["score: 0.5", "score: 1.25", "score: 2"], (0.5, 1.25, 2)),
        (["one star", "two stars", "three stars"], (1, 2, 3)),
        (["rank 1", "rank 2", "rank 3"], (-1, -2, -3)),
        (["toxicity 0", "toxicity 1", "toxicity 2"], (0, -1, -2)),
        (["0_harmless", "1_mild", "2_harmful"], (0, -1, -2)),
        (["1 terrible", "3 so-so", "5 excellent"], (1, 3, 5)),
    ],
)
def test_numbers_in_names(names: list[str], values: tuple[float, ...]) -> None:
    """Names with one number each are worth those numbers."""
    found = labels_of(dict(enumerate(names)))
    assert found == Expected(values)
    sure = np.full((1, len(names)), -100, np.float32)
    sure[0, -1] = 100
    assert found(sure)[0] == values[-1]


@pytest.mark.parametrize(
    "names",
    [
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["bad", "fair", "good"],
        ["1-2", "3-4", "5-6"],
        ["negative", "neutral", "positive"],
        ["response 1", "response 2", "response 3"],
        ["0 good", "1 bad", "2 good"],
    ],
)
def test_no_numbers(names: list[str]) -> None:
    """Labels without a name, without a number or with two are for the user to decide."""
    with pytest.raises(ValueError, match=r"3 labels.*say how they make one score") as raised:
        labels_of(dict(enumerate(names)))
    assert names[2] in str(raised.value)


def config(*names: str, **settings: Any) -> Any:
    """A model's config that names its labels so, as far as labels are read from it."""
    held = {"problem_type": None, **settings}
    return SimpleNamespace(id2label=dict(enumerate(names)), to_dict=lambda: held, **held)


def test_a_single_label_that_is_bad() -> None:
    """More of it is worse: cost=True or cost=False, and a good one is no cost."""
    with pytest.raises(ValueError, match=r"'toxicity'.*more is worse.*cost=True.*cost=False"):
        resolve_labels(None, config("toxicity"))
    assert (
        resolve_labels(None, config("toxicity"), cost=True)
        == resolve_labels(None, config("toxicity"), cost=False)
        == Label(0)
    )
    assert resolve_labels(None, config("LABEL_0"), cost=True) == resolve_labels(None, config("score")) == Label(0)
    with pytest.raises(ValueError, match="'helpfulness', of which more is better"):
        resolve_labels(None, config("helpfulness"), cost=True)


BACKWARDS: list[tuple[Labels, tuple[str, ...]]] = [
    (Expected((0, 1, 2)), ("harmless", "mild", "harmful")),
    (Label(2), ("harmless", "mild", "harmful")),
    (Weighted((0, 1, 2)), ("harmless", "mild", "harmful")),
    (Difference(good=1, bad=0), ("safe", "unsafe")),
    (Expected((0, 1, 2)), ("toxicity 0", "toxicity 1", "toxicity 2")),
]


@pytest.mark.parametrize(("labels", "names"), BACKWARDS)
def test_labels_against_their_names(labels: Labels, names: tuple[str, ...]) -> None:
    """A score that rises with what is bad needs cost=True, or cost=False if it is meant so."""
    with pytest.raises(ValueError, match=r"a higher score than .*cost=True.*cost=False"):
        resolve_labels(labels, config(*names))
    assert resolve_labels(labels, config(*names), cost=True) is labels
    assert resolve_labels(labels, config(*names), cost=False) is labels


def test_a_cost_whose_names_are_understood_already() -> None:
    """Turned round twice it would reward harm."""
    for labels in (None, Difference(good=0, bad=1)):
        with pytest.raises(ValueError, match=r"already gives 'safe' a higher score than 'unsafe'.*leave it out"):
            resolve_labels(labels, config("safe", "unsafe"), cost=True)
    assert resolve_labels(None, config("LABEL_0", "LABEL_1"), cost=True) == Difference(good=1, bad=0)


def test_whether_yes_is_good_depends_on_the_question() -> None:
    """Is it toxic: yes. So a cost and explicit labels do not contradict such names."""
    for names in (("yes", "no"), ("True", "False"), ("POSITIVE", "NEGATIVE"), ("1", "0")):
        assert resolve_labels(None, config(*names), cost=True) == Difference(good=0, bad=1)
        assert resolve_labels(Difference(good=1, bad=0), config(*names)) == Difference(good=1, bad=0)
    assert resolve_labels(None, config("yes"), cost=True) == Label(0)


def test_ordinal_is_for_ordinal_heads() -> None:
    """Names of classes and a config that says softmax refuse it; levels, sigmoids and configs that say it do not."""
    with pytest.raises(ValueError, match=r"a softmax.*labels=Expected\(\(0, 1, 2\)\) and cost=True"):
        resolve_labels(Ordinal(), config("harmless", "mild", "harmful"))
    with pytest.raises(ValueError, match=r"labels=Expected\(\(0, 1, 2\)\)$"):
        resolve_labels(Ordinal(), config("cat", "dog", "cow"))
    for names in (("LABEL_0", "LABEL_1"), ("1 star", "2 stars", "3 stars")):
        assert resolve_labels(Ordinal(), config(*names)) == Ordinal()
        with pytest.raises(ValueError, match="problem_type='single_label_classification'"):
            resolve_labels(Ordinal(), config(*names, problem_type="single_label_classification"))
    for said in ({"problem_type": "multi_label_classification"}, {"loss_type": "CORAL"}, {"ordinal_head": True}):
        assert resolve_labels(Ordinal(), config("bad", "fair", "good", **said)) == Ordinal()
        with pytest.raises(ValueError, match=r"'harmful' a higher score than 'harmless'.*cost=True"):
            resolve_labels(Ordinal(), config("harmless", "mild", "harmful", **said))
        assert resolve_labels(Ordinal(), config("harmless", "mild", "harmful", **said), cost=True) == Ordinal()


def test_the_first_rules() -> None:
    """Rewards that were saved before are read as they were then, right or wrong."""
    assert apply_first_rules({0: "chosen", 1: "Rejected "}) == Difference(good=0, bad=1)
    assert apply_first_rules({0: "win", 1: "lose"}) == apply_first_rules({0: "1", 1: "0"}) == Difference(good=1, bad=0)
    assert apply_first_rules({0: "rank 1", 1: "rank 2", 2: "rank 3"}) == Expected((1, 2, 3))
    assert apply_first_rules({0: "toxic"}) == Label(0)
    with pytest.raises(ValueError, match="3 labels"):
        apply_first_rules({0: "bad", 1: "fair", 2: "good"})
