"""Two fingerprints: where they differ, and what of plain callables cannot or need not be compared."""

import pytest

from calibrated_rewards.scorers.differences import Difference, differences, mark_changing, merge, tolerance_of, unread

CALLABLE = {"kind": "callable", "name": "m.f", "python": "3.11", "code": "ab", "state": {"sign": 1.0, "calls": 0}}


def test_each_place_is_named() -> None:
    """Nested mappings and lists, members of one side alone, and nothing for what is equal."""
    there = {"kind": "ensemble", "of": [{"kind": "hash", "seed": 0}], "scales": [1.0, 2.0]}
    here = {"kind": "ensemble", "of": [{"kind": "hash", "seed": 1}], "scales": [1.0, 3.0], "how": "Min()"}
    assert [*differences(there, there)] == []
    assert {each.place for each in differences(there, here, "scorers.r")} == {
        "scorers.r.how",
        "scorers.r.of[0].seed",
        "scorers.r.scales[1]",
    }


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"code": "cd"}, "code"),
        ({"state": {"sign": -1.0, "calls": 0}}, "state.sign"),
        ({"state": {"sign": 1.0}}, "state.calls"),
    ],
)
def test_callables_differ_by_code_and_state(change: dict, place: str) -> None:
    """And not by where they stand."""
    moved = {**CALLABLE, "name": "n.f"}
    assert [*differences(CALLABLE, moved)] == []
    assert place in [each.place.removeprefix("x.") for each in differences(CALLABLE, {**moved, **change}, "x")]


@pytest.mark.parametrize(
    "old",
    [
        {"kind": "callable", "name": "m.f"},
        {"kind": "callable", "name": "m.f", "code": "an older digest"},
        {"kind": "callable", "name": "m.f", "code": "older", "arguments": "(1,)", "keywords": "{}"},
        {**CALLABLE, "python": "3.12", "code": "cd"},
        {**CALLABLE, "layout": 2, "code": "cd"},
    ],
)
def test_digests_that_cannot_be_compared_leave_the_name(old: dict) -> None:
    """Of a release that had none, of another version of Python, or of another layout (0.1 wrote none)."""
    assert [*differences(old, CALLABLE)] == []
    assert [*differences(old, {**CALLABLE, "name": "m.g"})] == [Difference(".name", "m.f", "m.g")]


def test_names_of_the_package_need_no_module() -> None:
    """A class of the package is the same one after its module has moved; another module's is not."""
    old = {"kind": "callable", "name": "calibrated_rewards.scorers.hash.HashScorer"}
    assert [*differences(old, {**CALLABLE, "layout": 2, "name": "calibrated_rewards.HashScorer"})] == []
    assert [*differences({**old, "name": "other.scorers.HashScorer"}, {**CALLABLE, "name": "other.HashScorer"})]


def test_functions_with_a_name_are_known_by_code_too() -> None:
    """Unless the other side has none, and whatever place they got their name from."""
    old = {"kind": "function", "name": "m.f", "version": ""}
    new = {**old, "function": CALLABLE}
    assert [*differences(old, new)] == [] == [*differences(new, {**new, "name": "n.f"})]
    changed = {**new, "function": {**CALLABLE, "code": "cd"}}
    assert "function.code" in [each.place for each in differences(new, changed)]
    assert [each.place for each in differences(new, {**old, "version": "2"})] == ["version"]


def test_what_calls_change_is_not_compared() -> None:
    """It is marked once, stays marked, and the rest is compared as before."""
    after = {**CALLABLE, "state": {"sign": 1.0, "calls": 9}}
    marked = mark_changing({"of": [CALLABLE]}, {"of": [after]})
    assert marked["of"][0]["changing"] == ["calls"]
    assert [*differences(marked, {"of": [after]})] == []
    assert [*differences(marked, {"of": [{**after, "state": {"sign": -1.0, "calls": 9}}]})] != []
    assert merge(marked, {"of": [after]})["of"][0]["changing"] == ["calls"]
    assert mark_changing(CALLABLE, CALLABLE) == CALLABLE


def test_the_tolerance_knows_16_bits() -> None:
    """If both name few bits, however deep; and what is unread is found as deep."""
    few = {"kind": "ensemble", "of": [{"kind": "x", "dtype": "bfloat16"}]}
    assert (tolerance_of(few, few), tolerance_of(few, {"kind": "x", "dtype": "float32"})) == (0.5, 1e-3)
    assert unread({"of": [{**CALLABLE, "unread": ["held (socket)"]}, CALLABLE]}) == ["held (socket)"]
