"""The health of a table, against numpy on all rows at once, and laws whose spread is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from calibrated_rewards.calibration.inspect_table import health, measure_precision, percent
from calibrated_rewards.calibration.suspicious_rows import describe_rows
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import references_needed
from calibrated_rewards.theory.transforms import Identity

scores = st.lists(
    st.lists(st.sampled_from([-1e30, -2.5, -0.0, 0.0, 1.0, 1.0000001, 7.0, 3e38]), min_size=1, max_size=9), min_size=1
)


@pytest.fixture(scope="module")
def needed():
    """How many references an error of .05 needs, at a quantile and at all at once."""
    return references_needed(Identity(), 0.05), references_needed(Identity(), 0.05, delta=0.05)


def table_of(rows, **meta):
    """A table whose rows are in this order."""
    return ReferenceTable.build(((i.to_bytes(16, "big"), row) for i, row in enumerate(rows)), meta=meta)


@settings(max_examples=60)
@given(scores)
def test_row_statistics_are_numpys(rows):
    """Row by row, of any K, with ties and with scores as large as float32 has them."""
    of = describe_rows(table_of(rows))
    for place, row in enumerate(np.array(row, np.float32) for row in rows):
        wide = row.astype(np.float64)
        five = [np.quantile(wide, u).astype(np.float32) for u in (0, 0.25, 0.5, 0.75, 1)]
        assert [column[place] for column in of[1:6]] == pytest.approx(five, rel=1e-6)
        assert of.mean[place] == pytest.approx(wide.mean(), rel=1e-9)
        if len(row) > 1:
            assert of.variance[place] == pytest.approx(wide.var(ddof=1), rel=1e-9)
        counts = [len(row), (row == row.min()).sum(), (row == row.max()).sum(), len(np.unique(row))]
        assert [of.size[place], of.at_lowest[place], of.at_highest[place], of.distinct[place]] == counts


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=9))
def test_digests_tell_rows_apart(row):
    """Equal for equal scores in any order, other when one score is."""
    row = np.array(row, np.float32)
    other = row.copy()
    other[0] = np.nextafter(row[0], np.float32(np.inf if row[0] < 0 else -np.inf))
    first, again, unlike = describe_rows(table_of([row, row[::-1], other])).digest

    assert first == again != unlike


def test_health_counts_saturation():
    """Ties, shared ends and the ends of all, counted by hand."""
    found = health(table_of([[0, 1, 9, 9], [0, 0, 0, 9], [5, 5, 5, 5], [1, 2, 3, 4]])).resolution

    assert found.tied == 9 / 16
    assert (found.at_highest, found.at_lowest) == ((2 + 1 + 4 + 1) / 16, (1 + 3 + 4 + 1) / 16)
    assert (found.prompts_sharing_highest, found.prompts_sharing_lowest) == (2 / 4, 2 / 4)
    assert (found.ceiling, found.at_ceiling, found.floor, found.at_floor) == (9.0, 3 / 16, 0.0, 4 / 16)
    assert (found.unresolved, found.unresolved_share) == (1, 0.25)


def test_a_clipping_reward_model_is_seen():
    """Normal scores clipped at 1.5: the share at the ceiling is the normal's tail, in most prompts more than one."""
    rows = np.clip(np.random.default_rng(0).normal(size=(500, 64)), -8, 1.5)
    found = health(table_of(rows)).resolution

    assert found.ceiling == 1.5
    assert found.at_ceiling == pytest.approx(stats.norm.sf(1.5), abs=0.005)
    several = 1 - stats.binom.cdf(1, 64, stats.norm.sf(1.5))
    assert found.prompts_sharing_highest == pytest.approx(several, abs=0.03)
    assert found.prompts_sharing_lowest == 0


@pytest.mark.parametrize("K", [1, 10, 100, 1001])
def test_precision_is_of_the_beta_laws(K, needed):
    """Clopper and Pearson's ends by scipy; for all at once wider, or not told for a large K."""
    found = measure_precision(describe_rows(table_of([range(K)] * 3)), 0.0)

    assert found.above_all == pytest.approx(stats.beta.ppf(0.025, K, 1))
    if K % 2 == 0:  # an even K has a middle between two references
        ends = stats.beta.ppf(0.025, K // 2, K // 2 + 1), stats.beta.ppf(0.975, K // 2 + 1, K // 2)
        assert found.middle == pytest.approx((ends[1] - ends[0]) / 2)
    assert found.rms == pytest.approx(1 / np.sqrt(6 * K))
    assert (found.needed, found.needed_at_once) == needed
    if K > 1000:
        assert found.middle_at_once is found.above_all_at_once is None
    elif K > 1:
        assert found.middle_at_once > found.middle
        assert found.above_all_at_once < found.above_all


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.99, 0.01], [0.1, 0.2, 0.4, 0.25, 0.05]])
def test_precision_with_ties_by_drawing_references(shares):
    """Scores of few values: the rms is that of (below + equal / 2) / K about its mean, over draws of references."""
    rng, K, law = np.random.default_rng(0), 64, np.array(shares)
    drawn = rng.multinomial(K, law, size=20_000) / K
    u = np.cumsum(drawn, axis=1) - drawn / 2
    rms = np.sqrt(((u - (np.cumsum(law) - law / 2)) ** 2 @ law).mean())
    rows = [np.repeat(np.arange(len(law)), counts) for counts in rng.multinomial(K, law, size=3000)]
    found = health(table_of(rows))

    assert found.precision.rms == pytest.approx(rms, rel=0.03)
    assert found.precision.rms < 1 / np.sqrt(6 * K)
    assert found.precision.middle_at_once is None
    assert "without ties" not in str(found)
    assert f"{percent(found.resolution.tied)} of references tie" in found.precision.heading
    assert f"different ones among its {K} references" in str(found)


def test_spread_of_normal_prompts():
    """Means and scores normal with variances v and 1: v / (v + 1) of the variance is between, medians of that law."""
    rng, K = np.random.default_rng(0), 25
    for v in (0.0, 4.0):
        rows = rng.normal(size=(4000, K)) + np.sqrt(v) * rng.normal(size=(4000, 1))
        found = health(table_of(rows)).spread
        assert found.between_share == pytest.approx(v / (v + 1), abs=0.02)
        edge = stats.norm.ppf(0.9) * np.sqrt(v + 1)
        median_sd = np.median(rng.normal(size=(20_000, K)), axis=1).std()
        tenth = stats.norm.sf(edge / np.hypot(np.sqrt(v), median_sd))
        for share in found.medians_in_top_tenth, found.medians_in_bottom_tenth:
            assert share == pytest.approx(tenth, abs=0.02)
        if v == 0.0:
            assert found.distance == pytest.approx(found.distance_by_chance, rel=0.1)


def test_chance_has_kolmogorovs_mean():
    """sqrt(pi / 2) log 2, the mean of the limit law of sqrt(K) times the distance."""
    found = health(table_of([np.arange(400.0)])).spread

    assert found.distance_by_chance == pytest.approx(np.sqrt(np.pi / 2) * np.log(2) / 20, rel=1e-4)
    assert stats.kstwobign.mean() == pytest.approx(np.sqrt(np.pi / 2) * np.log(2))


def test_a_large_table_is_sampled(monkeypatch):
    """Pooled quantiles come from every n-th prompt where there are many scores, and hardly change."""
    rows = np.random.default_rng(0).normal(size=(3000, 10)) + np.random.default_rng(1).normal(size=(3000, 1))
    whole = health(table_of(rows)).spread
    monkeypatch.setattr("calibrated_rewards.calibration.inspect_table._POOLED_SCORES", 9000)
    sampled = health(table_of(rows)).spread

    assert sampled.medians_in_top_tenth == pytest.approx(whole.medians_in_top_tenth, abs=0.02)
    assert sampled.medians_in_top_tenth != whole.medians_in_top_tenth


def test_the_first_odd_rows_of_each_reason_are_named():
    """As many as asked for, with their keys; all are counted."""
    rows = [*np.random.default_rng(0).normal(size=(200, 20)), *np.zeros((4, 20))]
    table = table_of(rows)
    found = health(table, most=2)

    assert found.odd_rows == {"all equal": 4}
    assert [(each.row, each.key) for each in found.odd] == [(i, i.to_bytes(16, "big").hex()) for i in (200, 201)]
    assert "4 rows\n" in str(found)
    assert f"{found.odd[0].key} (row 200): 20 references of 0\n" in str(found)


@settings(max_examples=30)
@given(
    scores, st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=99) | st.just([1, {}]))
)
def test_any_table_can_be_told(rows, meta):
    """One prompt, one reference, equal scores, ragged rows: a report, and JSON without nan."""
    made = ReferenceTable.build(((i.to_bytes(16, "big"), row) for i, row in enumerate(rows)), meta=meta)
    told = health(made)

    assert "nan" not in str(told.spread) + str(told.resolution)
    assert json.loads(json.dumps(told.as_json(), allow_nan=False))["size"]["prompts"] == len(rows)
    assert f"  prompts                 {len(rows)}\n" in str(told)


def test_what_a_table_is_made_with():
    """Fingerprints line by line, nothing for None, the number of probes for the probes."""
    probe = {"prompt": "p", "completion": "c", "score": 1.0}
    scorer = {"kind": "classifier", "text": {"max_length": 512, "template": None}}
    found = health(table_of([[1.0, 2.0]], scorer=scorer, sampler=None, seed=0, probes=[probe] * 3))

    assert "\n".join(
        [
            "made with",
            "  scorer                  kind: classifier",
            "                          text.max_length: 512",
            "  sampler                 nothing",
            "  seed                    0",
            "  probes                  3 pairs with their scores",
        ]
    ) in str(found)
    assert found.as_json()["meta"] == {"scorer": scorer, "sampler": None, "seed": 0, "probes": 3}
    assert "made with\n  not said\n" in str(health(table_of([[1.0]])))


def test_ragged_and_large_k_are_told():
    """K between its ends, and no bands for all at once where they take long."""
    told = str(health(table_of([range(4), range(8), range(1200)])))
    assert "1,212; 4 to 1,200 a prompt, the median has 8" in told
    assert "for all at once" in told
    assert "for all at once" not in str(health(table_of([range(1200)])))


def test_percent():
    """A share that is not zero never reads as zero."""
    assert [percent(x) for x in (0, 1e-9, 0.05, 0.999, 1)] == ["0 %", "< 0.1 %", "5 %", "99.9 %", "100 %"]
