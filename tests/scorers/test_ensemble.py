"""Ensemble: against the formulas pair by pair, and what each combination promises."""

import pickle
import statistics
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, strategies as st

from calibrated_rewards.scorers.ensemble import Ensemble, LowerBound, Mean, Min
from calibrated_rewards.scorers.protocol import fingerprint

PROMPTS = ["p"] * 4
COMPLETIONS = ["0", "1", "2", "3"]
numbers = st.floats(-50, 50, width=32)
member = st.lists(numbers, min_size=4, max_size=4)
members = st.lists(member, min_size=1, max_size=5)
ks = st.floats(0, 5)


@dataclass(frozen=True)
class Fixed:
    """Gives the completions "0", "1", ... these scores."""

    scores: tuple[float, ...]

    def __call__(self, prompts, completions):
        """By name."""
        return [self.scores[int(c)] for c in completions]

    def fingerprint(self):
        """The scores."""
        return {"scores": list(self.scores)}


def fixed(rows):
    return [Fixed(tuple(row)) for row in rows]


def combined(rows, how, **options):
    return Ensemble(fixed(rows), how, **options)(PROMPTS, COMPLETIONS)


@given(members, ks)
def test_against_python_statistics(rows, k) -> None:
    """Mean, minimum, and mean minus k population standard deviations, one completion at a time."""
    columns = list(zip(*rows, strict=True))
    bound = [statistics.fmean(c) - k * statistics.pstdev(c) for c in columns]

    assert combined(rows, Mean()) == pytest.approx([statistics.fmean(c) for c in columns], rel=1e-5, abs=1e-5)
    assert combined(rows, Min()) == pytest.approx([min(c) for c in columns])
    assert combined(rows, LowerBound(k)) == pytest.approx(bound, rel=1e-5, abs=1e-5)


@given(member, ks)
def test_one_member_is_itself(row, k) -> None:
    """It has nobody to disagree with."""
    for how in (Mean(), Min(), LowerBound(k)):
        assert np.array_equal(combined([row], how), np.asarray(row, np.float32))


@given(members, ks)
def test_order_and_disagreement(rows, k) -> None:
    """The order of members is nothing; the bound lies below the mean, and k = 0 is the mean."""
    how = LowerBound(k)

    assert combined(rows, how) == pytest.approx(combined(rows[::-1], how), rel=1e-4, abs=1e-4)
    assert (combined(rows, how) <= combined(rows, Mean()) + 1e-4).all()
    assert np.array_equal(combined(rows, LowerBound(0)), combined(rows, Mean()))


@given(members, st.lists(st.floats(-5, 5), min_size=5, max_size=5), st.lists(st.floats(0.1, 9), min_size=5, max_size=5))
def test_shift_and_scale(rows, shifts, scales) -> None:
    """Members on scales of their own, brought back, combine as they would have."""
    shifts, scales = shifts[: len(rows)], scales[: len(rows)]
    moved = [[x * scale + shift for x in row] for row, shift, scale in zip(rows, shifts, scales, strict=True)]

    for how in (Mean(), Min(), LowerBound(1.0)):
        found = combined(moved, how, shifts=shifts, scales=scales)
        assert found == pytest.approx(combined(rows, how), rel=1e-3, abs=1e-3)


def test_standardised_members_weigh_the_same() -> None:
    """A member a thousand times as wide no longer decides alone; shift and scale are mean and standard deviation."""
    rows = [[0.0, 1000.0, 2000.0, 5000.0], [3.0, 2.0, 2.5, 0.0]]

    ensemble = Ensemble.standardised(fixed(rows), PROMPTS, COMPLETIONS)

    expected = sum((np.array(row) - statistics.fmean(row)) / statistics.pstdev(row) for row in rows) / 2
    assert ensemble(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert isinstance(ensemble.how, Mean)


def test_a_scale_needs_a_spread() -> None:
    """A scorer that likes all the same has no scale; nor has one completion."""
    with pytest.raises(ValueError, match="two different scores"):
        Ensemble.standardised(fixed([[1.0] * 4]), PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="two different scores"):
        Ensemble.standardised(fixed([[1.0]]), ["p"], ["0"])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"scorers": []}, "at least one scorer"),
        ({"scales": [1.0]}, "one finite number for each of 2"),
        ({"shifts": [0.0, float("nan")]}, "one finite number for each of 2"),
        ({"scales": [1.0, 0.0]}, "scales > 0"),
        ({"scales": [1.0, -1.0]}, "Cost"),
    ],
)
def test_what_is_refused(options, rule) -> None:
    """Each with the rule that it breaks."""
    with pytest.raises(ValueError, match=rule):
        Ensemble(**{"scorers": fixed([[0.0], [1.0]]), **options})


@pytest.mark.parametrize("k", [-1.0, float("nan"), float("inf")])
def test_a_bound_is_below(k) -> None:
    """k is a finite number of deviations, downwards."""
    with pytest.raises(ValueError, match="k >= 0"):
        LowerBound(k)


def test_members_are_checked() -> None:
    """A member's nan is that member's error."""
    with pytest.raises(ValueError, match=r"Fixed gave nan"):
        Ensemble(fixed([[1.0], [float("nan")]]), Min())(["p"], ["0"])


def widest(members):
    """A combination that is a plain function."""
    return members.max(0)


def narrowest(members):
    """Another one."""
    return members.min(0)


@dataclass(frozen=True)
class Told:
    """A combination that says what it is, and answers what it was made with."""

    answer: object = None

    def __call__(self, members):
        """That."""
        return self.answer

    def fingerprint(self):
        """A word."""
        return {"kind": "told"}


class Plain:
    """A combination whose repr is its address."""

    def __call__(self, members):
        """The maximum."""
        return members.max(0)


def test_combinations_are_known_again() -> None:
    """By their fingerprint, their repr, or their place: never by an address in memory, which the next process lacks."""
    scorers = fixed([[1.0]])
    found = {how: Ensemble(scorers, how).fingerprint()["how"] for how in (Told(), Min(), widest, narrowest, Plain())}

    names = [how if isinstance(how, str) else how.get("name", how["kind"]) for how in found.values()]
    assert names == ["told", "Min()", *(f"{__name__}.{name}" for name in ("widest", "narrowest", "Plain"))]
    assert len({str(how) for how in found.values()}) == len(found)
    assert Ensemble(scorers, Plain()).fingerprint() == Ensemble(scorers, Plain()).fingerprint()


def test_a_combination_is_checked() -> None:
    """One finite number for each pair, whoever computes it."""
    ensemble = Ensemble(fixed([[1.0, 2.0]]), Told(np.array([1.0, np.nan])))
    with pytest.raises(ValueError, match=r"ensemble's .*Told gave nan for completion '1'"):
        ensemble(["p", "p"], ["0", "1"])
    with pytest.raises(ValueError, match=r"Told gave shape \(1,\) for 2"):
        Ensemble(fixed([[1.0, 2.0]]), Told(np.array([1.0])))(["p", "p"], ["0", "1"])


def test_lists_of_any_kind() -> None:
    """Shifts and scales as arrays, pairs by name; not a text in place of a list."""
    ensemble = Ensemble(fixed([[1.0, 4.0], [2.0, 6.0]]), shifts=np.array([0.0, 2.0]), scales=np.array([1.0, 2.0]))

    assert ensemble(prompts=["p", "p"], completions=["0", "1"]).tolist() == [0.5, 3.0]
    with pytest.raises(TypeError, match="got the text"):
        Ensemble.standardised(fixed([[1.0, 2.0]]), "pp", "01")


def test_it_is_known_again() -> None:
    """The fingerprint has the members', in order, the combination and the scales; it pickles; empty is empty."""
    one, two = fixed([[1.0], [2.0]])
    ensemble = Ensemble([one, two], LowerBound(0.5), scales=[1.0, 2.0])

    said = ensemble.fingerprint()
    assert said["of"] == [fingerprint(one), fingerprint(two)]
    others = [Ensemble([two, one], LowerBound(0.5), scales=[1.0, 2.0]), Ensemble([one, two], LowerBound(0.5)),
              Ensemble([one, two], Min(), scales=[1.0, 2.0])]  # fmt: skip
    assert all(other.fingerprint() != said for other in others)
    assert pickle.loads(pickle.dumps(ensemble)) == ensemble
    assert ensemble([], []).dtype == np.float32
