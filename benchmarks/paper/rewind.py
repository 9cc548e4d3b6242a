"""Figure 12 of the paper: rewind-and-repeat, at most 32 draws until the base policy's 85th percentile is reached.

    python benchmarks/paper/rewind.py [--rollouts DIR ...]

What training would reach if it found the optimum: left, win rate in theory, for scores that do not tie, with the
exact world (crosses); middle, on the rollouts of a real model with weights, by an independent judge; right, the mean
number of tries. Policy and reference both rewind, as in the paper's other figures; against one draw of the reference,
which the paper may mean, the win rates are in the JSON. Writes benchmarks/results/rewind.json and
docs/figures/rewind.png.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import SHOWN, TRANSFORMS, enumeration, fine_world, value_completions
from environment import save
from rollouts import FIGURES, describe, load_samples, parser

from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate, Samples
from calibrated_rewards.evaluation.objectives import OBJECTIVES
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL
from calibrated_rewards.evaluation.win_rate import win_rates_of
from calibrated_rewards.theory.procedures import RewindAndRepeat, Standard
from calibrated_rewards.theory.tilted_policy import beta_for_kl, mean_tries, win_rate

PROCEDURE, KLS = RewindAndRepeat(0.85, 32), (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
ARMS = ("raw", "z-score", "identity", "log", "exp:5", "exp:10", "exp:-10")


def rewind(weights: np.ndarray, passed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the law that comes out of rewinding, and the mean number of tries, of each prompt."""
    failing = np.where(passed, 0.0, weights).sum(1, keepdims=True)
    tries = sum(failing**i for i in range(PROCEDURE.max_tries))
    return np.where(passed, weights * tries, weights * failing ** (PROCEDURE.max_tries - 1)), tries[:, 0]


def estimate_real(samples: Samples) -> list[dict[str, Any]]:
    """Weigh rollouts, rewind by rank, and compare by the judge with the reference rewinding and with one draw of it."""
    rollouts = RolloutsAtKL(samples, (Standard(),))
    pools, table = rollouts.pools, rollouts.table
    at = np.repeat(np.arange(len(samples)), samples.sizes)
    scores = np.concatenate(pools.samples.select)
    passed = pools.filled(table.cdf(at, scores), 0.0) >= PROCEDURE.threshold
    base = rewind(pools.uniform, passed)[0]
    judged = {"rewinding": pools.by_judge.beaten(base), "one draw": pools.by_judge.beaten(pools.uniform)}
    bases, rows = {"rewinding": base, "one draw": pools.uniform}, []
    for kl in KLS:
        outputs = {}
        for arm in ARMS:
            values = pools.filled(np.asarray(OBJECTIVES[arm].at(kl)(table, at, scores), np.float64), 0.0)
            weights = pools.tilted(values, pools.beta_for_kl(values, kl))[0]
            output, tries = rewind(weights, passed)
            outputs[arm] = {name: win_rates_of(output, bases[name], judged[name], itself=False) for name in bases}
            row = {"arm": arm, "kl": kl, "tries": float(tries.mean())}
            for name, rates in outputs[arm].items():
                gain = IntervalEstimate.of(Estimate(rates - outputs["raw"][name]))
                row[f"win rate over {name}"] = float(rates.mean())
                row[f"gain over raw, {name}"] = [gain.value, gain.low, gain.high]
            rows.append(row)
    return rows


def compute_exact() -> list[dict[str, Any]]:
    """Compute theory's win rate and tries for transforms, and the exact world's win rate for all arms."""
    world, rows = fine_world(), []
    output = partial(enumeration.rewind, PROCEDURE.threshold, PROCEDURE.max_tries)
    for kl in KLS:
        for arm in ARMS:
            values = value_completions(arm, kl, PROCEDURE)
            row = {"arm": arm, "kl": kl, "exact world": world.win_rate(world.at_kl(values, kl), output)}
            if arm in TRANSFORMS:
                beta = beta_for_kl(TRANSFORMS[arm], kl)
                row["theory"] = win_rate(TRANSFORMS[arm], beta, PROCEDURE)
                row["tries"] = mean_tries(TRANSFORMS[arm], beta, PROCEDURE)
            rows.append(row)
    return rows


def draw(real: list[dict[str, Any]], exact: list[dict[str, Any]]) -> None:
    """Draw win rates in theory and on rollouts, and the tries."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for arm in ARMS:
        label, colour, style = SHOWN[arm]
        options = {"color": colour, "label": label, "linestyle": ":" if arm == "exp:-10" else style}
        own = [[row for row in rows if row["arm"] == arm] for rows in (exact, real)]
        at = [row["kl"] for row in own[0]]
        axes[0].plot(at, [row["exact world"] for row in own[0]], "x", color=colour, markersize=5)
        axes[0].plot(at, [row.get("theory", np.nan) for row in own[0]], **options)
        axes[1].plot(at, [row["win rate over rewinding"] for row in own[1]], **options)
        axes[2].plot(at, [row["tries"] for row in own[1]], **options)
    axes[0].set(title="theory, and the exact world (crosses)", ylabel="win rate, both sides rewinding")
    axes[1].set(title="SmolLM2 rollouts, by the judge")
    axes[2].set(title="SmolLM2 rollouts", ylabel="mean number of tries")
    for ax in axes:
        ax.set_xlabel("KL from the reference, nats")
        ax.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.savefig(FIGURES / "rewind.png", dpi=130)


def main() -> None:
    """Compute, draw and save."""
    samples = load_samples(parser(__doc__).parse_args())
    exact, real = compute_exact(), estimate_real(samples)
    draw(real, exact)
    for ours, theirs in zip(real, exact, strict=True):
        gain = " ".join(f"{100 * each:+.1f}" for each in ours["gain over raw, rewinding"])
        start = f"KL {ours['kl']:<4} {ours['arm']:<8} judge {ours['win rate over rewinding']:.3f}, over raw {gain}"
        print(f"{start}; exact {theirs['exact world']:.3f}, tries {ours['tries']:.2f}")
    print(save("rewind", {"rollouts": describe(samples), "real": real, "exact": exact}))


if __name__ == "__main__":
    main()
