"""What it costs not to know N: win rates under each N of the optimum for a mixture of N, and for each N alone.

    python benchmarks/paper/unknown_n.py

Everything is exact; nothing is trained. A plain iteration on a grid, which shares no code with the library, solves for
every mixture again. It also solves for the best that could be had if policy and reference were always served with the
same N, which `BestOfUpTo`, whose two sides draw N apart, is not made for. Writes benchmarks/results/unknown_n.json and
docs/figures/unknown_n.png.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save
from scipy.optimize import brentq
from scipy.special import expit

from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.named import format_name
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.theory.tilted_policy import win_rate

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
KLS, LARGEST, SERVED = (0.25, 0.5, 1.0), (4, 8, 16, 32), (1, 2, 4, 8, 16, 32)

# A cell of the grid is an interval of u; `TOP` is 1 - u at its edges, to full precision.
LOGITS = np.linspace(-30, 30, 6001)
EDGES, TOP = (np.concatenate([[a], expit(sign * LOGITS), [b]]) for sign, a, b in ((1, 0, 1), (-1, 1, 0)))
WIDTHS, MIDDLES = np.where(EDGES[1:] > 0.5, -np.diff(TOP), np.diff(EDGES)), (EDGES[1:] + EDGES[:-1]) / 2


def rates_by_reward():
    """Win rate under every N up to 32, for every KL and every reward; the optimum for best-of:1 is the identity."""
    rows = []
    for kl in KLS:
        for procedure in (*map(BestOf, SERVED), *map(BestOfUpTo, LARGEST)):
            best = optimum(procedure, kl=kl)
            rates = {n: win_rate(best.transform, best.beta, BestOf(n)) for n in range(1, SERVED[-1] + 1)}
            rows.append({"kl": kl, "reward": format_name(procedure), "beta": best.beta, "win rates": rates})
            shown = "  ".join(f"{rates[n]:.4f}" for n in SERVED)
            print(f"KL {kl:<4} {rows[-1]['reward']:12}  beta {best.beta:.4f}  {shown}")
    return rows


def harmonic_mean_rate(rates, n):
    """Mean win rate over N = 1..n with weights 1/N, where policy and reference are served with the same N."""
    return sum(rates[k] / k for k in range(1, n + 1)) / sum(1 / k for k in range(1, n + 1))


def losses(rows):
    """Per KL and largest N: each reward's mean win rate, and its largest loss against the optimum for the served N."""
    found = []
    for kl in KLS:
        rates = {row["reward"]: row["win rates"] for row in rows if row["kl"] == kl}
        for n in LARGEST:
            served = SERVED[: SERVED.index(n) + 1]
            names = [*(f"best-of:{k}" for k in served), f"best-of:1-{n}"]
            worst = {name: 100 * max(rates[f"best-of:{k}"][k] - rates[name][k] for k in served) for name in names}
            means = {name: harmonic_mean_rate(rates[name], n) for name in names}
            found.append({"kl": kl, "n": n, "largest loss, points": worst, "mean win rate": means})
            shown = (f"{name} {means[name]:.4f} (-{worst[name]:.1f})" for name in names)
            print(f"KL {kl:<4} N up to {n:<2}  " + "  ".join(shown))
    return found


def polynomial(coefficients, x):
    """Sum of coefficients[k] x^k."""
    value = np.zeros_like(x)
    for coefficient in coefficients[::-1]:
        value = value * x + coefficient
    return value


def solve_on_grid(slope, kl):
    """Masses of the cells under the policy with d log f / du = slope(F, u) / beta, at the beta that has this KL."""
    curve = np.zeros_like(MIDDLES)

    def masses():
        mass = np.exp(curve - curve.max()) * WIDTHS
        return mass / mass.sum()

    def excess(log_beta):
        nonlocal curve
        for _ in range(2000):
            mass = masses()
            rises = slope(np.cumsum(mass) - mass / 2, MIDDLES) * WIDTHS / np.exp(log_beta)
            step = rises / 2 - np.cumsum(rises[::-1])[::-1] - curve
            curve = curve + 0.1 * step
            if np.abs(step).max() < 1e-7:
                break
        mass = masses()
        return float(mass @ np.log(mass / WIDTHS)) - kl

    log_beta = brentq(excess, np.log(0.03), np.log(2.0), xtol=1e-6)
    excess(log_beta)
    return masses()


def served_on_grid(mass, n):
    """Win rate of best of n of these masses over best of n of the reference."""
    output, below = np.diff(np.concatenate([[0.0], np.cumsum(mass)]) ** n), EDGES**n
    return float(output @ (below[1:] + below[:-1]) / 2)


def check_on_grid(rows):
    """Both problems solved by iteration: the mixture's, and that of the same N on both sides, averaged over N."""
    found = []
    for kl in KLS:
        for n in LARGEST:
            k = np.arange(1, n + 1)
            chance = 1 / k / (1 / k).sum()
            apart = solve_on_grid(lambda F, u, g=chance * k: polynomial(g, F) * polynomial(g, u), kl)
            together = solve_on_grid(lambda F, u, g=chance * k**2: polynomial(g, F * u), kl)
            ours = next(row for row in rows if (row["kl"], row["reward"]) == (kl, f"best-of:1-{n}"))["win rates"]
            difference = max(abs(served_on_grid(apart, each) - rate) for each, rate in ours.items())
            most = harmonic_mean_rate({each: served_on_grid(together, each) for each in k.tolist()}, n)
            found.append(
                {
                    "kl": kl,
                    "n": n,
                    "difference": difference,
                    "mean short of the best": most - harmonic_mean_rate(ours, n),
                }
            )
            print("  ".join(f"{key} {value:.5g}" for key, value in found[-1].items()))
    return found


def draw(rows):
    """Points lost against the optimum for the served N, by N, at each KL."""
    figure, axes = plt.subplots(1, len(KLS), figsize=(11, 3.8), sharey=True, layout="constrained")
    shown = {
        "best-of:1": "one draw",
        "best-of:4": "best of 4",
        "best-of:16": "best of 16",
        "best-of:1-16": "best of 1 to 16",
    }
    for ax, kl in zip(axes, KLS, strict=True):
        rates = {row["reward"]: row["win rates"] for row in rows if row["kl"] == kl}
        for name, label in shown.items():
            lost = [100 * (rates[f"best-of:{n}"][n] - rates[name][n]) for n in SERVED]
            style = {"color": "black", "linewidth": 2} if name == "best-of:1-16" else {}
            ax.plot(SERVED, lost, "o-", label=f"trained for {label}", **style)
        ax.set(title=f"KL {kl:g}", xlabel="N at inference", xscale="log")
        ax.set_xticks(SERVED, [str(n) for n in SERVED], minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("win rate lost, points")
    axes[0].legend(fontsize=8)
    figure.savefig(FIGURES / "unknown_n.png", dpi=130)


def main():
    """The tables, the JSON and the figure."""
    rows = rates_by_reward()
    results = {"rates": rows, "losses": losses(rows), "grid": check_on_grid(rows)}
    draw(rows)
    print(save("unknown_n", results))


if __name__ == "__main__":
    main()
