"""Realised shares out of trained arms: by size, procedure and judge, with intervals over seeds.

A seed's share is what its arm gains over the best of those that do not know the procedure, trained on the same
rollouts, over the difference between their optima; both at one KL, and exact but for the training. The interval is
Student's t over seeds, which are other rollouts of the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from arms import OTHERS, Point
from laws import Laws
from scipy.special import stdtrit

from calibrated_rewards.evaluation.estimates import Estimate

# The procedures that an arm is trained for.
FOR = {
    "best-of:4": ("best of 4",),
    "best-of:16": ("best of 16", "best of 32"),
    "exp:10": ("best of 4",),
    "log": ("best of 4",),
    "worst-of:4": ("worst of 4",),
    "worst-of:16": ("worst of 16", "worst of 4"),
}
KLS = (0.25, 0.5)


def gather(rows: Sequence[Mapping[str, Any]], laws: Laws, kls: Sequence[float] = KLS) -> dict[str, Any]:
    """Gather trained arms: the optima, each arm's means by size, and the realised shares."""
    trained, longer = ([row for row in rows if "arm" in row and ("longest" in row) == long] for long in (False, True))
    arms = list(dict.fromkeys(row["arm"] for row in trained))
    optima = {kl: {arm: laws.point(1.0, laws.targets(arm, kl).log_ratios) for arm in arms} for kl in kls}
    shares = [share for kl in kls for share in compute_shares(trained, optima[kl], kl)]
    return {
        "optima": {str(kl): {arm: shorten(point) for arm, point in own.items()} for kl, own in optima.items()},
        "optimum_deciles": {
            arm: [round(x, 4) for x in laws.density_ratios(laws.targets(arm, kls[-1]).log_ratios)] for arm in arms
        },
        "arms": [summarise(trained, arm, k) for arm in arms for k in sorted({row["k"] for row in trained})],
        "shares": shares,
        "longer": {
            "arms": [summarise(longer, *case) for case in dict.fromkeys((row["arm"], row["k"]) for row in longer)],
            "shares": [share for kl in kls for share in compute_shares(longer, optima[kl], kl)],
            "as_trained": [*compare_as_trained(longer, optima[kls[-1]])],
        },
        "gradients": [row for row in rows if row.get("part") == "gradients"],
    }


def shorten(point: Point) -> dict[str, dict[str, float]]:
    """Return the mean win rates by judge and procedure."""
    return {
        judge: {name: round(float(row.mean()), 5) for name, row in rows.items()} for judge, rows in point.rates.items()
    }


def summarise(rows: Iterable[Mapping[str, Any]], arm: str, k: int) -> dict[str, Any]:
    """Average an arm's seeds at a size: KL, correlation, deciles, and win rates at each KL."""
    own = [row for row in rows if row["arm"] == arm and row["k"] == k]
    found: dict[str, Any] = {"arm": arm, "k": k, "seeds": len(own)}
    if not own:
        return found
    found |= {name: float(np.mean([row[name] for row in own])) for name in ("seen", "kept", "seconds")}
    found["kl"] = float(np.mean([row["own"]["kl"] for row in own]))
    for name in ("correlation", "deciles"):
        found[name] = np.round(np.mean([row["own"][name] for row in own], 0), 4).tolist()
    for kl in KLS:
        at = [row["at"][str(kl)] for row in own if str(kl) in row["at"]]
        if at:
            points = [shorten(Point.from_json(each)) for each in at]
            means = {j: {p: float(np.mean([x[j][p] for x in points])) for p in points[0][j]} for j in points[0]}
            deciles = np.round(np.mean([each["deciles"] for each in at], 0), 4).tolist()
            found[f"at {kl}"] = {"seeds": len(at), "win_rates": means, "deciles": deciles}
            found[f"at {kl}"] |= {"factor": float(np.mean([each["factor"] for each in at]))}
    return found


def compute_shares(
    rows: Sequence[Mapping[str, Any]], optima: Mapping[str, Point], kl: float
) -> Iterable[dict[str, Any]]:
    """Compute the realised shares of arms that are for a procedure, by size, over the best other and each of them."""
    at = {(r["arm"], r["k"], r["seed"]): Point.from_json(r["at"][str(kl)]) for r in rows if str(kl) in r["at"]}
    for arm, k in dict.fromkeys((arm, k) for arm, k, _ in at):
        for procedure in FOR.get(arm, ()):
            for judge in ("reward", "judge"):
                for against in ("best other", "raw", "identity"):
                    found = [
                        one
                        for seed in range(100)
                        if (arm, k, seed) in at
                        if (one := _gain(at, optima, (arm, k, seed), procedure, judge, against))
                    ]
                    if found:
                        gains, gaps = np.array(found).T
                        yield {
                            "arm": arm, "k": k, "kl": kl, "procedure": procedure, "judge": judge, "against": against,
                            "seeds": len(found), "gain": average(gains), "gap": float(gaps.mean()),
                            "share": average(gains / gaps),
                        }  # fmt: skip


def compare_as_trained(rows: Sequence[Mapping[str, Any]], optima: Mapping[str, Point]) -> Iterable[dict[str, Any]]:
    """Compare arms with the best other one as they were trained: each at its own KL, which is given.

    Where a long training has nearly reached its optimum, the line through its weights may come to a KL twice.
    """
    by_seed: dict[int, dict[str, Point]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["arm"]] = Point.from_json(row["own"])
    for arm, procedures in FOR.items():
        for procedure, judge in product(procedures, ("reward", "judge")):
            gains, kls = [], []
            for points in (each for each in by_seed.values() if arm in each):
                rates = {name: float(point.rates[judge][procedure].mean()) for name, point in points.items()}
                others = {name: rate for name, rate in rates.items() if name in OTHERS}
                if others:
                    other = max(others, key=others.__getitem__)
                    gains.append(rates[arm] - rates[other])
                    kls.append([float(points[name].kl.mean()) for name in (arm, other)])
            if gains:
                best = {name: float(point.rates[judge][procedure].mean()) for name, point in optima.items()}
                gap = best[arm] - max(rate for name, rate in best.items() if name in OTHERS)
                yield {
                    "arm": arm, "procedure": procedure, "judge": judge, "seeds": len(gains),
                    "kl": np.mean(kls, 0).tolist(), "gain": average(np.array(gains)), "gap": gap,
                }  # fmt: skip


def _gain(
    at: Mapping[Any, Point], optima: Mapping[str, Point], key: tuple[str, int, int], procedure: str, judge: str,
    against: str,
) -> tuple[float, float] | None:  # fmt: skip
    """Return a seed's gain and the gap between the optima."""
    arm, k, seed = key

    def rate(point: Point) -> float:
        return float(point.rates[judge][procedure].mean())

    others = [name for name in (OTHERS if against == "best other" else (against,)) if (name, k, seed) in at]
    if not others:
        return None
    other = max(others, key=lambda name: rate(at[name, k, seed]))
    # The best of the others' optima, which may be another one than the best of those that were trained.
    best = max(rate(optima[name]) for name in others)
    return rate(at[key]) - rate(at[other, k, seed]), rate(optima[arm]) - best


def average(values: np.ndarray[Any, np.dtype[np.float64]], level: float = 0.95) -> dict[str, Any]:
    """Average over seeds, with Student's t interval from two on."""
    mean = float(values.mean())
    if len(values) < 2:
        return {"value": mean, "interval": None}
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * Estimate(values).standard_error
    return {"value": mean, "interval": [mean - half, mean + half]}
