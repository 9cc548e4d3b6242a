"""Figures: what is drawn is what was given, nothing is clipped, and nobody else's figures are touched."""

import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from calibrated_rewards import theory
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import IntervalEstimate
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate, FrontierPoint
from calibrated_rewards.evaluation.results import Evaluation, PolicyResult
from calibrated_rewards.evaluation.wording import format_objective, format_procedure
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.procedures import BestOf, Standard
from calibrated_rewards.theory.scale import moments
from calibrated_rewards.theory.transforms import Exponential, Identity, Log

ONE, FOUR = "Standard()", "BestOf(n=4)"
OBJECTIVES = ["raw", "identity", "log", "exp:10", "best-of:4", "par", "log-sigmoid", "$ _^{"]


def about(value, down=0.02, up=0.03):
    return IntervalEstimate(value, value - down, value + up, down, 50)


def point(name, place, kl, ess):
    rates = {judge: {ONE: about(0.5 + place / 50), FOUR: about(0.6 + place / 40)} for judge in ("reward", "judge")}
    return FrontierPoint(name, kl, 0.1, 0.2, ess, {ONE: 99.0, FOUR: ess}, rates, rates)


def policy(name, shift):
    rates = {"judge": {ONE: about(0.6 + shift), FOUR: IntervalEstimate(0.7 + shift, None, None, None, 1)}}
    return PolicyResult(name, about(0.5), about(20.0), {"judge": about(1.0)}, rates)


CURVES = [
    theory.frontier(t, [Standard(), BestOf(4)], [1.0, 0.2, 0.5])
    for t in (Identity(), Exponential(3.0), Exponential(-2.0))
]
FOUND = FrontierEstimate(
    tuple(point(name, i, kl, 9 - 8 * kl) for i, name in enumerate(OBJECTIVES) for kl in (1.0, 0.25)),
    (ONE, FOUR),
    "reward",
    50,
    64,
)
EVALUATION = Evaluation(
    policy("reference", 0), (policy("calibrated", 0.1), policy("_raw $1 and a long name", 0)), (), "reward", 50, 8
)
LOGS = {"_run": [{"step": i, "u": i / 40, "kl": None} for i in range(40)], "other": [{"step": 0, "u": 0.5}]}
RATIOS = {"calibrated": ([0.6] * 9 + [None], [0.5] * 9 + [3.0]), "_raw $1": ([0.5 + i / 10 for i in range(10)], None)}
RNG = np.random.default_rng(0)
TABLE = ReferenceTable.build([(f"prompt {i}", RNG.normal(i, 1, size=5 + i)) for i in range(30)])
DRAWN = {
    "frontier": lambda ax: plots.frontier(
        CURVES, BestOf(4), {"mine": (about(0.4), about(0.8)), "$_^": (0.3, about(0.7))}, ax
    ),
    "reweighted": lambda ax: plots.reweighted(FOUND, FOUR, "judge", ax),
    "scores_by_rank": lambda ax: plots.scores_by_rank(TABLE, ax=ax),
    "quantiles": lambda ax: plots.scores_by_rank(TABLE, quantiles=True, ax=ax),
    "transforms": lambda ax: plots.transforms([Identity(), Log(), Exponential(-2.0)], k=8, ax=ax),
    "training": lambda ax: plots.training(LOGS, "u", ax),
    "density_ratios": lambda ax: plots.density_ratios(RATIOS, ax),
    "outcomes": lambda ax: plots.outcomes(EVALUATION, "judge", ax=ax),
}
each_plot = pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)


def lines(ax, label=""):
    """The data of each line that has points, of one label."""
    found = [line for line in ax.lines if label in str(line.get_label()) and len(line.get_xdata())]
    return [np.array(line.get_data(), float) for line in found]


def whiskers(ax):
    """The two ends of every whisker."""
    return np.array(
        [np.array(path.vertices) for c in ax.collections for path in c.get_paths() if len(path.vertices) == 2]
    )


def shown_texts(ax):
    """What there is to read, but for the ticks beyond the ends of an axis."""
    (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    texts = [label for label in ax.get_xticklabels() if left <= label.get_position()[0] <= right]
    texts += [label for label in ax.get_yticklabels() if low <= label.get_position()[1] <= high]
    texts += [ax.xaxis.label, ax.yaxis.label, *(ax.get_legend().get_texts() if ax.get_legend() else [])]
    return [text for text in texts if text.get_text()]


@each_plot
def test_axes_in_axes_out(draw):
    """Given axes are drawn on and come back; without, there is a figure of its own, and pyplot knows nothing of it."""
    open_figures, settings = plt.get_fignums(), dict(mpl.rcParams)
    own = Figure().subplots()
    assert draw(own) is own
    assert own.lines or own.collections
    assert draw(None).figure is not own.figure
    assert plt.get_fignums() == open_figures
    assert dict(mpl.rcParams) == settings


@each_plot
def test_nothing_is_clipped_and_something_is_there(draw):
    """Labels, ticks and legend lie within the figure and apart from each other, and the figure is not blank."""
    ax = draw(None)
    figure = ax.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.02
    assert box.y0 >= -0.02
    assert box.x1 <= width + 0.02
    assert box.y1 <= height + 0.02
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    assert (pixels != 255).any(axis=1).mean() > 0.02
    shown = [text.get_window_extent().shrunk(0.9, 0.9) for text in shown_texts(ax)]
    assert not [(i, j) for i, a in enumerate(shown) for j, b in enumerate(shown) if i < j and a.overlaps(b)]


def test_without_matplotlib_it_says_what_to_install():
    """In a process that has none, and the error names it, as the command line needs it."""
    code = """import sys
sys.modules["matplotlib"] = None
try:
    import calibrated_rewards.evaluation.plots
except ModuleNotFoundError as error:
    print(error.name, error)"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("matplotlib")
    assert "calibrated-rewards[plots]" in said


def test_frontier_draws_theory_in_order_and_measurements_with_both_intervals():
    """Lines are the curve's own numbers by ascending KL; whiskers end where the intervals end."""
    ax = plots.frontier(CURVES, BestOf(4), {"mine": (about(0.4), about(0.8))})
    (x, y), *_ = lines(ax, "identity")
    betas = [1.0, 0.5, 0.2]
    assert np.allclose(x, [theory.kl(Identity(), beta) for beta in betas])
    assert np.allclose(y, [theory.win_rate(Identity(), beta, BestOf(4)) for beta in betas])
    ends = whiskers(ax)
    assert np.allclose(ends[0], [[0.38, 0.8], [0.43, 0.8]])
    assert np.allclose(ends[1], [[0.4, 0.78], [0.4, 0.83]])
    colours = [line.get_color() for line in ax.lines[:4]]
    assert len(set(colours)) == 4


def test_frontier_refuses_curves_of_another_procedure():
    """A curve that has no win rate for the procedure is an error that names it."""
    with pytest.raises(ValueError, match=r"curves of BestOf\(n=2\)"):
        plots.frontier(CURVES, BestOf(2))


def test_reweighted_draws_each_arm_and_hollows_what_rests_on_few():
    """Rates are those of procedure and judge, by ascending KL near their own; below five effective rollouts hollow."""
    ax = plots.reweighted(FOUND, FOUR, "judge")
    assert [text.get_text().strip().strip("$") for text in ax.get_legend().get_texts()][:4] == [
        format_objective(n) for n in OBJECTIVES[:4]
    ]
    drawn = lines(ax)
    assert len(drawn) == len(OBJECTIVES)
    for place, (x, y) in enumerate(drawn):
        assert np.allclose(y, 0.6 + place / 40)
        assert np.allclose(x, [0.25, 1.0], atol=0.05)
    marks = [c for c in ax.collections if len(c.get_offsets()) == 2 and c.get_facecolor().size]
    assert [len(c.get_facecolor()) for c in marks] == [2] * len(OBJECTIVES)
    assert all(c.get_facecolor()[0, 3] == 1 and c.get_facecolor()[1, 3] == 0 for c in marks)


def test_scores_by_rank_are_the_tables():
    """Named rows are drawn as they are; ten at most otherwise, from the lowest median to the highest."""
    ax = plots.scores_by_rank(TABLE, rows=[3, 17])
    for row, (x, y) in zip([3, 17], lines(ax), strict=True):
        K = len(TABLE.scores(row))
        assert np.array_equal(y, TABLE.scores(row))
        assert np.allclose(x, (2 * np.arange(K) + 1) / (2 * K))
    medians = [np.median(y) for _, y in lines(plots.scores_by_rank(TABLE))]
    everyone = [float(np.median(scores)) for _, scores in TABLE.items()]
    assert len(medians) == 10
    assert medians == sorted(medians)
    assert (medians[0], medians[-1]) == (min(everyone), max(everyone))


def test_quantiles_are_among_all_prompts_references():
    """Each score stands at the share of all references at or below it, counted one by one."""
    pool = np.concatenate([scores for _, scores in TABLE.items()])
    _, y = lines(plots.scores_by_rank(TABLE, rows=[5], quantiles=True))[0]
    assert np.allclose(y, [(pool <= score).mean() for score in TABLE.scores(5)])


@pytest.mark.parametrize("estimator", ["posterior", "empirical"])
def test_transforms_are_standardised_and_dots_are_finite_k_values(estimator):
    """Mean 0 and variance 1 under the reference; dots at whole ranks are `values` on the same scale."""
    ax = plots.transforms([Exponential(3.0)], k=6, estimator=estimator)
    mean, spread = moments(Exponential(3.0))
    curve, dots = lines(ax)
    assert np.allclose(curve[1], (np.exp(3 * curve[0]) - mean) / spread)
    assert np.allclose(dots[0], np.arange(7) / 6)
    assert np.allclose(dots[1], (values(Exponential(3.0), 6, estimator)[::2] - mean) / spread)


def test_training_leaves_out_what_was_not_logged():
    """A run without the quantity has no line; a single step is a mark."""
    ax = plots.training(LOGS, "kl")
    assert not lines(ax)
    assert ax.get_legend() is None
    raw, strong, dot, _ = lines(plots.training(LOGS, "u"))
    assert np.allclose(raw, [np.arange(40), np.arange(40) / 40])
    assert np.allclose(strong[1][10:], (np.arange(10, 40) - 1.5) / 40)
    assert dot.shape == (2, 1)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(1, 40))
def test_trailing_mean_is_the_mean_of_the_last(y, window):
    """Against the definition, place by place."""
    expected = [np.mean(y[max(0, i + 1 - window) : i + 1]) for i in range(len(y))]
    assert np.allclose(plots.trailing(np.array(y), window), expected, atol=1e-8)


def test_density_ratios_are_at_the_middle_of_their_tenths():
    """A line for the policy and a dashed one for its optimum, where it has one; a tenth without rollouts is a gap."""
    ax = plots.density_ratios(RATIOS)
    (ours, _), (optimum,), (raw,) = (lines(ax, label) for label in ("calibrated", "optimum", "raw"))
    np.testing.assert_allclose(ours[0], np.arange(0.05, 1, 0.1))
    assert np.isnan(ours[1][-1])
    assert optimum[1][-1] == 3
    np.testing.assert_allclose(raw[1], RATIOS["_raw $1"][0])
    assert ax.get_ylim()[0] == 0


def test_outcomes_stand_beside_their_policies():
    """Each win rate at its value, policies from the top in their order, and no whisker where there is no interval."""
    ax = plots.outcomes(EVALUATION, "judge")
    assert [label.get_text().strip() for label in ax.get_yticklabels()] == ["calibrated", r"_raw \$1 and a long name"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    one, four = (line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() not in ("None", ""))
    assert np.allclose(one.get_xdata(), [0.7, 0.6])
    assert np.allclose(four.get_xdata(), [0.8, 0.7])
    ends = whiskers(ax)[:, :, 0]
    assert np.allclose(ends, [[0.68, 0.73], [0.58, 0.63], [0.8, 0.8], [0.7, 0.7]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [format_procedure(ONE), format_procedure(FOUR)]
