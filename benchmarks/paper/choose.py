"""What N, KL, K and the estimator are worth: the tables of docs/guides/choose.md.

Win rates of the optimum for best of N over the reference's best of N, of the identity at the same KL, and what a policy
loses that fits the rewards of K references. Writes benchmarks/results/choose.json.

    python benchmarks/paper/choose.py
"""

import sys
from math import ceil, log2
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import save

from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Identity

PROCEDURES = (BestOf(2), BestOf(4), BestOf(8), BestOf(16), WorstOf(4), WorstOf(16))
KLS, SIZES = (0.25, 0.5, 1.0), (32, 100, 400)


def measure(procedure, kl):
    """Win rates at a KL, and the loss to finite K by estimator."""
    best = optimum(procedure, kl=kl)
    identity = beta_for_kl(Identity(), kl)
    limit = win_rate(best.transform, best.beta, procedure)
    row = {
        "procedure": repr(procedure),
        "kl": kl,
        "optimum": round(limit, 4),
        "identity": round(win_rate(Identity(), identity, procedure), 4),
        "one_draw_of_the_optimum": round(win_rate(best.transform, best.beta, Standard()), 4),
        "one_draw_of_the_identity": round(win_rate(Identity(), identity, Standard()), 4),
    }
    for estimator in ("empirical", "posterior"):
        losses = {
            K: limit - win_rate_at_kl(best.transform, kl, procedure, K, estimator, draws=1000).win_rate for K in SIZES
        }
        row[f"loss_{estimator}"] = {K: round(loss, 4) for K, loss in losses.items()}
        if losses[400] <= 0.01 < losses[32]:
            # Between the sizes the loss is a power of K.
            low, high = (32, 100) if losses[100] <= 0.01 else (100, 400)
            slope = log2(losses[low] / max(losses[high], 1e-6)) / log2(high / low)
            row[f"K_for_a_point_{estimator}"] = ceil(low * (losses[low] / 0.01) ** (1 / slope))
        else:
            row[f"K_for_a_point_{estimator}"] = "under 32" if losses[32] <= 0.01 else "over 400"
    return row


def main():
    """Measure every procedure at every KL, and save the rows as JSON."""
    # Worst of 16 gains nothing beyond a KL of .69, where it wins .999994.
    asked = ((procedure, kl) for procedure in PROCEDURES for kl in KLS if (procedure, kl) != (WorstOf(16), 1.0))
    rows = [measure(procedure, kl) for procedure, kl in asked]
    print(*rows, sep="\n")
    print(save("choose", {"rows": rows}))


if __name__ == "__main__":
    main()
