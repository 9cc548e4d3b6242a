"""Predicted quantiles against known conditional distributions, and reported errors against fresh prompts and scipy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from calibrated_rewards.calibration.prediction import Amortised, Errors, fit
from calibrated_rewards.calibration.prediction.conditional import (
    Sample,
    fit_curve,
    map_values,
    read_sample,
)
from calibrated_rewards.calibration.prediction.judgement import (
    LEVELS,
    OWN,
    distance_from_uniform,
    pinball,
    rank_among_others,
)
from calibrated_rewards.calibration.prediction.regression import NETWORK_LEVELS, Network, train_network
from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.table.reference_table import ReferenceTable

rng = np.random.default_rng(0)
WEIGHTS = rng.normal(size=(8, 2)) * [0.5, 0.15]


@dataclass(frozen=True)
class Written:
    """Features that stand in the prompt itself."""

    width: int = 8

    def __call__(self, prompts: Any) -> np.ndarray:
        """The numbers that a prompt begins with."""
        return np.array([json.loads(prompt)[: self.width] for prompt in prompts], np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """How many."""
        return {"kind": "written", "width": self.width}


def asked(n: int, seed: int) -> list[str]:
    """Prompts that say their features."""
    return [json.dumps(row.round(3).tolist()) for row in np.random.default_rng(seed).normal(size=(n, 8))]


def truth(prompts: list[str]) -> Any:
    """A normal distribution for each prompt, its mean and its log scale linear in the features."""
    told = Written()(prompts).astype(np.float64) @ WEIGHTS
    return stats.norm(told[:, :1], np.exp(told[:, 1:]))


def table_of(prompts: list[str], k: int = 32, seed: int = 0) -> ReferenceTable:
    scores = truth(prompts).rvs((len(prompts), k), random_state=seed)
    return ReferenceTable.build(zip(prompts, scores, strict=True), meta={"scorer": {"kind": "normal"}})


SEEN, UNSEEN = asked(250, 1), asked(120, 2)
TABLE = table_of(SEEN)
FITTED = fit(TABLE, SEEN, Written(), network=False)


def test_quantiles_of_unseen_prompts() -> None:
    """They are near those of the known distribution, in the tails as well; one distribution for all is not."""
    levels = np.array([0.01, 0.1, 0.5, 0.9, 0.99])
    exact, found = truth(UNSEEN).ppf(levels), FITTED.quantiles(UNSEEN, levels)
    pooled = np.quantile(read_sample(TABLE, np.arange(250)).scores, levels)
    assert np.abs(found - exact).mean() < 0.15
    assert np.abs(pooled - exact).mean() > 0.9
    assert FITTED.errors.chosen == "+ scale"
    assert FITTED.errors.location_r2 == pytest.approx(1, abs=0.03)


def test_cdf_of_unseen_prompts() -> None:
    """So are the quantiles of scores, whose shape is (P,) or (P, G)."""
    scores = truth(UNSEEN).rvs((120, 5), random_state=3)
    found = FITTED.cdf(UNSEEN, scores)
    assert np.abs(found - truth(UNSEEN).cdf(scores)).mean() < 0.03
    np.testing.assert_array_equal(FITTED.cdf(UNSEEN, scores[:, 1]), found[:, 1])
    with pytest.raises(ValueError, match=r"finite scores, one or more for each of 2 prompts"):
        FITTED.cdf(UNSEEN[:2], [1.0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=10), st.integers(0, 119))
def test_never_outside_and_never_falling(scores: list[float], prompt: int) -> None:
    """However far a score is from all that was seen, its quantile is in [0, 1], and higher scores have no lower one."""
    u = FITTED.cdf([UNSEEN[prompt]], [np.sort(scores)])[0]
    assert (u >= 0).all()
    assert (u <= 1).all()
    assert (np.diff(u) >= 0).all()


def test_quantiles_and_cdf_are_inverse() -> None:
    """The quantile at a level has that level."""
    levels = np.array([0.001, 0.2, 0.5, 0.999])
    np.testing.assert_allclose(FITTED.cdf(UNSEEN, FITTED.quantiles(UNSEEN, levels)), np.tile(levels, (120, 1)))


def test_predictions_are_bounded() -> None:
    """A prompt unlike all others gets no location or scale beyond those of the table's prompts."""
    odd = json.dumps([1000.0] * 8)
    found = FITTED.quantiles([odd, json.dumps([-1000.0] * 8)], [0.25, 0.5, 0.75])
    seen = truth(SEEN)
    assert found[:, 1].min() > seen.mean().min() - 1
    assert found[:, 1].max() < seen.mean().max() + 1
    assert np.diff(found).max() < 1.5 * seen.std().max()


def test_the_table_of_predictions() -> None:
    """Its rows are the predicted quantiles, as many as the fitted table's; ranks in it are the predicted quantiles."""
    table = FITTED([*UNSEEN, UNSEEN[0]])
    assert len(table) == 120
    assert table.counts(np.arange(120)).tolist() == [32] * 120
    row = table.rows([UNSEEN[7]])
    np.testing.assert_array_equal(
        table.scores(int(row[0])), FITTED.quantiles([UNSEEN[7]], (np.arange(32) + 0.5) / 32)[0].astype(np.float32)
    )
    many = FITTED.table(UNSEEN, k=1000)
    scores = truth(UNSEEN).rvs((120, 1), random_state=4)[:, 0]
    np.testing.assert_allclose(many.cdf(many.rows(UNSEEN), scores), FITTED.cdf(UNSEEN, scores), atol=2e-3)
    assert many.meta["scorer"] == {"kind": "normal"}
    assert many.meta["amortised"]["features"] == {"kind": "written", "width": 8}
    with pytest.raises(ValueError, match=r"a table needs k >= 1, got k=0"):
        FITTED.table(UNSEEN, k=0)


def test_reported_errors_are_those_of_fresh_prompts() -> None:
    """What `errors` says of prompts left out is what prompts that nobody saw turn out to have."""
    scores = truth(UNSEEN).rvs((120, 64), random_state=5)
    found, said = FITTED.quantiles(UNSEEN, LEVELS), FITTED.errors.steps["+ scale"]
    # CRPS by its other formula: E|X - z| - E|X - X'| / 2.
    near = np.abs(scores[:, :, None] - found[:, None, :]).mean(axis=(1, 2))
    crps = (near - np.abs(found[:, :, None] - found[:, None, :]).mean(axis=(1, 2)) / 2).mean()
    assert said.crps == pytest.approx(crps, rel=0.15)
    u = FITTED.cdf(UNSEEN, scores)
    assert said.pit == pytest.approx(stats.kstest(u.ravel(), "uniform").statistic, abs=0.03)
    assert sum(said.histogram) == pytest.approx(1)
    np.testing.assert_allclose(said.histogram, np.histogram(u, 10, (0, 1))[0] / u.size, atol=0.03)
    # Near the 16 others that the report has for comparison, a prompt's own u is uncertain by some 0.08.
    assert said.u < 0.11
    assert FITTED.errors.steps["pooled"].u > 0.2
    assert FITTED.errors.steps["pooled"].crps > 1.5 * said.crps


def test_crps_has_its_closed_form() -> None:
    """Of a normal forecast: sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))."""
    z = np.sort(np.random.default_rng(6).normal(size=300))
    curve = stats.norm.ppf((np.arange(100) + 0.5) / 100)
    found = 2 * pinball(Sample(z, np.ones(300, int)), np.tile(curve, (300, 1)), LEVELS)
    exact = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)
    np.testing.assert_allclose(found, exact, atol=0.012)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 4)), min_size=2, max_size=30))
def test_distance_from_uniform(weighted: list[tuple[float, int]]) -> None:
    """Kolmogorov's, as scipy has it; a weight of 3 is three times the value."""
    u, weights = (np.array(each) for each in zip(*weighted, strict=True))
    expected = stats.kstest(np.repeat(u, weights), "uniform").statistic
    assert distance_from_uniform(u, weights.astype(float)) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=6), min_size=1, max_size=5))
def test_quantile_among_the_others(rows: list[list[float]]) -> None:
    """(below + equal / 2) of the other scores of the prompt, by counting."""
    sample = Sample(np.concatenate([np.sort(row) for row in rows]), np.array([len(row) for row in rows]))
    by_hand = [
        (sum(x < z for x in row) + (sum(x == z for x in row) - 1) / 2) / (len(row) - 1) if len(row) > 1 else np.nan
        for row in rows
        for z in sorted(row)
    ]
    np.testing.assert_allclose(rank_among_others(sample), by_hand)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99))
def test_halves_are_halves(counts: list[int], seed: int) -> None:
    """Together they are the sample; the second has the odd one; each stays sorted."""
    rows = [np.sort(np.random.default_rng(i).normal(size=count)) for i, count in enumerate(counts)]
    first, second = Sample(np.concatenate(rows), np.array(counts)).halves(np.random.default_rng(seed))
    ends = [np.split(half.scores, np.cumsum(half.counts)[:-1]) for half in (first, second)]
    for row, one, other in zip(rows, *ends, strict=True):
        assert len(other) - len(one) == len(row) % 2
        np.testing.assert_array_equal(np.sort(np.concatenate([one, other])), row)
        assert (np.diff(one) >= 0).all()
        assert (np.diff(other) >= 0).all()


def test_noise_tells_nothing() -> None:
    """Features that have nothing to do with the scores lead to one distribution for all, and the report says so."""
    others = dict(zip(SEEN, asked(250, 9), strict=True))
    found = fit(TABLE, SEEN, lambda prompts: Written()([others[prompt] for prompt in prompts]), network=False)
    assert found.errors.chosen == "pooled"
    assert found.errors.location_r2 < 0.05
    assert np.ptp(found.quantiles(SEEN, [0.5])) == 0


def test_uncertainty_is_in_the_width() -> None:
    """With nearly as many features as prompts a fit looks far better than it is; neither predictions nor report do."""
    rng = np.random.default_rng(21)
    features = dict(zip(map(str, range(700)), rng.normal(size=(700, 60)), strict=True))
    scores = np.array([row[0] for row in features.values()])[:, None] + rng.normal(size=(700, 1))
    scores = scores + 0.2 * rng.normal(size=(700, 16))
    seen, unseen = [*features][:80], [*features][80:]
    table = ReferenceTable.build(zip(seen, scores[:80], strict=True))
    found = fit(table, seen, lambda prompts: np.array([features[p] for p in prompts]), network=False)
    assert found.errors.chosen != "pooled"
    outside = np.abs(found.cdf(unseen, scores[80:]) - 0.5) > 0.45
    assert outside.mean() == pytest.approx(0.1, abs=0.06)
    fresh = Sample(np.sort(scores[80:]).ravel(), np.full(620, 16))
    crps = 2 * pinball(fresh, found.quantiles(unseen, LEVELS), LEVELS).mean()
    assert found.errors.steps[found.errors.chosen].crps == pytest.approx(crps, rel=0.1)


def test_ragged_tables() -> None:
    """K may differ between prompts, and be 1."""
    prompts, counts = asked(80, 11), np.random.default_rng(7).integers(1, 9, 80)
    scores = truth(prompts).rvs((80, 8), random_state=8)
    rows = [(prompt, row[:k]) for prompt, row, k in zip(prompts, scores, counts, strict=True)]
    found = fit(ReferenceTable.build(rows), prompts, Written(), network=False)
    assert found.errors.steps[found.errors.chosen].crps < 0.8 * found.errors.steps["pooled"].crps
    single = ReferenceTable.build([(prompt, scores[:1]) for prompt, scores in rows])
    alone = fit(single, prompts, Written(), network=False).errors
    assert OWN not in alone.steps
    assert np.isnan(alone.steps["pooled"].u)


def random_network(seed: int, size: float) -> tuple[Network, Any]:
    """A network with random weights, and the same in torch."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(8, 6), torch.nn.SiLU(), torch.nn.Linear(6, 6), torch.nn.SiLU(), torch.nn.Linear(6, 5)]
    net = torch.nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(size)
    weights = [parameter.detach().numpy().T for parameter in net.parameters()]
    return Network(np.array([-2.0, -1.0, 0.0, 0.0, 3.0]), *weights), net


@given(st.integers(0, 50), st.floats(0.1, 20))
def test_the_network_gives_quantiles(seed: int, size: float) -> None:
    """Whatever its weights, its answers ascend, and are those of the same layers in torch."""
    network, net = random_network(seed, size)
    features = np.random.default_rng(seed).normal(size=(7, 8))
    found, told = network(features), net(torch.tensor(features)).detach()
    assert (np.diff(found) >= 0).all()
    steps = np.maximum(np.diff(network.quantiles), 1e-3 * 5)
    steps = torch.nn.functional.softplus(torch.tensor(np.log(np.expm1(steps))) + told[:, 1:])
    np.testing.assert_allclose(np.diff(found), steps.numpy(), atol=1e-6)
    np.testing.assert_allclose(found[:, 0], told[:, 0].numpy() - 2, atol=1e-9)


def test_moved_is_a_monotone_map() -> None:
    """Numpy's interpolation between the knots, a shift outside, and back again by the map the other way."""
    start, end = np.array([[0.0, 1.0, 4.0]]), np.array([[-1.0, 5.0, 6.0]])
    values = np.linspace(-3, 8, 45)
    inside = (values >= 0) & (values <= 4)
    found = map_values(values, start, end)
    np.testing.assert_allclose(found[inside], np.interp(values[inside], start[0], end[0]))
    np.testing.assert_allclose(found[~inside], values[~inside] + np.where(values[~inside] < 0, -1, 2))
    np.testing.assert_allclose(map_values(found, end, start), values)


@pytest.fixture(scope="module")
def bent() -> tuple[Amortised, ReferenceTable, list[str]]:
    """A feature turns the skew around, and leaves mean and variance alone: nothing linear can say that."""
    rows = np.random.default_rng(12).normal(size=(160, 8)).round(3)
    rows[:, 0] = np.sign(rows[:, 0]) * 1.5
    prompts = [json.dumps(row.tolist()) for row in rows]
    scores = np.sign(rows[:, :1]) * (np.random.default_rng(13).exponential(size=(160, 32)) - 1)
    table = ReferenceTable.build(zip(prompts, scores, strict=True))
    return fit(table, prompts, Written(), folds=2), table, prompts


def test_the_network_learns_a_shape(bent: tuple[Amortised, ReferenceTable, list[str]]) -> None:
    """It is chosen, and its quantiles for new prompts have the skew that their features say."""
    steps = bent[0].errors.steps
    assert bent[0].errors.chosen == "+ network"
    assert steps["+ network"].crps < 0.985 * steps["+ scale"].crps
    assert steps["+ network"].u < 0.92 * steps["+ scale"].u
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    found = bent[0].quantiles([json.dumps([x] + [0.0] * 7) for x in (1.5, -1.5)], levels)
    exact = stats.expon.ppf(levels) - 1
    either = stats.laplace.ppf(levels)  # of one distribution for both, roughly
    for quantiles, skewed in (found[0], exact), (found[1], -exact[::-1]):
        assert np.abs(quantiles - skewed).mean() < 0.6 * np.abs(either - skewed).mean()


def test_the_network_reads_no_more_than_helps() -> None:
    """Where the first coordinate tells all, it leaves those alone with which it would only learn prompts by heart."""
    rng = np.random.default_rng(31)
    coordinates = np.hstack([rng.choice([-1.5, 1.5], (150, 1)), rng.normal(size=(150, 60))])
    scores = np.sort(np.sign(coordinates[:, :1]) * (rng.exponential(size=(150, 32)) - 1), axis=1)
    curve = fit_curve(scores.ravel(), np.ones(4800), LEVELS)
    network = train_network(coordinates, scores.ravel(), np.full(150, 32), curve.icdf(NETWORK_LEVELS), 0)
    assert network.first.shape[0] == 61
    assert np.abs(network.first[:8]).min() > 0
    assert np.abs(network.first[8:]).max() == 0


def test_what_is_saved_is_loaded(bent: tuple[Amortised, ReferenceTable, list[str]], tmp_path: Path) -> None:
    """The same quantiles, errors and meta; other features, an altered file and another format are refused."""
    for name, each in ("bent", bent[0]), ("plain", FITTED):
        each.save(tmp_path / name)
        back = Amortised.load(tmp_path / name, Written())
        np.testing.assert_array_equal(back.quantiles(UNSEEN, LEVELS), each.quantiles(UNSEEN, LEVELS))
        assert back.errors == each.errors
        assert (back.meta, back.k) == (each.meta, each.k)
    with pytest.raises(ValueError, match=r"fitted on other features"):
        Amortised.load(tmp_path / "plain", Written(4))
    data = tmp_path / "plain" / "amortised.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is not the one that amortised.json was written with"):
        Amortised.load(tmp_path / "plain", Written())
    summary = tmp_path / "bent" / "amortised.json"
    summary.write_text(summary.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match=r"format 9, this version reads 1"):
        Amortised.load(tmp_path / "bent", Written())


def test_the_report_is_a_table() -> None:
    """A line for each step, the one that is used marked, the own references named with how many they are."""
    lines = str(FITTED.errors).splitlines()
    assert [line[:24].strip() for line in lines[1:-1]] == ["pooled", "+ location", "+ scale", "own references (16)"]
    assert [line.endswith("<- used") for line in lines[1:-1]] == [False, False, True, False]
    assert Errors.from_json(json.loads(json.dumps(FITTED.errors.as_json()))) == FITTED.errors


def test_the_same_seed_the_same_fit() -> None:
    """Prompts in another order, or twice, change nothing; torch's own random state is left as it was."""
    prompts = SEEN[:30]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again, other = (fit(TABLE, each, Written(), folds=2) for each in (prompts, [*reversed(prompts), *prompts[:5]]))
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(other.quantiles(UNSEEN, [0.3]), again.quantiles(UNSEEN, [0.3]))
    assert other.errors == again.errors
    assert other.errors.steps["+ network"] != fit(TABLE, prompts, Written(), folds=2, seed=1).errors.steps["+ network"]


def test_what_cannot_be_fitted_is_refused() -> None:
    """Prompts that the table lacks, too few of them, features of another shape, width or with nan in them."""
    with pytest.raises(UnknownPromptError, match="no references"):
        fit(TABLE, UNSEEN, Written())
    with pytest.raises(ValueError, match=r"2 <= folds <= half of the 3 prompts, got folds=5"):
        fit(TABLE, SEEN[:3], Written())
    with pytest.raises(ValueError, match=r"levels >= 2, got levels=1"):
        fit(TABLE, SEEN, Written(), levels=1)
    with pytest.raises(ValueError, match=r"gives 250 prompts a row of numbers each, got float64 \(250,\)"):
        fit(TABLE, SEEN, lambda prompts: np.ones(len(prompts)))
    narrow = Amortised(Written(4), FITTED.model, FITTED.errors, {}, 4, {})
    with pytest.raises(ValueError, match=r"fitted on features of width 8, .* gave width 4"):
        narrow.quantiles(UNSEEN, [0.5])
    broken = Amortised(lambda prompts: np.full((len(prompts), 8), np.nan), FITTED.model, FITTED.errors, {}, 4, {})
    with pytest.raises(ValueError, match=r"features are finite numbers"):
        broken.quantiles(UNSEEN, [0.5])
