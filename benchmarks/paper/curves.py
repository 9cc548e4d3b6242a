"""Win rates against KL of the optima of many rewards: on real rollouts by weights, and enumerated in the exact world.

Nothing is trained: a point is what training would reach if it found the optimum. `estimate_points` reads rollouts;
`enumerate_points` a world of 12 prompts with 5,000 completions each, whose raw scores differ in scale from 1/4 to 4, as
the fine-grained one of benchmarks/tabular/world.py does. Both return rows that `draw_panel` draws.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import exact as enumeration

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.objectives import parse_objective
from calibrated_rewards.theory.named import format_name
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, Procedure, Standard, WorstOf
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform

# What each method maximises: the method's name in the paper or in the field, and how it is drawn.
SHOWN = {
    "raw": ("raw reward (PPO, RLOO)", "#999999", "-"),
    "z-score": ("z-score (GRPO)", "#CC79A7", "-"),
    "par": ("PAR", "#8B6914", "-"),
    "identity": ("identity (CTRL; IPO)", "#56B4E9", "-"),
    "log": ("log (BOND, vBoN, BoNBoN)", "#009E73", "-"),
    "exp:5": ("$e^{5u}$ (CTRL)", "#E69F00", "-"),
    "exp:10": ("$e^{10u}$ (CTRL)", "#D55E00", "-"),
    "exp:-5": ("$-e^{-5u}$ (CTRL)", "#E69F00", "-"),
    "exp:-10": ("$-e^{-10u}$ (CTRL)", "#D55E00", "-"),
    "iama": ("raw best of N (IAMA, PKPO)", "#0072B2", ":"),
    "tailrl": ("TailRL", "#0072B2", "-."),
    "rs-grpo": ("RS-GRPO", "#CC79A7", "--"),
    "optimum": ("optimum for the procedure", "black", "--"),
}
TRANSFORMS: dict[str, Transform] = {
    "identity": Identity(),
    "log": Log(),
    **{f"exp:{t}": Exponential(float(t)) for t in (5, 10, -5, -10)},
}


def speak(procedure: Procedure) -> str:
    """Name a procedure for a title."""
    if isinstance(procedure, Standard):
        return "one draw"
    return f"{'best' if isinstance(procedure, BestOf) else 'worst'} of {procedure.draws}"


def choose_arms(procedure: Procedure) -> list[str]:
    """Name what is compared under a procedure, the raw score first and the optimum last."""
    tilts = ["exp:-5", "exp:-10"] if isinstance(procedure, WorstOf) else ["exp:5", "exp:10"]
    last = [] if isinstance(procedure, Standard) else [format_name(procedure)]
    return ["raw", "z-score", "par", "identity", "log", *tilts, *last]


def show(arm: str, procedure: Procedure) -> tuple[str, str, str]:
    """Return label, colour and line of an arm."""
    if not isinstance(procedure, Standard) and arm == format_name(procedure):
        return SHOWN["optimum"]
    return SHOWN[arm] if arm in SHOWN else SHOWN[arm.partition(":")[0]]


def estimate_points(
    samples: Samples, arms: Iterable[str], kls: Sequence[float], procedures: Sequence[Procedure]
) -> list[dict[str, Any]]:
    """Weigh rollouts: a row for each arm, KL, procedure and judge, with intervals over prompts."""
    frontier = estimate_frontier(samples, {arm: parse_objective(arm) for arm in arms}, kls, procedures)
    rows = []
    for point in frontier.points:
        for judge, rates in point.win_rates.items():
            for procedure, rate in rates.items():
                row = {"arm": point.arm, "kl": point.kl, "procedure": procedure, "judge": judge}
                row |= {"win rate": rate.value, "interval": [rate.low, rate.high], "ess": point.ess_of[procedure]}
                gain = point.gains[judge][procedure] if point.gains else None
                row |= {"gain": gain and gain.value, "interval of gain": gain and [gain.low, gain.high]}
                rows.append(row | {"limit": gain and point.limit_of_gain(judge, procedure)})
    for reason in frontier.left_out:
        print("left out:", reason)
    return rows


@cache
def fine_world(prompts: int = 12, completions: int = 5_000) -> enumeration.Exact:
    """Make a world of many rare completions without ties, whose raw scores are normal with a scale for each prompt."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(prompts, completions)) * np.geomspace(0.25, 4, prompts)[:, None]
    return enumeration.Exact(rng.dirichlet(np.ones(completions), prompts), scores)


def value_completions(arm: str, kl: float, procedure: Procedure) -> Any:
    """Return an arm's reward of all completions of the exact world; None where it has none for the procedure and KL."""
    exact = fine_world()
    if arm == "raw":
        return exact.scores
    if arm == "z-score":
        mean = (exact.laws * exact.scores).sum(1, keepdims=True)
        return (exact.scores - mean) / np.sqrt((exact.laws * (exact.scores - mean) ** 2).sum(1, keepdims=True))
    if arm in TRANSFORMS:
        return TRANSFORMS[arm](exact.quantiles)
    if arm == format_name(procedure):
        try:
            return optimum(procedure, kl=kl).transform(exact.quantiles)
        except ValueError as error:  # it wins always before it is so far: worst of 32 at KL .367
            print("left out:", error)
    return None


def enumerate_points(
    arms: Iterable[str], kls: Sequence[float], procedures: Sequence[Procedure]
) -> list[dict[str, Any]]:
    """Enumerate the exact world's optima: a row for each arm, KL and procedure that it has."""
    exact, rows = fine_world(), []
    for procedure in procedures:
        kind = enumeration.best_of if isinstance(procedure, BestOf | Standard) else enumeration.worst_of
        for arm in arms:
            for kl in kls:
                values = value_completions(arm, kl, procedure)
                if values is not None:
                    rate = exact.win_rate(exact.at_kl(values, kl), partial(kind, procedure.draws))
                    row = {"arm": arm, "kl": kl, "procedure": repr(procedure), "judge": "exact"}
                    rows.append(row | {"win rate": rate})
    return rows


def draw_panel(ax: Any, rows: Sequence[Mapping[str, Any]], procedure: Procedure, judge: str, title: str) -> None:
    """Draw win rate against KL, a line for each arm, with the interval of the optimum's win rate where there is one."""
    own = [row for row in rows if row["procedure"] == repr(procedure) and row["judge"] == judge]
    for arm in dict.fromkeys(row["arm"] for row in own):
        line = sorted((row for row in own if row["arm"] == arm), key=lambda row: row["kl"])
        label, colour, style = show(arm, procedure)
        at, rate = [row["kl"] for row in line], [row["win rate"] for row in line]
        ax.plot(at, rate, style, color=colour, label=label, linewidth=1.4)
    ax.set(title=title, xlabel="KL from the reference, nats")
    ax.grid(alpha=0.3)


def best_of_n_marks(procedure: Procedure, sizes: Sequence[int] = (2, 4, 8)) -> list[tuple[int, float, float]]:
    """Return n, KL and the win rate under a procedure of the best of n as a policy: the log's optimum, beta 1/(n-1)."""
    from calibrated_rewards.theory.tilted_policy import kl, win_rate

    return [(n, kl(Log(), 1 / (n - 1)), win_rate(Log(), 1 / (n - 1), procedure)) for n in sizes]


def compare_with_best(
    samples: Samples,
    rows: Iterable[Mapping[str, Any]],
    ours: str,
    others: Sequence[str],
    level: float,
    procedure: Procedure,
) -> dict[str, Any]:
    """Compare an arm with the best of others at a KL by the judge, paired by prompt: the gain with its interval."""
    at = {"kl": level, "procedure": repr(procedure), "judge": "judge"}
    rates = {row["arm"]: row["win rate"] for row in rows if row["arm"] in others and {**row, **at} == row}
    best = max(rates, key=lambda arm: rates[arm])
    pair = estimate_points(samples, [best, ours], [level], [procedure])
    row = next(row for row in pair if row["arm"] == ours and {**row, **at} == row)
    return {"best other": best, "win rate of the best other": rates[best], **row}


def describe_gain(row: Mapping[str, Any]) -> str:
    """Write a gain in points in a line."""
    low, high = (100 * each for each in row["interval of gain"])
    return (
        f"{row['procedure']:<13} KL {row['kl']:<4} {row['arm']:<11} over {row['best other']:<9} "
        f"{100 * row['gain']:+.1f} [{low:+.1f}, {high:+.1f}], {row['win rate']:.3f}, ESS {row['ess']:.1f}, "
        f"may be off by {100 * row['limit']:.1f}"
    )
