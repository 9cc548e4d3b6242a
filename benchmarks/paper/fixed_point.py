"""Where the paper's way to the optimal transform fails, and where its t = 5 and t = 10 stop being good.

    python benchmarks/paper/fixed_point.py

Writes benchmarks/results/fixed_point.json, docs/figures/fixed_point.png and docs/figures/best_t.png.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.theory.optimum import Optimal, optimum, tune
from calibrated_rewards.theory.procedures import BestOf, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
ROUNDS = 300
CASES = [(kind(n), beta) for kind in (BestOf, WorstOf) for n in (2, 4, 8) for beta in (0.5, 0.3, 0.1, 0.02)]


def iterations():
    """How far Phi still is from its image after 300 rounds, by damping; below 1e-6 counts as converged."""
    rows = []
    for procedure, beta in CASES:
        left = {d: float(Optimal(procedure, beta).iterate(ROUNDS, d).changes[-1]) for d in (1.0, 0.5, 0.1)}
        print(f"{procedure!r:14} beta {beta:<5} " + "  ".join(f"damping {d}: {x:8.1e}" for d, x in left.items()))
        rows.append({"procedure": repr(procedure), "beta": beta, "left": left})
    return rows


def draw_cycle():
    """Best-of-4 at KL 1: the two functions between which the undamped iteration jumps, and the optimum."""
    optimal = Optimal(BestOf(4), 0.083)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for rounds in (ROUNDS, ROUNDS + 1):
        cycle = optimal.iterate(rounds, 1.0)
        left.plot(cycle.u, cycle.values, label=f"undamped, round {rounds}")
    u = np.linspace(0, 1, 400)
    left.plot(u, optimal(u), "k--", label="optimum (shooting)")
    left.set(xlabel="calibrated reward u", ylabel=r"$\Phi(u)-\Phi(1)$", title=r"Best of 4, $\beta$ = 0.083")
    for damping in (1.0, 0.5, 0.1):
        right.semilogy(optimal.iterate(ROUNDS, damping).changes, label=f"damping {damping}")
    right.set(xlabel="round", ylabel=r"max $|\Phi - $step$(\Phi)|$ / range", title="Distance from a fixed point")
    for ax in (left, right):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.savefig(FIGURES / "fixed_point.png", dpi=130)


def best_exponents():
    """What t = 5 and t = 10 lose against the best t and the optimum, for N and KL beyond the paper's."""
    rows = []
    for n in (2, 4, 8, 16, 32):
        for kl in (0.1, 0.25, 0.5, 1.0):
            procedure = BestOf(n)
            tuned, best = tune(procedure, kl=kl), optimum(procedure, kl=kl)
            fixed = {t: win_rate(Exponential(t), beta_for_kl(Exponential(t), kl), procedure) for t in (5.0, 10.0)}
            rates = {"tuned": tuned.win_rate, "optimum": best.win_rate, "t=5": fixed[5.0], "t=10": fixed[10.0]}
            rows.append({"n": n, "kl": kl, "best t": tuned.transform.parts[0].t, **rates})
            print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
    return rows


def draw_best_t(rows):
    """Best t, and the points of win rate that t = 10 leaves, by N."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kl in (0.1, 0.25, 0.5, 1.0):
        line = [row for row in rows if row["kl"] == kl]
        sizes = [row["n"] for row in line]
        left.loglog(sizes, [row["best t"] for row in line], "o-", label=f"KL {kl}")
        right.plot(sizes, [100 * (row["optimum"] - row["t=10"]) for row in line], "o-", label=f"KL {kl}, t = 10")
    right.plot(sizes, [100 * (row["optimum"] - row["tuned"]) for row in line], "k--", label="KL 1, best t")
    left.axhspan(5, 10, alpha=0.15, color="gray", label="the paper's t")
    left.set(xlabel="N", ylabel="best t", title="Best exponential for best-of-N")
    right.set(xlabel="N", ylabel="win rate lost, points", title="Lost against the optimum", xscale="log")
    for ax in (left, right):
        ax.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        ax.minorticks_off()
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.savefig(FIGURES / "best_t.png", dpi=130)


def main():
    """Both tables, the JSON and the figures."""
    FIGURES.mkdir(exist_ok=True)
    results = {"iteration": iterations(), "exponents": best_exponents()}
    draw_cycle()
    draw_best_t(results["exponents"])
    print(save("fixed_point", results))


if __name__ == "__main__":
    main()
