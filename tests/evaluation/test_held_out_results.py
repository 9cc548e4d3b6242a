"""Policies on the same held-out rollouts: the claims that their differences allow, JSON, figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples
from calibrated_rewards.evaluation.held_out import compare_log_ratios
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies, compare_held_out
from calibrated_rewards.theory.procedures import BestOf, WorstOf

RNG = np.random.default_rng(0)
U = RNG.random((40, 16))
SAMPLES = Samples(U, U + 0.1 * RNG.normal(size=U.shape))
PROCEDURES = (WorstOf(4), BestOf(2))


def tilt(strength: float) -> np.ndarray:
    """Log-ratios that rise with u."""
    return np.asarray(strength * U - np.log(np.expm1(strength) / strength))


POLICIES = compare_held_out({"raw": tilt(0.5), "far": tilt(1.5), "same": tilt(0.5)}, SAMPLES, PROCEDURES)


def with_gain(value: float, half: float, kl: float = 0.1) -> HeldOutPolicies:
    """The policies, with another difference under worst of 4 and another KL of "far"."""
    gain = IntervalEstimate(value, value - half, value + half, half / 2, 40)
    first, *others = POLICIES.differences
    rates = {**first.comparison.win_rates, "judge": {**first.comparison.win_rates["judge"], "WorstOf(n=4)": gain}}
    checks = {
        name: replace(check, kl=replace(check.kl, value=kl if name == "far" else 0.1))
        for name, check in POLICIES.checks.items()
    }
    first = replace(first, comparison=replace(first.comparison, win_rates=rates))
    return HeldOutPolicies(checks, (first, *others))


@given(st.floats(-0.2, 0.2), st.floats(0.001, 0.2))
def test_a_claim_goes_as_far_as_its_interval(value: float, half: float) -> None:
    """A winner is named if, and only if, 0 is outside of the interval, and it is the one that wins more."""
    claim = with_gain(value, half).claim("far", "raw", WorstOf(4))
    assert ("no difference shown" in claim) == (abs(value) <= half)
    assert ("far wins more than raw" in claim) == (value > half)
    assert ("far wins less than raw" in claim) == (value < -half)
    assert f"{100 * value:+.1f} points [{100 * (value - half):+.1f}, {100 * (value + half):+.1f}]" in claim


@pytest.mark.parametrize(
    ("kl", "word"), [(0.1, "at equal KL"), (0.104, "at equal KL"), (0.12, "at more KL"), (0.08, "at less KL")]
)
def test_a_claim_says_whether_the_kls_are_equal(kl: float, word: str) -> None:
    """At unequal KL a difference is not the reward's alone."""
    assert f"{word} ({kl:.3f} and 0.100 nats), by the judge, on 40" in with_gain(0.1, 0.01, kl).claim(
        "far", "raw", WorstOf(4)
    )


def test_each_two_policies_are_compared_once_the_later_less_the_earlier() -> None:
    """The numbers are those of `compare_log_ratios`; equal policies do not differ, and nothing is claimed of them."""
    assert [(each.a, each.b) for each in POLICIES.differences] == [("far", "raw"), ("same", "raw"), ("same", "far")]
    direct = compare_log_ratios(tilt(0.5), tilt(1.5), SAMPLES, procedures=PROCEDURES)
    assert POLICIES.differences[2].comparison == direct
    assert POLICIES.gain("same", "raw", BestOf(2)).value == 0
    first, second, third = POLICIES.claims()
    assert first.startswith("Under worst of 4, far wins more than raw: +")
    assert second.startswith("Under worst of 4, no difference shown between same and raw: +0.0 points,")
    assert third.startswith("Under worst of 4, same wins less than far: -")


def test_it_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """A round through the file, and an error that names a file of another kind."""
    POLICIES.save(tmp_path / "held_out.json")
    assert HeldOutPolicies.load(tmp_path / "held_out.json") == POLICIES
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other\.json must be a held-out comparison"):
        HeldOutPolicies.load(tmp_path / "other.json")


def test_print_has_every_rate_and_every_difference() -> None:
    """Each number of the judge stands in the tables."""
    text = str(POLICIES)
    for check in POLICIES.checks.values():
        assert all(f"{100 * rate.value:.1f} % [" in text for rate in check.win_rates["judge"].values())
    for each in POLICIES.differences:
        assert all(f"{100 * gain.value:+.1f} points" in text for gain in each.comparison.win_rates["judge"].values())
    assert "40 prompts, 16 rollouts of the reference each" in text


def test_figures_show_each_policy_at_each_procedure() -> None:
    """The marks stand at the win rates, and at the differences from the first policy, in points."""
    rates, gains = plots.held_out(POLICIES), plots.held_out_gains(POLICIES)
    assert [each.get_text() for each in rates.get_xticklabels()] == ["worst of 4", "best of 2"]
    marks = {each.get_label(): each.lines[0].get_ydata() for each in rates.containers}
    assert {*marks} == {"raw", "far", "same"}
    for name, y in marks.items():
        expected = [rate.value for rate in POLICIES.checks[name].win_rates["judge"].values()]
        np.testing.assert_allclose(y, expected)
    differences = {each.get_label(): each.lines[0].get_ydata() for each in gains.containers}
    assert {*differences} == {"far", "same"}
    expected = [100 * POLICIES.gain("far", "raw", each).value for each in PROCEDURES]
    np.testing.assert_allclose(differences["far"], expected)
