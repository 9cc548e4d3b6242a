"""Adaptive K: bands by exact sums over trinomials and by simulation, decisions by a plain second implementation."""

from fractions import Fraction
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from strategies import transforms

from calibrated_rewards.calibration.adaptive import Adaptive, Saving, half_width
from calibrated_rewards.theory.bands import band
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity, Log

KINDS = ("pointwise", "simultaneous", "dkw")
ratings = st.lists(st.integers(1, 5), min_size=1, max_size=40)


def ends(below, upto, K, delta, kind):
    """The band on C of a value with `below` references under it and `upto` not above it, as the docstring says."""
    lower, upper = band(K, delta, kind)
    return (lower[2 * below] + lower[2 * upto]) / 2, (upper[2 * below] + upper[2 * upto]) / 2


@settings(max_examples=40)
@given(ratings, transforms, st.floats(0.01, 0.5), st.sampled_from(("pointwise", "simultaneous")))
def test_half_width_is_the_mean_square_over_references(row, transform, delta, kind):
    """One reference at a time, counted by comparison; the order of the row means nothing."""
    squares = []
    for y in row:
        low, high = ends(sum(x < y for x in row), sum(x <= y for x in row), len(row), delta, kind)
        squares.append((float(transform(high)) - float(transform(low))) ** 2 / 4)

    assert half_width(row, transform, delta, kind) == pytest.approx(sqrt(sum(squares) / len(row)), rel=1e-9, abs=1e-300)
    assert half_width(row[::-1], transform, delta, kind) == half_width(row, transform, delta, kind)


@pytest.mark.parametrize("delta", [0.3, 0.05, 0.0125])
@pytest.mark.parametrize("K", [1, 6, 20])
def test_the_pointwise_band_covers_an_atom(K, delta):
    """Any mass below an atom, at it and above it, summed over all trinomial counts: 1 - delta or more, exactly."""
    shares = np.unique([0.0, 0.003, 0.01, 0.03, *np.linspace(0, 1, 12), 0.97, 0.99, 0.997])
    below, equal = (part.ravel() for part in np.indices((K + 1, K + 1)))
    below, equal = below[below + equal <= K], equal[below + equal <= K]
    low, high = ends(below, below + equal, K, delta, "pointwise")
    for under in shares:
        for at in shares[under + shares <= 1 + 1e-12]:
            chance = stats.binom.pmf(below, K, under)
            chance *= stats.binom.pmf(equal, K - below, min(1.0, at / (1 - under)) if under < 1 else 0.0)
            truth = under + at / 2
            missed = chance[(truth < low - 1e-12) | (truth > high + 1e-12)].sum()
            assert chance.sum() == pytest.approx(1.0)
            assert missed <= delta, (under, at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", [Identity(), Exponential(5.0)])
def test_without_ties_the_width_is_of_k_alone(kind, transform):
    """Normal, heavy-tailed or evenly spaced scores: the same width to the last bit, so no prompt can stop early."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=32), rng.standard_cauchy(32), np.arange(32), 1e6 - np.arange(32.0)]

    assert len({half_width(row, transform, 0.05, kind) for row in rows}) == 1


@pytest.mark.parametrize("kind", ["pointwise", "simultaneous"])
def test_alike_references_are_known_to_1_over_k(kind):
    """K times the width of a constant row tends to -log(delta / 2) / 2; without ties sqrt(K) times it tends on."""
    constant = [K * half_width([1.0] * K, Identity(), 0.05, kind) for K in (50, 200, 800)]
    spread = [sqrt(K) * half_width(range(K), Identity(), 0.05, kind) for K in (50, 200, 800)]

    if kind == "pointwise":
        assert constant[-1] == pytest.approx(-np.log(0.025) / 2, rel=0.01)
        # z times the root mean square of sqrt(u (1 - u)), u uniform
        assert spread[-1] == pytest.approx(stats.norm.ppf(0.975) / sqrt(6), rel=0.03)
    assert max(constant) < 1.35 * min(constant)
    assert max(spread) < 1.35 * min(spread)


def laws():
    """Reward kinds: their draws, and C of what was drawn."""
    grades = np.array([0.05, 0.1, 0.15, 0.4, 0.3])
    C = np.concatenate([[0.0], np.cumsum(grades)])
    yield "continuous", lambda rng, shape: rng.random(shape), lambda y: y
    for p in (0.5, 0.9, 0.99):
        yield (
            f"solved {p:.0%}",
            lambda rng, shape, p=p: (rng.random(shape) < p).astype(float),
            lambda y, p=p: np.where(y > 0, 1 - p / 2, (1 - p) / 2),
        )
    yield (
        "ratings",
        lambda rng, shape: rng.choice(5, p=grades, size=shape).astype(float),
        lambda y: (C[np.asarray(y, int)] + C[np.asarray(y, int) + 1]) / 2,
    )


@pytest.mark.parametrize(("name", "draw", "truth"), [*laws()], ids=[law[0] for law in laws()])
def test_coverage_under_stopping(name, draw, truth):
    """The bands of all rounds hold together with 1 - delta: then they hold wherever a prompt stops, for any reason."""
    adaptive, repeats = Adaptive(Identity(), width=0.08, rounds=(8, 16, 32, 64), delta=0.2), 1500
    rng = np.random.default_rng(1)
    rows, fresh = draw(rng, (repeats, 64)), draw(rng, repeats)
    at = truth(fresh)
    for kind in "pointwise", "simultaneous":
        held = np.ones(repeats, bool)
        for K in adaptive.rounds:
            below = (rows[:, :K] < fresh[:, None]).sum(1)
            upto = (rows[:, :K] <= fresh[:, None]).sum(1)
            low, high = ends(below, upto, K, adaptive.delta_at(K), kind)
            held &= (low <= at + 1e-12) & (at <= high + 1e-12)
        assert held.mean() >= 0.8 - 3 * sqrt(0.16 / repeats), kind
    stopped = [adaptive.enough(row[:K]) for row in rows[:50] for K in adaptive.rounds]
    assert any(stopped) == (name != "continuous")


def test_one_delta_for_every_look_would_not_do():
    """The same simulation with all of delta at each round: the bands fail together, which is what sharing is for."""
    rng, repeats = np.random.default_rng(1), 1500
    rows, at = rng.random((repeats, 64)), rng.random(repeats)
    held = np.ones(repeats, bool)
    for K in (8, 16, 32, 64):
        below = (rows[:, :K] < at[:, None]).sum(1)
        low, high = ends(below, below, K, 0.2, "pointwise")
        held &= (low <= at) & (at <= high)

    assert held.mean() < 0.75


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6, unique=True).map(sorted).map(tuple), st.floats(0.001, 0.9))
def test_the_rounds_share_delta(rounds, delta):
    """They sum to delta, double from round to round, and a K between two rounds belongs to the earlier one."""
    adaptive = Adaptive(Identity(), 0.1, rounds, delta)
    shares = [adaptive.delta_at(K) for K in rounds]

    assert sum(map(Fraction, shares)) == pytest.approx(Fraction(delta), rel=1e-12)
    assert shares[1:] == [pytest.approx(2 * share) for share in shares[:-1]]
    for K, following in zip(rounds, [*rounds[1:], 10**6], strict=True):
        assert adaptive.delta_at(following - 1) == adaptive.delta_at(K)


tables = st.dictionaries(st.binary(min_size=1, max_size=3), ratings | st.just([]) | st.just([3] * 64), max_size=8)


@settings(max_examples=60)
@given(tables, st.sampled_from([(4, 8, 16), (10, 30)]))
def test_next_without_a_budget(rows, rounds):
    """Whoever is not narrow enough moves to the next round; the order of the rows means nothing."""
    adaptive = Adaptive(Exponential(2.0), 1.2, rounds)
    goals = {key: min([K for K in rounds if len(row) < K], default=None) for key, row in rows.items()}
    wide = {key: adaptive.half_width(row) if len(row) >= rounds[0] else float("inf") for key, row in rows.items()}
    expected = sorted((key for key in rows if goals[key] and wide[key] > 1.2), key=lambda key: (-wide[key], key))

    assert [*adaptive.next(rows.items()).items()] == [(key, goals[key]) for key in expected]
    assert [*adaptive.next(reversed(rows.items()))] == expected
    assert expected == [key for key in expected if not adaptive.enough(rows[key])]
    assert adaptive == Adaptive(Exponential(2.0), 1.2, rounds)
    assert {*Adaptive(Exponential(2.0), 1.2, rounds, budget=10**6).next(rows.items())} == {*expected}


shapes = st.sampled_from([(0,), (0, 1), (0, 1, 1), (0, 0, 1, 2), (0, 1, 2, 3, 4, 5)])


@settings(max_examples=60)
@given(st.lists(st.tuples(shapes, st.sampled_from([0, 12, 24, 48, 96])), min_size=1, max_size=6), st.integers(0, 300))
def test_next_within_a_budget(made, more):
    """Rows whose ties can be had at any K, advanced one by one, always the widest, until the budget has gone."""
    rows = {bytes([i]): list(shape) * (K // len(shape)) for i, (shape, K) in enumerate(made)}
    spent, first = sum(map(len, rows.values())), 12 * sum(not row for row in rows.values())
    adaptive = Adaptive(Identity(), 0.05, (12, 24, 48, 96), budget=spent + first + more)
    at, left, expected = {key: len(row) for key, row in rows.items()}, first + more, {}

    def wide(key):
        shape = made[key[0]][0]
        return adaptive.half_width([*shape] * (at[key] // len(shape))) if at[key] else float("inf")

    new = {key for key, K in at.items() if not K}
    while going := [key for key, K in at.items() if K < 96 and wide(key) > 0.05 and not (key in new and K)]:
        widest = min(going, key=lambda key: (-round(wide(key), 12), key))
        left -= at[widest] or 12
        if left < 0:
            break
        at[widest] = 2 * at[widest] or 12
        expected.setdefault(widest, at[widest])

    asked = adaptive.next(rows.items())

    assert asked == expected
    assert sum(asked[key] - len(rows[key]) for key in asked) <= first + more


def test_a_budget_is_kept_for_who_needs_it():
    """At K = 16 all are too wide; where the budget lasts for one half of them, it goes to those that never tie."""
    rows = {bytes([i]): [1.0] * 16 if i < 10 else list(range(16)) for i in range(20)}
    spread = {bytes([i]) for i in range(10, 20)}

    assert {*Adaptive(Identity(), 0.01).next(rows.items())} == {*rows}
    assert {*Adaptive(Identity(), 0.01, budget=320 + 10 * 48).next(rows.items())} == spread


def test_a_run_from_nothing_to_its_end():
    """Every prompt ends narrow enough or at the last round, in as many calls as there are rounds, within a budget."""
    rng = np.random.default_rng(0)
    drawn = {bytes([i]): rng.random(64) if i % 2 else np.ones(64) for i in range(20)}
    for budget in (None, 500):
        adaptive, have, calls = Adaptive(Identity(), 0.09, (8, 16, 32, 64), budget=budget), dict.fromkeys(drawn, 0), 0
        while asked := adaptive.next((key, row[: have[key]]) for key, row in drawn.items()):
            have |= asked
            calls += 1
        assert calls <= 5
        if budget is None:
            assert [have[bytes([i])] for i in (0, 1)] == [32, 64]
            assert len(set(have.values())) == 2
        else:
            assert 400 < sum(have.values()) <= budget


def test_what_is_spent_elsewhere_counts():
    """`spent` takes the place of the rollouts that the rows hold."""
    adaptive = Adaptive(Identity(), 0.01, (4, 8), budget=20)
    rows = {b"a": [1, 2, 3, 4], b"b": [1, 2, 3, 4]}

    assert adaptive.next(rows.items()) == {b"a": 8, b"b": 8}
    assert adaptive.next(rows.items(), spent=13) == {b"a": 8}
    assert adaptive.next(rows.items(), spent=17) == {}


@pytest.mark.parametrize("error", ["worst", "mean"])
def test_saved_is_found_by_trying_every_k(error):
    """Rows whose ties can be had at any K: the least fixed K whose bands, of rows made anew, are as narrow."""
    adaptive = Adaptive(scaled(Exponential(3.0), "unit"), 0.05, (12, 24, 48))
    rows = {b"halves": [0, 1] * 12, b"thirds": [0, 1, 1] * 16, b"alike": [1] * 12, b"again": [1] * 12}
    made = {b"halves": [0, 1], b"thirds": [0, 1, 1], b"alike": [1], b"again": [1]}

    def overall(widths):
        return max(widths) if error == "worst" else sqrt(np.mean(np.square(widths)))

    reached = overall([adaptive.half_width(row) for row in rows.values()])
    tried = {
        K: overall([half_width(of * (K // len(of)), adaptive.transform, 0.05) for of in made.values()])
        for K in range(6, 49, 6)
    }
    saving = adaptive.saved(rows.items(), error)

    assert (saving.prompts, saving.used, saving.half_width) == (4, 96, pytest.approx(reached))
    least = min(K for K, width in tried.items() if width <= reached)
    assert least - 6 < saving.fixed <= least
    assert saving.share == pytest.approx(1 - 96 / (4 * saving.fixed))
    assert f"{error} band" in str(saving)


def test_nothing_is_saved_without_ties():
    """All prompts stop in one round, and the looks before it have cost something: the fixed K is smaller."""
    rng = np.random.default_rng(0)
    saving = Adaptive(Identity(), 0.1).saved((bytes([i]), rng.random(128)) for i in range(5))

    assert saving.fixed < 128
    assert "more than needed" in str(saving)
    one_look = Adaptive(Identity(), 0.1, (128,)).saved((bytes([i]), rng.random(128)) for i in range(5))
    assert one_look == Saving(5, 640, 128, one_look.half_width, "worst")


def test_a_log_is_finite_at_the_references():
    """No reference lies below all, so its own band ends above 0; "dkw" does not know that, and says so."""
    assert half_width(range(20), Log(), 0.05) < 2
    assert half_width(range(20), Log(), 0.05, "dkw") == float("inf")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Adaptive(Identity(), 0.0), r"a finite width > 0, got Adaptive\(.*width=0.0"),
        (lambda: Adaptive(Identity(), float("nan")), "a finite width > 0"),
        (lambda: Adaptive(Identity(), 0.1, ()), "rounds of whole numbers >= 1 that rise"),
        (lambda: Adaptive(Identity(), 0.1, (16, 16)), "rounds of whole numbers >= 1 that rise"),
        (lambda: Adaptive(Identity(), 0.1, (0, 16)), "rounds of whole numbers >= 1 that rise"),
        (lambda: Adaptive(Identity(), 0.1, delta=1.0), "0 < delta < 1"),
        (lambda: Adaptive(Identity(), 0.1, budget=15), "a budget of at least the first round"),
        (lambda: Adaptive(Identity(), 0.1, (4,), budget=7).next([(b"a", []), (b"b", [])]), "4 rollouts of each"),
        (lambda: Adaptive(Identity(), 0.1).saved([]), "rows that have scores, got none"),
        (lambda: Adaptive(Identity(), 0.1).saved([(b"a", [])]), "rows that have scores"),
        (lambda: half_width([], Identity(), 0.05), "one score or more, got none"),
        (lambda: half_width([0.0, float("nan")], Identity(), 0.05), "finite scores, got nan"),
    ],
)
def test_refuses_what_it_cannot_do(wrong, message):
    """Each error names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        wrong()
