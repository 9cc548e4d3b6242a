"""Suspicious rows: each planted fault is found and named, and tables without one have none."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from calibrated_rewards.calibration.suspicious_rows import describe_rows, find_suspicious_rows, limit
from calibrated_rewards.table.reference_table import ReferenceTable

P, K = 400, 40


def table_of(rows):
    """A table whose rows are in this order."""
    return ReferenceTable.build((i.to_bytes(16, "big"), row) for i, row in enumerate(rows))


def found(rows):
    """Reasons and rows."""
    table = table_of(rows)
    return [(each.reason, each.row) for each in find_suspicious_rows(table, describe_rows(table))]


def clean(rng, law="normal"):
    """P rows of K, their means apart."""
    means = 2 * rng.normal(size=(P, 1))
    match law:
        case "normal":
            rows = rng.normal(size=(P, K)) + means
        case "t3":
            rows = rng.standard_t(3, size=(P, K)) + means
        case "t3 means":
            rows = rng.normal(size=(P, K)) + rng.standard_t(3, size=(P, 1))
        case "exponential":
            rows = rng.exponential(size=(P, K)) + means
        case "spreads apart":
            rows = rng.normal(size=(P, K)) * np.exp(rng.normal(size=(P, 1))) + means
        case "verifier":
            rows = rng.random((P, K)) < rng.beta(0.3, 0.3, size=(P, 1))
        case "ratings":
            rows = np.clip(np.round(3 + rng.normal(size=(P, 1)) + rng.normal(size=(P, K))), 1, 5)
    return [*rows.astype(np.float32)]


@pytest.mark.parametrize(
    ("law", "most"),
    [
        *(("normal", 0), ("t3", 3), ("t3 means", 3), ("exponential", 0), ("spreads apart", 1)),
        *(("verifier", 0), ("ratings", 0)),
    ],
)
def test_a_clean_table_has_none(law, most):
    """12 tables of each law, heavy tails and ties among them: a row now and then where the tails are heavy."""
    counts = [len(found(clean(np.random.default_rng(seed), law))) for seed in range(12)]

    assert sum(counts) <= most


def plant(rows, fault):
    """Puts a fault into row 7."""
    match fault:
        case "far above":
            rows[7][3] = rows[7].mean() + 60
        case "far below":
            rows[7][3] = rows[7].mean() - 60
        case "far median":
            rows[7] = rows[7] + 100
        case "same scores":
            rows[7] = rows[3][::-1]
        case "all equal":
            rows[7] = np.full(K, 1.5, np.float32)
        case "few values":
            rows[7] = np.repeat(rows[7][:3], 14)[:K]
        case "few references":
            rows[7] = rows[7][:10]
    return rows


@pytest.mark.parametrize("law", ["normal", "exponential"])
@pytest.mark.parametrize(
    "fault",
    ["far above", "far below", "far median", "same scores", "all equal", "few values", "few references"],
)
def test_a_planted_fault_is_found(fault, law):
    """That row, for that reason, and no other."""
    assert found(plant(clean(np.random.default_rng(0), law), fault)) == [(fault, 7)]


def test_the_worst_comes_first():
    """Of several rows with a fault, by how far out, how few, or how many."""
    rows = clean(np.random.default_rng(0))
    rows[5][0], rows[9][0] = 80, 300
    rows[20], rows[21], rows[22] = rows[20][:5], rows[21][:3], rows[22][:7]
    rows[30], rows[31] = np.zeros(K, np.float32), np.zeros(2 * K, np.float32)

    assert found(rows) == [
        *[("far above", 9), ("far above", 5)],
        *[("all equal", 31), ("all equal", 30)],
        *[("few references", 21), ("few references", 20), ("few references", 22)],
    ]


@pytest.mark.parametrize("fault", ["all equal", "few values"])
def test_ties_are_no_fault_where_they_are_the_rule(fault):
    """A verifier's prompts, always solved or half of the time, are as they should be."""
    rows = plant(clean(np.random.default_rng(0), "verifier"), fault)

    assert found(rows) == []


def test_the_same_scores_by_chance():
    """Verdicts, single references and three values are equal often; copies count in rows of any K, each once."""
    assert found([np.array([1.0], np.float32)] * 40) == []
    assert found([np.array([1.0, 2.0, 3.0], np.float32)] * 40) == []
    assert found([np.repeat(np.arange(6.0), 2)] * 2) == []
    assert found([np.append(np.arange(7.0), [0, 1, 2, 3, 4])] * 2) == [("same scores", 1)]
    rows = clean(np.random.default_rng(0))
    copies = [rows[3].copy(), rows[3].copy(), rows[11][:25], rows[11][:25]]
    same = [row for reason, row in found([*rows, *copies]) if reason == "same scores"]
    assert sorted(same) == [P, P + 1, P + 3]


def test_equal_digests_are_not_enough():
    """Rows are compared where their digests agree, be it by chance."""
    table = table_of(clean(np.random.default_rng(0))[:9])
    statistics = describe_rows(table)._replace(digest=np.zeros(9, np.uint64))

    assert find_suspicious_rows(table, statistics) == []


def test_minus_zero_is_zero():
    """Scores that compare equal are the same scores."""
    row = np.arange(12, dtype=np.float32)
    other = row.copy()
    other[0] = -0.0

    assert found([row, other]) == [("same scores", 1)]


def test_details_have_the_numbers():
    """What a reader needs to judge it."""
    rows = plant(plant(clean(np.random.default_rng(0)), "far above"), "few references")
    rows[6] += 1000
    rows[7][3], rows[8], rows[9] = 500.0, np.zeros(K, np.float32), np.repeat(np.float32([1, 2]), K // 2)
    table = table_of(rows)
    details = {each.reason: each.detail for each in find_suspicious_rows(table, describe_rows(table))}
    median = float(np.median(rows[7]))
    medians = np.array([np.median(row) for row in rows])
    sd, middle = stats.median_abs_deviation(medians, scale="normal"), np.median(medians)
    far = (medians[6] - middle) / sd

    assert details == {
        "far above": f"500, the prompt's median is {median:.6g}",
        "far median": f"{medians[6]:.6g}, {far:.1f} robust sd from the others' {middle:.6g}",
        "all equal": "40 references of 0",
        "few values": "2 of 40; the median prompt has 100 %",
        "few references": "10; the median prompt has 40",
    }


@settings(max_examples=30)
@given(st.integers(100, 5000), st.integers(0, 2**32), st.floats(0.1, 100), st.floats(-50, 50))
def test_limit_moves_with_the_values(size, seed, scale, shift):
    """Scaled and shifted values have a scaled and shifted limit, and those beyond it do not move it."""
    values = np.random.default_rng(seed).exponential(size=size)
    far = limit(values, -np.inf)

    assert limit(values * scale + shift, -np.inf) == pytest.approx(far * scale + shift, rel=1e-9, abs=1e-9)
    values[np.argmax(values)] = 1e9
    assert limit(values, -np.inf) == far
    assert limit(values, 2 * far) == 2 * far


def test_limit_of_ties():
    """Where a twentieth of the values are one, there is no tail to see: the least it is."""
    assert limit(np.zeros(200), 6.0) == limit(np.repeat([0.0, 9.0], [150, 50]), 6.0) == 6.0
    assert limit(np.repeat([0.0, 1.0, 2.0], [150, 38, 12]), 0.0) > 2.0


def test_half_of_the_references_is_few():
    """Less than half of the median K, not half of it."""
    rows = clean(np.random.default_rng(0))
    rows[1], rows[2] = rows[1][:20], rows[2][:19]

    assert found(rows) == [("few references", 2)]


def test_limit_is_the_tail_of_a_pareto_law():
    """Of 100,000 exact quantiles of a law of shape 1/3 or 0.1: what the largest exceeds one time in a hundred."""
    for shape in (1 / 3, 0.1):
        law = stats.genpareto(shape)
        values = law.ppf((np.arange(100_000) + 0.5) / 100_000)
        at = 0.01 / 100_000
        assert law.sf(limit(values, 0.0)) == pytest.approx(at, rel=0.05 if shape == 1 / 3 else 0.9)


def test_of_a_few_rows_little_is_known():
    """Below 100 rows there is no tail to learn from: five times the least; and a table of one row has no others."""
    assert limit(np.arange(99.0), 6.0) == 30.0
    rows = clean(np.random.default_rng(0))[:10]
    rows[2][0], rows[3][0] = 1e4, 15

    assert found(rows) == [("far above", 2)]
    assert found([np.arange(5.0)]) == []
    assert found([np.zeros(5)]) == []
