"""Figures of tables, transforms, training and results, each drawn on given axes or on a figure of its own.

Every function takes `ax=None` and returns `ax`; pyplot is not touched, and `ax.figure.savefig(path)` saves it. Lines
and marks differ by shape as well as by colour, in a palette that the colour-blind can tell apart. Whiskers are 95 %
intervals.

>>> from calibrated_rewards.theory.transforms import Exponential, Identity
>>> ax = transforms([Identity(), Exponential(10.0)], k=16)
>>> ax.get_xlabel()
'calibrated reward u'
"""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from jaxtyping import Float64

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as missing:
    message = "figures need matplotlib: pip install 'calibrated-rewards[plots]'"
    raise ModuleNotFoundError(message, name=missing.name) from missing

from calibrated_rewards.evaluation.estimates import IntervalEstimate
from calibrated_rewards.evaluation.frontier_results import RELIABLE_ESS, FrontierEstimate
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.evaluation.wording import format_objective, format_procedure, format_transform
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.procedures import Procedure
from calibrated_rewards.theory.scale import Scale, scaled
from calibrated_rewards.theory.tilted_policy import Frontier
from calibrated_rewards.theory.transforms import Transform

# Okabe and Ito's palette, without its yellow, invisible on white, and its black, invisible on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
# The colour of texts, spines and lines without a label.
INK = "#24292f"
QUANTITIES = {
    "u": "calibrated reward u",
    "kl": "KL from the reference, nats",
    "reward": "reward",
    "objective": "reward less β KL",
    "tokens": "tokens of a completion",
}


def frontier(
    curves: Sequence[Frontier],
    procedure: Procedure,
    measured: Mapping[str, tuple[float | IntervalEstimate, IntervalEstimate]] | None = None,
    ax: Axes | None = None,
    *,
    on_table: Frontier | None = None,
) -> Axes:
    """Draw win rate against KL: theory as lines, and measured pairs of KL and win rate as marks with intervals.

    `on_table` is one more line, for the policies that fit the rewards of a table (`expectations`).
    """
    ax = _prepare(ax)
    points = measured or {}
    lines = [(curve, "theory") for curve in curves]
    if on_table is not None:
        lines.append((on_table, "this table"))
    styles = _styles(len(lines) + len(points))
    for (curve, source), (colour, dash, _) in zip(lines, styles, strict=False):
        if procedure not in curve.procedures:
            raise ValueError(f"frontier needs curves of {procedure!r}, got one of {curve.procedures!r}.")
        rates, order = curve.win_rates[curve.procedures.index(procedure)], np.argsort(curve.kl)
        ax.plot(
            curve.kl[order],
            rates[order],
            dash,
            color=colour,
            label=_escape(f"{format_transform(curve.transform)}, {source}"),
        )
    for (name, (kl, rate)), (colour, _, mark) in zip(points.items(), styles[len(lines) :], strict=True):
        at = kl if isinstance(kl, IntervalEstimate) else IntervalEstimate(kl, None, None, None, rate.prompts)
        ax.errorbar(
            at.value,
            rate.value,
            yerr=_whiskers([rate]),
            xerr=_whiskers([at]),
            fmt=mark,
            color=colour,
            label=_escape(name),
        )
    ax.axhline(0.5, color=INK, lw=0.8, alpha=0.5)
    ax.set(xlabel=QUANTITIES["kl"], ylabel=f"win rate, {format_procedure(procedure)}")
    return _add_legend(ax, beneath=True)


def reweighted(frontier: FrontierEstimate, procedure: str, judged_by: str, ax: Axes | None = None) -> Axes:
    """Draw the frontier without training: each objective's win rate against KL, hollow where its ESS is low."""
    names = list(dict.fromkeys(point.arm for point in frontier.points))
    ax = _prepare(ax, height=3.4 + 0.07 * len(names))
    # Points of one KL would hide each other's whiskers.
    apart = 0.06 * max((point.kl for point in frontier.points), default=0.0) / max(len(names), 1)
    for place, (name, (colour, dash, mark)) in enumerate(zip(names, _styles(len(names)), strict=True)):
        points = sorted((point for point in frontier.points if point.arm == name), key=lambda point: point.kl)
        rates = [point.win_rates[judged_by][procedure] for point in points]
        x = np.array([point.kl for point in points]) + apart * (place - (len(names) - 1) / 2)
        y = [rate.value for rate in rates]
        ax.plot(x, y, dash, color=colour, lw=1.2)
        faces = ["none" if point.ess_of[procedure] < RELIABLE_ESS else colour for point in points]
        ax.errorbar(x, y, yerr=_whiskers(rates), fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)
        ax.scatter(x, y, marker=mark, facecolors=faces, edgecolors=colour, s=28, zorder=3)
        ax.plot([], [], dash, color=colour, marker=mark, ms=5, label=_escape(format_objective(name)))
    ax.set(xlabel=QUANTITIES["kl"], ylabel=f"win rate by {_escape(judged_by)}, {format_procedure(procedure)}")
    return _add_legend(ax, beneath=True)


def scores_by_rank(
    table: ReferenceTable, rows: Sequence[int] | None = None, quantiles: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw the paper's Fig. 3: each prompt's sorted reference scores against their rank, a line a prompt.

    Lines that lie apart are prompts whose raw scores cannot be compared. `quantiles` replaces each score by its
    quantile among the references of all prompts; on the dashed line no calibration would be needed. Without `rows` ten
    are drawn, from the lowest median to the highest.
    """
    ax = _prepare(ax)
    chosen = _choose_rows(table) if rows is None else list(rows)
    pool = np.sort(np.concatenate([table.scores(row) for row in _sample_rows(table)])) if quantiles else None
    shades = np.linspace(0.15, 0.95, len(chosen))
    for row, shade in zip(chosen, shades, strict=True):
        scores = table.scores(row)
        y = scores if pool is None else np.searchsorted(pool, scores, "right") / len(pool)
        colour = tuple((1 - shade) * np.array([0.90, 0.62, 0.0]) + shade * np.array([0.0, 0.30, 0.70]))
        ax.plot((np.arange(len(scores)) + 0.5) / len(scores), y, color=colour, lw=1.2, marker="." * (len(scores) < 3))
    if quantiles:
        ax.plot([0, 1], [0, 1], "--", color=INK, lw=1)
    ax.set(xlabel="rank among the prompt's own references", ylabel="raw score" + ", as a quantile of all" * quantiles)
    return ax


def transforms(
    given: Sequence[Transform],
    k: int | None = None,
    estimator: Estimator = "posterior",
    scale: Scale = "standard",
    ax: Axes | None = None,
) -> Axes:
    """Draw transforms over the calibrated reward, on one scale; dots are their values for ranks among k references."""
    ax = _prepare(ax)
    u = np.linspace(0.002, 0.998, 500)
    for transform, (colour, dash, mark) in zip(given, _styles(len(given)), strict=True):
        phi = scaled(transform, scale)
        ax.plot(u, np.asarray(phi(u), np.float64), dash, color=colour, label=_escape(format_transform(transform)))
        if k is not None:
            ax.plot(np.arange(k + 1) / k, values(phi, k, estimator)[::2], mark, color=colour, ms=3.5)
    worth = {"standard": "value, in standard deviations", "unit": "value, from 0 to 1", "raw": "value"}[scale]
    ax.set(xlabel=QUANTITIES["u"], ylabel=worth)
    return _add_legend(ax)


def training(logs: Mapping[str, Sequence[Mapping[str, Any]]], name: str = "u", ax: Axes | None = None) -> Axes:
    """Draw training curves from the rows of log.jsonl: each step faint, the mean over the last tenth of them strong."""
    ax = _prepare(ax)
    for (run, rows), (colour, dash, _) in zip(logs.items(), _styles(len(logs)), strict=True):
        pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not pairs:
            continue
        steps, y = np.array(pairs, np.float64).T
        ax.plot(steps, y, color=colour, lw=1, alpha=0.35, marker="." * (len(y) == 1))
        ax.plot(steps, trailing(y, max(1, len(y) // 10)), dash, color=colour, label=_escape(run))
    ax.set(xlabel="step", ylabel=QUANTITIES.get(name, name))
    return _add_legend(ax)


def outcomes(
    evaluation: Evaluation, judged_by: str, procedures: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw each policy's win rates over the reference, a mark a procedure; the line at 0.5 is the reference itself."""
    ax = _prepare(ax)
    by_policy = {policy.name: policy.win_rates[judged_by] for policy in evaluation.policies}
    if procedures is None:
        procedures = list(dict.fromkeys(each for rates in by_policy.values() for each in rates))
    for place, (procedure, (colour, _, mark)) in enumerate(zip(procedures, _styles(len(procedures)), strict=True)):
        y = np.arange(len(by_policy)) + 0.16 * (place - (len(procedures) - 1) / 2)
        rates = [each[procedure] for each in by_policy.values()]
        x = [rate.value for rate in rates]
        ax.errorbar(
            x, y, xerr=_whiskers(rates), fmt=mark, color=colour, ms=6, label=_escape(format_procedure(procedure))
        )
    ax.axvline(0.5, color=INK, lw=0.8, alpha=0.5)
    ax.set_yticks(np.arange(len(by_policy)), [_escape(name) for name in by_policy])
    ax.set(ylim=(len(by_policy) - 0.4, -0.6), xlabel=f"win rate over the reference, by {_escape(judged_by)}")
    return _add_legend(ax, beneath=True)


def held_out(compared: HeldOutPolicies, ax: Axes | None = None) -> Axes:
    """Draw the win rates of policies on the same held-out rollouts, procedure by procedure, by the judge."""
    ax, judge = _prepare(ax), compared.judged_by
    rates = {
        name: [check.win_rates[judge][each] for each in compared.procedures] for name, check in compared.checks.items()
    }
    _draw_by_procedure(rates, compared.procedures, 1, ax)
    ax.axhline(0.5, color=INK, lw=0.8, alpha=0.5)
    ax.set_ylabel(f"win rate over the reference, by the {compared.judge_word}")
    return _add_legend(ax, beneath=True)


def held_out_gains(compared: HeldOutPolicies, ax: Axes | None = None) -> Axes:
    """Draw how much more each policy wins than the first one on the same held-out rollouts, in points, paired."""
    ax = _prepare(ax)
    first, *others = compared.checks
    gains = {name: [compared.gain(name, first, each) for each in compared.procedures] for name in others}
    # The first policy's colour stays free: the others have the same ones as in `held_out`.
    _draw_by_procedure({first: [], **gains}, compared.procedures, 100, ax)
    ax.axhline(0.0, color=INK, lw=0.8, alpha=0.5)
    ax.set_ylabel(f"points more than {_escape(first)}, by the {compared.judge_word}")
    return _add_legend(ax, beneath=True)


def _draw_by_procedure(
    estimates: Mapping[str, Sequence[IntervalEstimate]], procedures: Sequence[str], unit: float, ax: Axes
) -> None:
    """Draw a mark with its interval for each policy at each procedure."""
    for place, (name, (colour, _, mark)) in enumerate(zip(estimates, _styles(len(estimates)), strict=True)):
        row = estimates[name]
        if not row:
            continue
        x = np.arange(len(row)) + 0.15 * (place - (len(estimates) - 1) / 2)
        y = unit * np.array([each.value for each in row])
        ax.errorbar(x, y, yerr=unit * _whiskers(row), fmt=mark, color=colour, ms=6, label=_escape(name))
    ax.set_xticks(np.arange(len(procedures)), [format_procedure(each) for each in procedures])


def density_ratios(
    ratios: Mapping[str, tuple[Sequence[float | None], Sequence[float | None] | None]], ax: Axes | None = None
) -> Axes:
    """Draw each policy's share of each tenth of u over the reference's; dashed, in its colour, that of its optimum."""
    ax = _prepare(ax)
    for (name, (policy, optimum)), (colour, _, mark) in zip(ratios.items(), _styles(len(ratios)), strict=True):
        for row, dash, label in ((policy, "-", name), (optimum, "--", f"{name}, optimum")):
            if row is not None:
                y = np.array([np.nan if each is None else each for each in row])
                x = (np.arange(len(y)) + 0.5) / len(y)
                ax.plot(x, y, dash, color=colour, marker=mark if dash == "-" else None, ms=4, label=_escape(label))
    ax.axhline(1.0, color=INK, lw=0.8, alpha=0.5)
    ax.set(xlabel=QUANTITIES["u"], ylabel="share over the reference's", xlim=(0, 1), ylim=(0, None))
    return _add_legend(ax, beneath=True)


def trailing(y: Float64[np.ndarray, " s"], window: int) -> Float64[np.ndarray, " s"]:
    """Average the last `window` values at each place, or as many as there are.

    >>> trailing(np.array([1.0, 3.0, 5.0]), 2)
    array([1., 2., 4.])
    """
    sums = np.concatenate([[0.0], np.cumsum(y)])
    last = np.arange(1, len(y) + 1)
    first = np.maximum(last - window, 0)
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _prepare(ax: Axes | None, height: float = 3.6) -> Axes:
    if ax is None:
        ax = Figure(figsize=(5.2, height), layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return ax


def _styles(count: int) -> list[tuple[str, str, str]]:
    """Choose a colour, a dash and a mark for each of so many lines."""
    several = (dash for dash in cycle(DASHES) for _ in COLOURS)
    return list(islice(zip(cycle(COLOURS), several, cycle(MARKS), strict=False), count))


def _whiskers(estimates: Sequence[IntervalEstimate]) -> Float64[np.ndarray, "2 s"]:
    """Measure the intervals from their values, down and up."""
    ends = [(e.value if e.low is None else e.low, e.value if e.high is None else e.high) for e in estimates]
    value, (low, high) = np.array([e.value for e in estimates]), np.array(ends).T
    return np.asarray(np.maximum([value - low, high - value], 0.0))


def _escape(name: str) -> str:
    """Escape a name for matplotlib: exponents raised, dollars literal, a leading underscore kept in the legend."""
    if re.fullmatch(r"-?e\^\{[-\d.]+u\}", name.partition(",")[0]):
        power, comma, rest = name.partition(",")
        return f"${power}${comma}{rest}"
    label = name.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _add_legend(ax: Axes, beneath: bool = False) -> Axes:
    """Add a legend, inside the axes or beneath them."""
    if not ax.get_legend_handles_labels()[1]:
        return ax
    if beneath:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize="small", frameon=False)
    else:
        ax.legend(fontsize="small", frameon=False)
    return ax


def _choose_rows(table: ReferenceTable, most: int = 10) -> list[int]:
    """Choose rows from the lowest median to the highest, evenly spaced."""
    rows = _sample_rows(table)
    medians = np.array([float(np.median(table.scores(row))) for row in rows])
    places = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))
    return [rows[at] for at in np.argsort(medians, kind="stable")[places]]


def _sample_rows(table: ReferenceTable) -> list[int]:
    """Return all rows, or a thousand of a large table, which are a fair sample: keys are hashes."""
    return [int(row) for row in np.unique(np.linspace(0, len(table) - 1, min(len(table), 1000)).astype(np.int64))]
