"""Figures, each drawn on the axes it is given, or on a figure of its own: `ax=None` in, `ax` out.

No state of pyplot is touched; `ax.figure.savefig(path)` keeps a figure. Lines and marks differ by shape as well as by
colour, in a palette that the colour-blind can tell apart. Whiskers are the 95 % intervals that the numbers come with.

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
    told = "figures need matplotlib: pip install 'calibrated-rewards[plots]'"
    raise ModuleNotFoundError(told, name=missing.name) from missing

from calibrated_rewards.evaluation.estimates import Stated
from calibrated_rewards.evaluation.outcomes import Evaluation
from calibrated_rewards.evaluation.prospects import RELIABLE, Reweighted
from calibrated_rewards.evaluation.wording import arm, formula, spoken
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.procedures import Procedure
from calibrated_rewards.theory.tilted_policy import Frontier
from calibrated_rewards.theory.transforms import Scale, Transform, scaled

# Okabe and Ito's, without the yellow that paper swallows and the black that a dark page does.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
# Of texts, spines and lines that belong to nobody.
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
    measured: Mapping[str, tuple[float | Stated, Stated]] | None = None,
    ax: Axes | None = None,
    *,
    on_table: Frontier | None = None,
) -> Axes:
    """Win rate against KL: what theory says as lines, and what was measured, as (KL, win rate), with intervals.

    `on_table` is one more line, for the policies that fit the rewards of a table (`table_expectations`).
    """
    ax = _ready(ax)
    points = measured or {}
    lines = [(curve, "theory") for curve in curves]
    if on_table is not None:
        lines.append((on_table, "this table"))
    styles = _styles(len(lines) + len(points))
    for (curve, source), (colour, dash, _) in zip(lines, styles, strict=False):
        if procedure not in curve.procedures:
            raise ValueError(f"frontier needs curves of {procedure!r}, got one of {curve.procedures!r}.")
        rates, order = curve.win_rates[curve.procedures.index(procedure)], np.argsort(curve.kl)
        ax.plot(curve.kl[order], rates[order], dash, color=colour, label=_text(f"{formula(curve.transform)}, {source}"))
    for (name, (kl, rate)), (colour, _, mark) in zip(points.items(), styles[len(lines) :], strict=True):
        at = kl if isinstance(kl, Stated) else Stated(kl, None, None, None, rate.prompts)
        ax.errorbar(
            at.value, rate.value, yerr=_reach([rate]), xerr=_reach([at]), fmt=mark, color=colour, label=_text(name)
        )
    ax.axhline(0.5, color=INK, lw=0.8, alpha=0.5)
    ax.set(xlabel=QUANTITIES["kl"], ylabel=f"win rate, {spoken(procedure)}")
    return _legend(ax, beside=True)


def reweighted(found: Reweighted, procedure: str, judged_by: str, ax: Axes | None = None) -> Axes:
    """The frontier without training: each arm's win rate against KL; hollow where too few rollouts stand behind it."""
    arms = list(dict.fromkeys(point.arm for point in found.points))
    ax = _ready(ax, height=3.4 + 0.07 * len(arms))
    # Points of one KL would hide each other's whiskers.
    apart = 0.06 * max((point.kl for point in found.points), default=0.0) / max(len(arms), 1)
    for place, (name, (colour, dash, mark)) in enumerate(zip(arms, _styles(len(arms)), strict=True)):
        points = sorted((point for point in found.points if point.arm == name), key=lambda point: point.kl)
        rates = [point.win_rates[judged_by][procedure] for point in points]
        x = np.array([point.kl for point in points]) + apart * (place - (len(arms) - 1) / 2)
        y = [rate.value for rate in rates]
        ax.plot(x, y, dash, color=colour, lw=1.2)
        faces = ["none" if point.ess_of[procedure] < RELIABLE else colour for point in points]
        ax.errorbar(x, y, yerr=_reach(rates), fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)
        ax.scatter(x, y, marker=mark, facecolors=faces, edgecolors=colour, s=28, zorder=3)
        ax.plot([], [], dash, color=colour, marker=mark, ms=5, label=_text(arm(name)))
    ax.set(xlabel=QUANTITIES["kl"], ylabel=f"win rate by {_text(judged_by)}, {spoken(procedure)}")
    return _legend(ax, beside=True)


def scores_by_rank(
    table: ReferenceTable, rows: Sequence[int] | None = None, quantiles: bool = False, ax: Axes | None = None
) -> Axes:
    """The paper's Fig. 3: each prompt's sorted reference scores against their rank, a line a prompt.

    Lines that lie apart are prompts whose raw scores cannot be compared. `quantiles` puts each score where it stands
    among the references of all prompts; the dashed line is then what needs no calibration. Of more than ten rows ten
    are drawn unless they are named, from the lowest median to the highest.
    """
    ax = _ready(ax)
    chosen = _spread_out(table) if rows is None else list(rows)
    pool = np.sort(np.concatenate([table.scores(row) for row in _some(table)])) if quantiles else None
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
    """Transforms over the calibrated reward, on one scale; dots are their values for the ranks among k references."""
    ax = _ready(ax)
    u = np.linspace(0.002, 0.998, 500)
    for transform, (colour, dash, mark) in zip(given, _styles(len(given)), strict=True):
        phi = scaled(transform, scale)
        ax.plot(u, np.asarray(phi(u), np.float64), dash, color=colour, label=_text(formula(transform)))
        if k is not None:
            ax.plot(np.arange(k + 1) / k, values(phi, k, estimator)[::2], mark, color=colour, ms=3.5)
    worth = {"standard": "value, in standard deviations", "unit": "value, from 0 to 1", "raw": "value"}[scale]
    ax.set(xlabel=QUANTITIES["u"], ylabel=worth)
    return _legend(ax)


def training(logs: Mapping[str, Sequence[Mapping[str, Any]]], name: str = "u", ax: Axes | None = None) -> Axes:
    """Training curves from the rows of log.jsonl: every step faint, and the mean over the last tenth of the steps."""
    ax = _ready(ax)
    for (run, rows), (colour, dash, _) in zip(logs.items(), _styles(len(logs)), strict=True):
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not known:
            continue
        steps, y = np.array(known, np.float64).T
        ax.plot(steps, y, color=colour, lw=1, alpha=0.35, marker="." * (len(y) == 1))
        ax.plot(steps, trailing(y, max(1, len(y) // 10)), dash, color=colour, label=_text(run))
    ax.set(xlabel="step", ylabel=QUANTITIES.get(name, name))
    return _legend(ax)


def outcomes(
    evaluation: Evaluation, judged_by: str, procedures: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Each policy's win rates over the reference, a mark a procedure; the line at 0.5 is the reference itself."""
    ax = _ready(ax)
    found = {outcome.name: outcome.win_rates[judged_by] for outcome in evaluation.policies}
    shown = (
        list(dict.fromkeys(each for rates in found.values() for each in rates)) if procedures is None else procedures
    )
    for place, (procedure, (colour, _, mark)) in enumerate(zip(shown, _styles(len(shown)), strict=True)):
        y = np.arange(len(found)) + 0.16 * (place - (len(shown) - 1) / 2)
        rates = [own[procedure] for own in found.values()]
        x = [rate.value for rate in rates]
        ax.errorbar(x, y, xerr=_reach(rates), fmt=mark, color=colour, ms=6, label=_text(spoken(procedure)))
    ax.axvline(0.5, color=INK, lw=0.8, alpha=0.5)
    ax.set_yticks(np.arange(len(found)), [_text(name) for name in found])
    ax.set(ylim=(len(found) - 0.4, -0.6), xlabel=f"win rate over the reference, by {_text(judged_by)}")
    return _legend(ax, beside=True)


def trailing(y: Float64[np.ndarray, " s"], window: int) -> Float64[np.ndarray, " s"]:
    """The mean over the last `window` values at each place, of fewer where there are not so many yet.

    >>> trailing(np.array([1.0, 3.0, 5.0]), 2)
    array([1., 2., 4.])
    """
    sums = np.concatenate([[0.0], np.cumsum(y)])
    last = np.arange(1, len(y) + 1)
    first = np.maximum(last - window, 0)
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _ready(ax: Axes | None, height: float = 3.6) -> Axes:
    if ax is None:
        ax = Figure(figsize=(5.2, height), layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return ax


def _styles(count: int) -> list[tuple[str, str, str]]:
    """A colour, a dash and a mark for each."""
    several = (dash for dash in cycle(DASHES) for _ in COLOURS)
    return list(islice(zip(cycle(COLOURS), several, cycle(MARKS), strict=False), count))


def _reach(stated: Sequence[Stated]) -> Float64[np.ndarray, "2 s"]:
    """How far the intervals go down and up."""
    ends = [(s.value if s.low is None else s.low, s.value if s.high is None else s.high) for s in stated]
    value, (low, high) = np.array([s.value for s in stated]), np.array(ends).T
    return np.asarray(np.maximum([value - low, high - value], 0.0))


def _text(name: str) -> str:
    """A name as matplotlib shows it: an exponent raised, a dollar as it is, an underscore at the start no secret."""
    if re.fullmatch(r"-?e\^\{[-\d.]+u\}", name.partition(",")[0]):
        power, comma, rest = name.partition(",")
        return f"${power}${comma}{rest}"
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _legend(ax: Axes, beside: bool = False) -> Axes:
    """Inside, where there is room; beneath the axes for many entries."""
    if not ax.get_legend_handles_labels()[1]:
        return ax
    if beside:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize="small", frameon=False)
    else:
        ax.legend(fontsize="small", frameon=False)
    return ax


def _spread_out(table: ReferenceTable, most: int = 10) -> list[int]:
    """Rows from the lowest median to the highest."""
    rows = _some(table)
    medians = np.array([float(np.median(table.scores(row))) for row in rows])
    places = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))
    return [rows[at] for at in np.argsort(medians, kind="stable")[places]]


def _some(table: ReferenceTable) -> list[int]:
    """All rows; of a great table a thousand, which is a fair sample: keys are hashes."""
    return [int(row) for row in np.unique(np.linspace(0, len(table) - 1, min(len(table), 1000)).astype(np.int64))]
