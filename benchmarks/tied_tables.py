"""Does `expect` keep its promise on tables with ties? Promised KL and win rate against enumeration of known laws.

Each prompt has a law of scores of its own, from which its K references are drawn. Truth is the policy that is optimal
for the rewards of these references at the beta that `expect` solves for, enumerated over the law; exp:10 at KL .5, both
sides best of 4. Writes benchmarks/results/tied_tables.json.

    python benchmarks/tied_tables.py
"""

import numpy as np
from environment import save
from scipy.special import ndtri

from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential

PROMPTS, KL, N = 600, 0.5, 4
TRANSFORM = scaled(Exponential(10.0), "unit")
NORMAL = ndtri((np.arange(1000) + 0.5) / 1000)


def binary(rates):
    """Laws of 0 and 1 with these pass rates."""
    return [(np.array([0.0, 1.0]), np.array([1 - rate, rate])) for rate in rates]


def continuous(scores):
    """Equal masses at these scores, which may tie."""
    values, counts = np.unique(scores, return_counts=True)
    return values, counts / counts.sum()


def make_laws(rng):
    """Make the laws of all prompts, by case."""
    offsets = 3 * rng.normal(size=PROMPTS)
    cap = np.quantile(NORMAL, 0.7)
    return {
        "0 and 1, pass rates beta(.5, .8)": binary(rng.beta(0.5, 0.8, PROMPTS)),
        "0 and 1, pass rates .1 or .9": binary(rng.choice([0.1, 0.9], PROMPTS)),
        "0 and 1, pass rates .02, .3 or .9": binary(rng.choice([0.02, 0.3, 0.9], PROMPTS)),
        "0 and 1, pass rates 0, .5 or 1": binary(rng.choice([0.0, 0.5, 1.0], PROMPTS)),
        "five levels, Dirichlet": [(np.arange(5.0), mass) for mass in rng.dirichlet([0.6, 1, 2, 1, 0.6], PROMPTS)],
        "30 % at one cap for all": [continuous(np.minimum(NORMAL, cap))] * PROMPTS,
        "30 % at a prompt's own cap": [continuous(np.minimum(NORMAL, cap) + each) for each in offsets],
        "a grid of quarters, a prompt's own": [continuous(np.round(4 * NORMAL) / 4 + each) for each in offsets],
    }


def enumerate_policy(references, law, beta):
    """Compute KL and win rate of the policy that is optimal for these references' rewards, over the whole law."""
    scores, mass = law
    ordered = np.sort(references)
    ranks = (np.searchsorted(ordered, scores) + np.searchsorted(ordered, scores, "right")) / 2 / len(ordered)
    reward = np.asarray(TRANSFORM(ranks))
    policy = mass * np.exp((reward - reward[mass > 0].max()) / beta)
    policy /= policy.sum()
    there = policy > 0
    output, base = (np.diff(np.cumsum(each) ** N, prepend=0.0) for each in (policy, mass))
    kl = float(policy[there] @ np.log(policy[there] / mass[there]))
    return kl, float(output @ (np.cumsum(base) - base / 2))


def main():
    """Compare in each case, with one K for all prompts and with a K of its own for each."""
    rows = []
    for K in (8, 32, 100):
        rng = np.random.default_rng(K)
        for name, laws in make_laws(rng).items():
            for ragged in (False, True):
                sizes = rng.integers(K // 2, 3 * K // 2 + 1, PROMPTS) if ragged else np.full(PROMPTS, K)
                drawn = [
                    rng.choice(scores, p=mass, size=size) for (scores, mass), size in zip(laws, sizes, strict=True)
                ]
                row = {"law": name, "K": K, "ragged": ragged}
                table = ReferenceTable.build((f"prompt {i}", each) for i, each in enumerate(drawn))
                try:
                    promised = expect(table, TRANSFORM, kl=KL, procedure=BestOf(N))
                except ValueError as error:
                    rows.append({**row, "refused": str(error)})
                    continue
                truth = [enumerate_policy(*each, promised.beta) for each in zip(drawn, laws, strict=True)]
                kl, rate = np.mean(truth, axis=0)
                row |= {"kl": round(float(kl), 4), "promised": round(promised.win_rate, 4)}
                row["win_rate"] = round(float(rate), 4)
                rows.append({**row, "error": round(float(promised.win_rate - rate), 4)})
                print(rows[-1])
    print(save("tied_tables", {"prompts": PROMPTS, "kl": KL, "best_of": N, "rows": rows}))


if __name__ == "__main__":
    main()
