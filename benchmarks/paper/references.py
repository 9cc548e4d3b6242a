"""Win rate against K, the number of references, by estimator: what the paper leaves out.

    python benchmarks/paper/references.py

Marks: the exact world, in which K references of each prompt are drawn, the reward that they make is maximised at
KL 0.5, and the win rate of that optimum is enumerated; means over draws. Lines: theory (`win_rate_at_kl`), which has
nothing of the world. Both go by the score that selects, and nothing is trained. By ranks alone, real rollouts that do
not tie have the same numbers. Writes benchmarks/results/references.json and docs/figures/references.png.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from curves import enumeration, fine_world
from environment import save
from rollouts import FIGURES

from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.procedures import BestOf, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity

SIZES, ESTIMATORS, KL, DRAWS = (4, 8, 16, 32, 100), ("empirical", "posterior", "unbiased"), 0.5, 4
CASES: dict[str, tuple[Any, Any]] = {
    "identity, best of 4": (Identity(), BestOf(4)),
    "$e^{10u}$, best of 4": (Exponential(10.0), BestOf(4)),
    "$-e^{-10u}$, worst of 4": (Exponential(-10.0), WorstOf(4)),
}


def enumerate_rate(transform: Any, procedure: Any, k: int, estimator: Any) -> list[float]:
    """Enumerate the win rate at the KL of the optimum of the rewards that K drawn references make, for each draw."""
    world, rng, rates = fine_world(8, 2_000), np.random.default_rng(0), []
    kind = enumeration.best_of if isinstance(procedure, BestOf) else enumeration.worst_of
    vector = np.asarray(values(scaled(transform, "unit"), k, estimator), np.float64)
    for _ in range(DRAWS):
        rewards = np.empty_like(world.scores)
        for at, (law, scores) in enumerate(zip(world.laws, world.scores, strict=True)):
            drawn = np.sort(rng.choice(scores, k, p=law))
            below, upto = (np.searchsorted(drawn, scores, side) for side in ("left", "right"))
            rewards[at] = vector[below + upto]
        rates.append(world.win_rate(world.at_kl(rewards, KL), partial(kind, procedure.n)))
    return rates


def main() -> None:
    """Enumerate, compute, draw and save."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    rows = []
    for ax, (name, (transform, procedure)) in zip(axes, CASES.items(), strict=True):
        limit = win_rate(transform, beta_for_kl(transform, KL), procedure)
        for estimator, mark in zip(ESTIMATORS, "os^", strict=True):
            for k in SIZES:
                rates = enumerate_rate(transform, procedure, k, estimator)
                theory = win_rate_at_kl(scaled(transform, "unit"), KL, procedure, k, estimator, draws=200)
                row = {"case": name, "estimator": estimator, "K": k, "exact world": float(np.mean(rates))}
                row |= {"error": float(np.std(rates, ddof=1) / DRAWS**0.5), "theory": theory.win_rate}
                rows.append(row | {"infinite K": limit})
                print(f"{name} {estimator} K={k}: {row['exact world']:.3f} ± {row['error']:.3f}", end="")
                print(f", theory {theory.win_rate:.3f}, infinite K {limit:.3f}", flush=True)
            own = [row for row in rows if row["case"] == name and row["estimator"] == estimator]
            (line,) = ax.plot(SIZES, [row["theory"] for row in own], label=estimator)
            errors = [1.96 * row["error"] for row in own]
            ax.errorbar(SIZES, [row["exact world"] for row in own], errors, fmt=mark, color=line.get_color())
        ax.axhline(limit, color="k", ls=":", lw=1, label="infinite K")
        ax.set(title=f"{name}, KL {KL}", xlabel="K, references of a prompt", xscale="log")
        ax.set_xticks(SIZES, [str(k) for k in SIZES])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("win rate over the reference")
    axes[0].legend(fontsize=8)
    figure.savefig(FIGURES / "references.png", dpi=130)
    print(save("references", {"draws": DRAWS, "kl": KL, "rows": rows}))


if __name__ == "__main__":
    main()
