"""Prompts that a run keeps: by pairs that tie and by spread, against loops over all pairs."""

from itertools import combinations
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given, strategies as st

from calibrated_rewards import ReferenceTable
from calibrated_rewards.table.selection import measure_rows, select_prompts

values = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1e6])
contents = st.dictionaries(st.text("abc", max_size=3), st.lists(values, min_size=1, max_size=7), min_size=1, max_size=8)


@given(contents, st.floats(0, 1), st.floats(0, 2))
def test_kept_is_what_all_pairs_say(content: dict[str, list[float]], most_ties: float, least_spread: float) -> None:
    """The share of tied pairs and the deviation of each prompt by loops, and each reason counted once."""
    table = ReferenceTable.build(content.items())
    prompts = [*content, "unknown"]
    kept, reasons = [], {"constant": 0, "ties": 0, "spread": 0}
    for i, prompt in enumerate(prompts):
        scores = content.get(prompt, [])
        pairs = [a == b for a, b in combinations(scores, 2)]
        if pairs and all(pairs):
            reasons["constant"] += 1
        elif pairs and sum(pairs) / len(pairs) > most_ties:
            reasons["ties"] += 1
        elif pairs and stdev(scores) < least_spread:
            reasons["spread"] += 1
        else:
            kept.append(i)

    selection = select_prompts(table, prompts, most_ties=most_ties, least_spread=least_spread)

    assert selection.kept == tuple(kept)
    assert {name: getattr(selection, name) for name in reasons} == reasons
    assert str(selection).startswith(f"{sum(reasons.values())} of {len(prompts)} prompts are left out")


def test_tied_pairs_are_how_often_two_completions_tie() -> None:
    """Of a pass rate p, p^2 + (1 - p)^2 up to 1/K: by simulation of two draws without replacement."""
    scores = np.repeat([0.0, 1.0], [30, 10])
    table = ReferenceTable.build([("p", scores)])
    tied, spread = measure_rows(table, np.array([0]))
    rng = np.random.default_rng(0)
    draws = np.array([rng.choice(scores, 2, replace=False) for _ in range(20_000)])
    assert tied[0] == pytest.approx((draws[:, 0] == draws[:, 1]).mean(), abs=4 * 0.5 / np.sqrt(20_000))
    assert spread[0] == pytest.approx(stdev(scores))


def test_reasons_are_told_and_nothing_is_left_is_an_error() -> None:
    """Ids find prompts too; limits that are no shares are refused with their value."""
    rows = [("same", [2.0, 2.0]), ("tied", [0.0, 0.0, 0.0, 1.0]), ("narrow", [0.0, 1e-3, 2e-3]), ("wide", [0.0, 5.0])]
    table = ReferenceTable.build(rows)
    prompts = [prompt for prompt, _ in rows]
    selection = select_prompts(table, prompts, most_ties=0.4, least_spread=0.01)
    assert selection.kept == (3,)
    assert str(selection) == (
        "3 of 4 prompts are left out: 1 whose references all tie, 1 with more than 0.4 of their pairs of references "
        "tied, 1 whose references have a standard deviation below 0.01"
    )
    assert str(select_prompts(table, ["wide"])) == "0 of 1 prompts are left out"
    with pytest.raises(ValueError, match="prompts whose references differ: 1 of 1"):
        select_prompts(table, ["same"])
    for wrong in ({"most_ties": 1.1}, {"least_spread": -1.0}, {"least_spread": float("nan")}):
        with pytest.raises(ValueError, match=f"got {next(iter(wrong.values()))}"):
            select_prompts(table, prompts, **wrong)
