"""Calibrations: each against a loop over references, and what each one does and does not depend on."""

import pickle
from math import exp, log1p, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from calibrated_rewards.reward.calibrators import (
    Calibration,
    EmpiricalCDF,
    LogSigmoidAtQuantile,
    MedianCentered,
    SmoothedCDF,
    ZScore,
)
from calibrated_rewards.table.reference_table import ReferenceTable

PEERS = [
    EmpiricalCDF(tolerance=0.5),
    SmoothedCDF(),
    SmoothedCDF(temperature=0.25),
    ZScore(),
    MedianCentered(),
    MedianCentered(scale=3.0),
    MedianCentered(scale="mad"),
    LogSigmoidAtQuantile(),
    LogSigmoidAtQuantile(q=0.3),
]
ALL = [EmpiricalCDF(), *PEERS]

# Quarters are exact in float32, so that sums and maps of them tie exactly where they should.
SCORE = st.integers(-12, 12).map(lambda n: n / 4)
REFERENCES = st.lists(SCORE, min_size=1, max_size=7)


def sigmoid(x):
    return 1 / (1 + exp(-x)) if x > -700 else 0.0


def median(values):
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def by_loop(calibration, r, z):
    """One score among its references, straight from the formula."""
    match calibration:
        case EmpiricalCDF(tolerance=tau):
            return sum(0.5 if abs(r - x) <= tau else float(r > x) for x in z) / len(z)
        case SmoothedCDF(temperature=t):
            return sum(sigmoid((r - x) / t) for x in z) / len(z)
        case ZScore():
            mean = sum(z) / len(z)
            sd = sqrt(sum((x - mean) ** 2 for x in z) / len(z))
            return (r - mean) / sd if min(z) < max(z) else 0.0
        case MedianCentered(scale="mad"):
            gap, mad = r - median(z), median([abs(x - median(z)) for x in z])
            return sigmoid(gap / mad) if mad else (0.5 if gap == 0 else float(gap > 0))
        case MedianCentered(scale=scale):
            return sigmoid((r - median(z)) / scale)
        case LogSigmoidAtQuantile(q=q):
            at = min(x for x in z if sum(y <= x for y in z) / len(z) >= q)
            return -log1p(exp(at - r))


def calibrate(calibration, references, scores):
    table = ReferenceTable.build([("prompt", references)])
    return calibration(table, np.zeros(len(scores), np.int64), np.array(scores))


@pytest.mark.parametrize("calibration", ALL, ids=repr)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), references=st.lists(REFERENCES, min_size=1, max_size=4))
def test_is_its_formula_for_every_score(calibration, data, references):
    """Ragged rows, K = 1, ties and all-equal rows among them, prompts in any order: the same as a loop."""
    prompts = [f"prompt {i}" for i in range(len(references))]
    table = ReferenceTable.build(list(zip(prompts, references, strict=True)))
    asked = data.draw(st.lists(st.tuples(st.integers(0, len(references) - 1), SCORE), min_size=1, max_size=8))
    values = calibration(table, table.rows([prompts[i] for i, _ in asked]), np.array([r for _, r in asked]))

    assert values.dtype == np.float64
    assert values == pytest.approx([by_loop(calibration, r, references[i]) for i, r in asked], abs=1e-12)


@pytest.mark.parametrize("calibration", ALL, ids=repr)
def test_many_scores_are_taken_in_chunks(calibration):
    """More references than a block of the table holds, of two sizes, in mixed order."""
    rng = np.random.default_rng(0)
    references = {"a": rng.normal(size=900).round(2), "b": rng.normal(size=70).round(2)}
    table = ReferenceTable.build(list(references.items()))
    prompts = rng.choice(["a", "b"], size=800)
    scores = rng.normal(size=800)
    values = calibration(table, table.rows(list(prompts)), scores)
    checked = rng.choice(800, size=25, replace=False)
    loop = [by_loop(calibration, float(np.float32(scores[i])), table_row(references[prompts[i]])) for i in checked]

    assert values[checked] == pytest.approx(loop, abs=1e-12)


def table_row(references):
    return np.float32(references).astype(float).tolist()


@pytest.mark.parametrize("calibration", ALL, ids=repr)
@settings(max_examples=25, deadline=None)
@given(references=REFERENCES, scores=st.lists(SCORE, min_size=2, max_size=10))
def test_a_better_score_is_never_worth_less(calibration, references, scores):
    """Monotone in r for a given prompt (Lemma 2)."""
    values = calibrate(calibration, references, sorted(scores))

    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize(
    ("calibration", "low", "high"),
    [(c, 0, 1) for c in ALL if isinstance(c, EmpiricalCDF | SmoothedCDF | MedianCentered)]
    + [(LogSigmoidAtQuantile(), -np.inf, 0), (ZScore(), -np.inf, np.inf)],
    ids=repr,
)
def test_stays_in_its_range_and_finite_at_the_extremes(calibration, low, high):
    """The largest floats, all references equal, and a single one (Lemma 2: bounded)."""
    most, least = float(np.finfo(np.float32).max), float(np.float32(1e-45))
    for references in ([0.0], [most], [1.0, 1.0, 1.0], [-most, 0.0, most], [0.0, least], [0.1] * 3):
        values = calibrate(calibration, references, [-most, -1.0, 0.0, least, 0.1, 1.0, most])

        assert np.isfinite(values).all()
        assert ((values >= low) & (values <= high)).all()


MAPS = {
    "shift": lambda x: x + 8,
    "scale": lambda x: 4 * x,
    "cube": lambda x: x**3,
}
KEEPS = {
    EmpiricalCDF(): {"shift", "scale", "cube"},
    EmpiricalCDF(tolerance=0.5): {"shift"},
    SmoothedCDF(): {"shift"},
    ZScore(): {"shift", "scale"},
    MedianCentered(): {"shift"},
    MedianCentered(scale="mad"): {"shift", "scale"},
    LogSigmoidAtQuantile(): {"shift"},
}
KEPT = [(calibration, name) for calibration, names in KEEPS.items() for name in sorted(names)]
LOST = [(calibration, name) for calibration, names in KEEPS.items() for name in sorted(set(MAPS) - names)]


@pytest.mark.parametrize(("calibration", "name"), KEPT, ids=repr)
@settings(max_examples=25, deadline=None)
@given(references=REFERENCES, scores=st.lists(SCORE, min_size=1, max_size=5))
def test_what_leaves_the_values_alone(calibration, name, references, scores):
    """Maps of the reward model that a calibration does not see; `EmpiricalCDF` sees no increasing map (Lemma 3)."""
    change = MAPS[name]
    before = calibrate(calibration, references, scores)
    after = calibrate(calibration, [change(z) for z in references], [change(r) for r in scores])

    assert after == pytest.approx(before, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), references=REFERENCES, scores=st.lists(SCORE, min_size=1, max_size=5))
def test_empirical_cdf_depends_on_the_order_alone(data, references, scores):
    """Lemma 3, for an increasing map of no formula: any other floats in the same order."""
    levels = sorted({*references, *scores})
    others = sorted(
        data.draw(st.sets(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=len(levels)))
    )
    change = dict(zip(levels, others[: len(levels)], strict=True))
    before = calibrate(EmpiricalCDF(), references, scores)
    after = calibrate(EmpiricalCDF(), [change[z] for z in references], [change[r] for r in scores])

    assert np.array_equal(before, after)


@pytest.mark.parametrize(("calibration", "name"), LOST, ids=repr)
def test_what_changes_the_values(calibration, name):
    """One prompt on which the map that the docstring warns of moves a value by more than .01."""
    references, score, change = [0.0, 0.25, 1.0, 2.0, 3.0], 0.5, MAPS[name]
    before = calibrate(calibration, references, [score])
    after = calibrate(calibration, [change(z) for z in references], [change(score)])

    assert abs(after - before) > 0.01


@settings(max_examples=50, deadline=None)
@given(references=REFERENCES, scores=st.lists(SCORE, min_size=1, max_size=5))
def test_smoothed_cdf_becomes_the_empirical_one(references, scores):
    """Temperature to 0, with ties (sigmoid(0) = 1/2) and without; even where the division overflows."""
    exact = calibrate(EmpiricalCDF(), references, scores)

    for temperature in (1e-3, 1e-310):
        assert calibrate(SmoothedCDF(temperature), references, scores) == pytest.approx(exact, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(references=REFERENCES, scores=st.lists(SCORE, min_size=1, max_size=5))
def test_tolerance_at_its_limits(references, scores):
    """Less than the smallest gap: the exact CDF; more than the largest: all ties, one half."""
    exact = calibrate(EmpiricalCDF(), references, scores)

    assert np.array_equal(calibrate(EmpiricalCDF(tolerance=0.1), references, scores), exact)
    assert np.array_equal(calibrate(EmpiricalCDF(tolerance=6.0), references, scores), np.full(len(scores), 0.5))


def test_tolerance_includes_its_end():
    """A reference at exactly the tolerance still ties, on both sides, and one just beyond does not."""
    assert calibrate(EmpiricalCDF(tolerance=0.25), [0.75, 1.25], [1.0]).tolist() == [0.5]
    assert calibrate(EmpiricalCDF(tolerance=0.25), [0.5, 0.75], [1.0]).tolist() == [0.75]


def test_one_reference_is_a_baseline():
    """K = 1: a comparison, CGPO's sigmoid, no spread to divide by, and the median and quantile are it."""
    score, reference = 1.5, 1.0

    assert calibrate(EmpiricalCDF(), [reference], [score, reference, 0.0]).tolist() == [1, 0.5, 0]
    assert calibrate(SmoothedCDF(2.0), [reference], [score]) == pytest.approx(sigmoid(0.25))
    assert calibrate(ZScore(), [reference], [score]).tolist() == [0]
    assert calibrate(MedianCentered(), [reference], [score]) == pytest.approx(sigmoid(0.5))
    assert calibrate(MedianCentered("mad"), [reference], [score, reference]).tolist() == [1, 0.5]
    assert calibrate(LogSigmoidAtQuantile(), [reference], [score]) == pytest.approx(-log1p(exp(-0.5)))


@pytest.mark.parametrize("reference", [0.1, -3.3e38, 1e-45])
def test_equal_references_have_no_spread_at_all(reference):
    """Not even that of a rounded mean, which a division would blow up; two neighbouring floats do have one."""
    reference = float(np.float32(reference))
    for k in range(1, 120, 7):
        assert calibrate(ZScore(), [reference] * k, [5.0]).tolist() == [0]
    neighbour = float(np.nextafter(np.float32(reference), np.float32(np.inf)))

    assert calibrate(ZScore(), [reference, neighbour], [reference, neighbour]).tolist() == [-1, 1]


def test_standardises_the_references_themselves():
    """Mean 0 and variance 1 over them, the median at 1/2, the q-quantile at log 1/2."""
    references = np.random.default_rng(1).normal(3, 7, size=101)
    standard = calibrate(ZScore(), references, references)

    assert (standard.mean(), standard.std()) == pytest.approx((0, 1), abs=1e-12)
    assert calibrate(MedianCentered(), references, [float(np.median(references))]) == pytest.approx(0.5, abs=1e-12)
    assert calibrate(LogSigmoidAtQuantile(0.5), references, [float(np.median(references))]) == pytest.approx(-np.log(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_empirical_cdf_of_tensors_is_a_tensor(dtype):
    """The same numbers as for arrays."""
    table = ReferenceTable.build([("a", [0.0, 1.0, 1.0, 2.0]), ("b", [-1.0, 5.0])])
    rows, scores = table.rows(["a", "b", "a"]), torch.tensor([1.0, 5.0, 3.0], dtype=dtype)
    values = EmpiricalCDF()(table, torch.from_numpy(rows), scores)

    assert isinstance(values, torch.Tensor)
    assert values.tolist() == EmpiricalCDF()(table, rows, scores.double().numpy()).tolist() == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("calibration", PEERS, ids=repr)
def test_others_refuse_tensors(calibration):
    """They would come back as arrays, on another device: an error that says what does take them."""
    table = ReferenceTable.build([("a", [0.0, 1.0])])

    with pytest.raises(TypeError, match=r"needs numpy scores \(EmpiricalCDF\(\) .* takes tensors\), got Tensor"):
        calibration(table, torch.tensor([0]), torch.tensor([0.5]))


@pytest.mark.parametrize("calibration", ALL, ids=repr)
@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (-np.inf, "-inf"), (1e39, r"1e\+39")])
def test_scores_that_are_no_number_are_refused(calibration, bad, shown):
    """nan, infinite, or infinite once rounded to float32: named with the position."""
    table = ReferenceTable.build([("a", [0.0, 1.0])])

    with pytest.raises(ValueError, match=rf"finite.*{shown}.*1"):
        calibration(table, np.zeros(3, np.int64), np.array([0.5, bad, 0.25]))


@pytest.mark.parametrize("calibration", ALL, ids=repr)
def test_rows_that_do_not_fit_are_refused(calibration):
    """A row for each score, and rows that the table has."""
    table = ReferenceTable.build([("a", [0.0, 1.0])])

    with pytest.raises(ValueError, match="shape"):
        calibration(table, np.zeros(2, np.int64), np.zeros(3))
    with pytest.raises(IndexError):
        calibration(table, np.array([1]), np.zeros(1))
    assert len(calibration(table, np.zeros(0, np.int64), np.zeros(0))) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmpiricalCDF(tolerance=-0.1), "EmpiricalCDF needs a finite tolerance >= 0, got tolerance=-0.1."),
        (lambda: EmpiricalCDF(tolerance=np.nan), "tolerance >= 0, got tolerance=nan."),
        (lambda: SmoothedCDF(0.0), "SmoothedCDF needs a finite temperature > 0, got temperature=0.0."),
        (lambda: SmoothedCDF(np.inf), "temperature > 0, got temperature=inf."),
        (lambda: MedianCentered(0.0), 'MedianCentered needs a finite scale > 0 or "mad", got scale=0.0.'),
        (lambda: MedianCentered(np.nan), 'scale > 0 or "mad", got scale=nan.'),
        (lambda: LogSigmoidAtQuantile(1.5), r"LogSigmoidAtQuantile needs a q in \[0, 1\], got q=1.5."),
        (lambda: LogSigmoidAtQuantile(np.nan), r"q in \[0, 1\], got q=nan."),
    ],
)
def test_bad_parameters_are_refused(make, message):
    """Each error names the calibration, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("calibration", ALL, ids=repr)
def test_is_a_value(calibration):
    """Callable as the protocol says, equal by parameters, hashable, picklable; its repr makes it."""
    assert isinstance(calibration, Calibration)
    assert pickle.loads(pickle.dumps(calibration)) == calibration == eval(repr(calibration))
    assert hash(calibration) == hash(eval(repr(calibration)))


def test_tolerance_on_a_decimal_grid():
    """Scores 0, .1, ... 1 with a tolerance of .1: neighbours tie, though float32 rounds them apart."""
    grid = np.arange(11) / 10
    table = ReferenceTable.build([("p", grid)])
    u = EmpiricalCDF(tolerance=0.1)(table, np.zeros(11, int), grid)

    assert 11 * u == pytest.approx([1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10])
