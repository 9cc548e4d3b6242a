"""Predict what training wins from a pilot of a part of its completions, and compare with what it won.

    python benchmarks/proof/predict.py    # seconds; reads the results of small_model.py and held_out_prompts.py

A pilot is the same run with fewer completions: on the same prompts an eighth (K = 8,192 for 65,536, 1,024 for 8,192,
128 for 1,024), 24 steps for 48 on held-out prompts (a half). Predictions of an arm's gain over another one at equal
KL, from the pilot and from the optima, which are known before training:

- "same share": the pilot's realised share of the gap between the optima, times the gap.
- "less noise": shares of each arm's own optimum grow. A policy at a given KL spends it on its target and on the noise
  of its rollouts, whose variance falls as one over their number, so the gain over the reference, s of the optimum's,
  has 1 / s^2 - 1 in proportion to 1 / completions (`grow`). It has no parameter that is fitted, and knows no limit of
  the network or of the steps. The predicted gain is the difference of the two arms' levels. On held-out prompts, whose
  results have no levels of the optima, the share of the gap grows in the same way.
- "noise and a limit": as before, but 1 / s^2 falls to a limit, which a second pilot tells, an eighth of the first one.

"less noise" was chosen and committed before either of the first two was computed, "noise and a limit" before any arm
was trained with K = 65,536; the other shares of the page were known.
A prediction is right if it lies within the trained result's 95 % interval, which is over seeds on the same prompts, and
over test prompts, seed by seed, on held-out prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arms import OTHERS
from environment import save
from plots import read

SAME, NOISE, LIMIT = WAYS = ("same share", "less noise", "noise and a limit")
# The size of the run, an eighth of which is its pilot's, and an eighth of that the second pilot's.
TIMES = 8
PILOTS = tuple((size // TIMES, size) for size in (65536, 8192, 1024))
AIM = 0.8


def grow(share: float, times: float) -> float:
    """Predict the share of an optimum's gain with so many times the completions, from noise alone.

    >>> round(grow(0.5, 8), 3), grow(1.0, 8), grow(0.3, 1)
    (0.853, 1.0, 0.3)
    >>> round(grow(0.01, 4), 3), -grow(-0.3, 8) == grow(0.3, 8)
    (0.02, True)
    """
    return float(share * np.sqrt(times / (1 + (times - 1) * share**2)))


def reach(smaller: float, share: float, times: float) -> float | None:
    """Predict the share with so many times the completions from two pilots, which are as many times apart.

    >>> limit, noise = 2.0, 16.0  # 1 / s^2 is limit + noise / completions
    >>> first, second, third = ((limit + noise / n) ** -0.5 for n in (1, 8, 64))
    >>> round(reach(first, second, 8) / third, 6), reach(-0.1, 0.2, 8)
    (1.0, None)
    """
    if min(smaller, share) <= 0:
        return None
    rest = share**-2 - (smaller**-2 - share**-2) / times
    return float(rest**-0.5) if rest > 0 else None


def read_level(results: Mapping[str, Any], arm: str, k: int, kl: float, judge: str, procedure: str) -> float | None:
    """Read an arm's mean win rate at a size and KL, if it was reached."""
    for row in results["arms"]:
        if (row["arm"], row["k"]) == (arm, k) and f"at {kl}" in row:
            return float(row[f"at {kl}"]["win_rates"][judge][procedure])
    return None


def predict_level(results: Mapping[str, Any], at: Sequence[Any], k: int) -> dict[str, float | None]:
    """Predict an arm's win rate at K: the optimum's gain over the reference's one half, times the share of it.

    `at` is the arm, the KL, the judge and the procedure; None where a pilot did not reach the KL.
    """
    arm, kl, judge, procedure = at
    pilot, smaller = (read_level(results, arm, k // n, kl, judge, procedure) for n in (TIMES, TIMES**2))
    if pilot is None:
        return dict.fromkeys(WAYS)
    gain = results["optima"][str(kl)][arm][judge][procedure] - 0.5
    share = (pilot - 0.5) / gain
    limit = None if smaller is None else reach((smaller - 0.5) / gain, share, TIMES)
    return {SAME: pilot, NOISE: 0.5 + grow(share, TIMES) * gain, LIMIT: None if limit is None else 0.5 + limit * gain}


def predict_levels(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Predict every arm's win rates, by every procedure and judge; the results have no intervals of them."""
    for pilot, k in PILOTS:
        for kl, optima in results["optima"].items():
            for arm, by_judge in optima.items():
                for judge, rates in by_judge.items():
                    for procedure, optimum in rates.items():
                        at = (arm, float(kl), judge, procedure)
                        predicted, last = predict_level(results, at, k), read_level(results, arm, k, *at[1:])
                        if predicted[SAME] is not None and last is not None:
                            row = {"arm": arm, "kl": float(kl), "judge": judge, "procedure": procedure}
                            row |= {"pilot": pilot, "k": k, "trained": last, "optimum": optimum}
                            yield {**row, "predicted": predicted}


def compare_same_prompts(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Predict the gains on the same prompts, for each arm, procedure, KL, judge, and arm that it is compared with."""
    keys = ("arm", "kl", "procedure", "judge", "against")
    rows = {(row["k"], *(row[key] for key in keys)): row for row in results["shares"]}
    for pilot, k in PILOTS:
        for (size, *case), row in rows.items():
            if size != pilot or (k, *case) not in rows:
                continue
            trained = rows[(k, *case)]
            arm, kl, procedure, judge, against = case
            others = OTHERS if against == "best other" else (against,)
            levels = {name: predict_level(results, (name, kl, judge, procedure), k) for name in (arm, *others)}
            predicted: dict[str, float | None] = {SAME: row["share"]["value"] * row["gap"]}
            for way in (NOISE, LIMIT):
                theirs = [level for name in others if (level := levels[name][way]) is not None]
                own = levels[arm][way]
                predicted[way] = None if own is None or not theirs else own - max(theirs)
            found = {**dict(zip(keys, case, strict=True)), "pilot": pilot, "k": k, "seeds": trained["seeds"]}
            yield judge_predictions(found, predicted, trained["gain"]["value"], trained["gain"]["interval"])


def compare_held_out(
    pilot: Mapping[str, Any], longer: Mapping[str, Any], times: float = 2.0
) -> Iterator[dict[str, Any]]:
    """Predict the gains on held-out prompts, seed by seed, by weights and by fresh draws."""
    keys = ("arm", "other", "procedure")
    before = {tuple(row[key] for key in keys): row for row in pilot["gains"]}
    for row in longer["gains"]:
        first = before.get(tuple(row[key] for key in keys))
        for way, column in (("weights", "by_seed"), ("fresh draws", "fresh_by_seed")):
            for seed in set(row["seeds"]) & set(first["seeds"] if first else ()):
                assert first is not None
                gain = first[column][first["seeds"].index(seed)][0]
                value, *interval = row[column][row["seeds"].index(seed)]
                predicted: dict[str, float | None] = {SAME: gain / first["gap"] * row["gap"]}
                predicted |= {NOISE: grow(gain / first["gap"], times) * row["gap"], LIMIT: None}
                found = {**{key: row[key] for key in keys}, "seed": seed, "measured by": way}
                yield judge_predictions(found, predicted, value, interval)


def judge_predictions(
    case: dict[str, Any], predicted: dict[str, float | None], trained: float, interval: Sequence[float] | None
) -> dict[str, Any]:
    """Tell which predictions lie within the trained result's interval; None without a prediction or an interval."""

    def judge(value: float | None) -> bool | None:
        return None if value is None or not interval else interval[0] <= value <= interval[1]

    inside = {way: judge(value) for way, value in predicted.items()}
    return {**case, "predicted": predicted, "trained": trained, "interval": interval, "inside": inside}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the predictions inside, and average the errors: predicted less trained, in points of win rate."""
    found: dict[str, Any] = {"comparisons": len(rows)}
    for way in WAYS:
        there = [row for row in rows if row["predicted"][way] is not None]
        if not there:
            continue
        errors = 100 * np.array([row["predicted"][way] - row["trained"] for row in there])
        found[way] = {"of": len(there), "error": float(errors.mean()), "absolute error": float(np.abs(errors).mean())}
        if all(row.get("interval") for row in there):
            found[way]["inside"] = sum(row["inside"][way] for row in there)
    return found


def list_groups(same: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the comparisons: all, those of best and worst of 16 over the best other arm, and their parts."""
    main = [row for row in same if row["against"] == "best other" and row["procedure"] in ("worst of 16", "best of 16")]
    parts = {
        f"same prompts, of 16, K = {pilot:,} for {k:,}": [row for row in main if row["k"] == k] for pilot, k in PILOTS
    }
    ways = ("weights", "fresh draws")
    held = {f"held-out prompts, {way}": [row for row in held_out if row["measured by"] == way] for way in ways}
    return {"same prompts, of 16, over the best other": main, **parts, "same prompts, all": list(same), **held}


def format_row(name: str, found: Mapping[str, Any]) -> str:
    """Format a group as a row of the page's table."""
    cells = [name, str(found["comparisons"])]
    for way in WAYS:
        if way not in found:
            cells += ["", ""]
            continue
        inside, there = found[way].get("inside"), found[way]["of"]
        counted = f"{inside} of {there} ({100 * inside / there:.0f} %)" if inside is not None else ""
        cells += [counted, f"{found[way]['error']:+.1f}, {found[way]['absolute error']:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Predict the gains, count those inside the trained intervals, print and save them."""
    worlds = {name: read(f"proof_{name}") for name in ("small_model", "held_out_prompts", "held_out_prompts_48")}
    missing = [name for name, results in worlds.items() if results is None]
    if missing:
        raise SystemExit(f"predict.py needs the results of {', '.join(missing)} in benchmarks/results.")
    small, pilot, longer = (results for results in worlds.values() if results)
    same, held_out, levels = (
        [*rows] for rows in (compare_same_prompts(small), compare_held_out(pilot, longer), predict_levels(small))
    )
    summary = {name: summarise(rows) for name, rows in list_groups(same, held_out).items()}
    summary |= {f"levels, K = {p:,} for {k:,}": summarise([row for row in levels if row["k"] == k]) for p, k in PILOTS}
    for name, found in summary.items():
        print(format_row(name, found))
    results = {"aim": AIM, "summary": summary, "same prompts": same, "held-out prompts": held_out, "levels": levels}
    print(save("proof_predict", results))


if __name__ == "__main__":
    main()
