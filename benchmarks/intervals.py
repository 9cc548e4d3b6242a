"""How often 95 % intervals over prompts hold the truth, by the number of prompts and the law of their values.

    OMP_NUM_THREADS=1 python benchmarks/intervals.py

Prints a table and writes benchmarks/results/intervals.json. Per-prompt values are drawn from laws whose mean is known:
normal; win rates that are skewed, beta(2, 0.5), or mostly near 0 and 1, beta(0.3, 0.3); exponential and log-normal, as
a KL is; and 0 or 1 with a probability, as the win rates of one completion are. Of the last the coverage is a sum over
the possible numbers of ones, without sampling of values; of the others it is from 4,000 draws, with a standard error of
0.003. "before" is what stood here until 1.0: Student's t below 20 prompts, the plain percentile bootstrap from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from environment import save
from scipy import stats

from calibrated_rewards.evaluation.estimates import estimate_columns, small_sample_factor

PROMPTS = (5, 12, 20, 24, 30, 50, 100)
DRAWS, PART, LEVEL = 4_000, 500, 0.95


@dataclass(frozen=True)
class Law:
    """A law of per-prompt values, and its mean."""

    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    mean: float


LAWS = {
    "normal": Law(lambda rng, size: rng.normal(size=size), 0.0),
    "beta(2, 0.5)": Law(lambda rng, size: rng.beta(2, 0.5, size=size), 0.8),
    "beta(0.3, 0.3)": Law(lambda rng, size: rng.beta(0.3, 0.3, size=size), 0.5),
    "exponential": Law(lambda rng, size: rng.exponential(size=size), 1.0),
    "log-normal": Law(lambda rng, size: rng.lognormal(size=size), float(np.exp(0.5))),
}
ONES = (0.5, 0.65, 0.8)


def intervals(values: np.ndarray) -> dict[str, np.ndarray]:
    """The ends of each column's interval, now and before: [2, columns]."""
    prompts, estimates = len(values), estimate_columns(values, LEVEL)
    now = np.array([(each.low, each.high) for each in estimates]).T
    means = np.array([each.value for each in estimates])
    if prompts < 20:
        half = stats.t.ppf((1 + LEVEL) / 2, prompts - 1) * np.array([each.standard_error for each in estimates])
        return {"now": now, "before": np.array([means - half, means + half])}
    return {"now": now, "before": means + (now - means) / small_sample_factor(prompts, LEVEL)}


def sampled(law: Law, prompts: int) -> dict[str, float]:
    """The share of draws whose interval holds the mean."""
    rng = np.random.default_rng(prompts)
    parts = [intervals(law.draw(rng, (prompts, PART))) for _ in range(DRAWS // PART)]
    ends = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    return {name: float(np.mean((low <= law.mean) & (law.mean <= high))) for name, (low, high) in ends.items()}


def exact(chance: float, prompts: int) -> dict[str, float]:
    """The probability that the interval of values 0 and 1 holds their mean, over all numbers of ones."""
    ones = np.arange(prompts + 1)
    columns = (np.arange(prompts)[:, None] < ones).astype(np.float64)
    weights = stats.binom.pmf(ones, prompts, chance)
    ends = intervals(columns)
    return {name: float(weights @ ((low <= chance) & (chance <= high))) for name, (low, high) in ends.items()}


def main() -> None:
    """Measure, print, save."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, law in LAWS.items():
        results[name] = {str(prompts): sampled(law, prompts) for prompts in PROMPTS}
    for chance in ONES:
        results[f"0 or 1, mean {chance:g}"] = {str(prompts): exact(chance, prompts) for prompts in PROMPTS}
    for method in ("now", "before"):
        print(f"{method:18}" + "".join(f"{prompts:>7}" for prompts in PROMPTS))
        for name, by in results.items():
            print(f"  {name:16}" + "".join(f"{by[str(prompts)][method]:7.3f}" for prompts in PROMPTS))
    print(save("intervals", results))


if __name__ == "__main__":
    main()
