"""What adaptive K saves at equal true error, by kind of reward, where the truth is known because it is simulated.

    python benchmarks/adaptive.py

Prints two tables and writes benchmarks/results/adaptive.json. Errors are of the transformed reward in [0, 1] under
the paper's estimator, over fresh responses of the reference policy: the root mean square over prompts, and the 95 %
quantile of the prompts' own root mean squares. The fixed K with the same error is read off a grid, by interpolation of
logs; "K by bands" is what `Adaptive.saved` says without the truth: the fixed K whose widest band is as wide.
"""

from dataclasses import dataclass

import numpy as np
from environment import save

from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.theory.bands import band
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.transforms import Exponential, Identity

PROMPTS, SEED, WIDTHS = 2000, 0, (0.1, 0.05)
ROUNDS = (16, 32, 64, 128)
FIXED = (6, 8, 11, 16, 23, 32, 45, 64, 91, 128)
TRANSFORMS = {"u": Identity(), "e^5u": scaled(Exponential(5.0), "unit")}
SHORT = {repr(transform): name for name, transform in TRANSFORMS.items()}
POINTS = 200  # equally likely scores that stand for a continuous law: no two references tie but by the way


@dataclass(frozen=True)
class Prompt:
    """The law of a prompt's scores: their chances, in ascending order; continuous inside of an atom or not."""

    chances: np.ndarray
    continuous: bool = False

    @property
    def truth(self):
        """C of each score."""
        return np.cumsum(self.chances) - self.chances / 2

    def draw(self, rng):
        """References for the last round; the earlier ones have the first of them."""
        u = rng.random(ROUNDS[-1])
        return u if self.continuous else np.searchsorted(np.cumsum(self.chances)[:-1], u, side="right").astype(float)

    def counts(self, references):
        """How many references lie under each score, and how many not above it."""
        scores = self.truth if self.continuous else np.arange(len(self.chances))
        ordered = np.sort(references)
        return np.searchsorted(ordered, scores), np.searchsorted(ordered, scores, side="right")


def kinds(rng):
    """The prompts of each kind of reward."""
    smooth, alike = Prompt(np.full(POINTS, 1 / POINTS), continuous=True), Prompt(np.ones(1))
    solved = rng.beta(0.5, 0.5, PROMPTS)
    grades = rng.dirichlet(np.full(5, 0.7), PROMPTS)
    return {
        "continuous": [smooth] * PROMPTS,
        "continuous, 30 % of prompts constant": [smooth] * (PROMPTS * 7 // 10) + [alike] * (PROMPTS * 3 // 10),
        "ratings 1 to 5, Dirichlet(.7)": [Prompt(each) for each in grades],
        "verifier 0/1, solved ~ Beta(.5, .5)": [Prompt(np.array([1 - p, p])) for p in solved],
    }


def errors(prompts, rows, transform):
    """Each prompt's root mean square error under the law of its own scores."""
    found = []
    for prompt, references in zip(prompts, rows, strict=True):
        below, upto = prompt.counts(references)
        off = transform((below + upto) / (2 * len(references))) - transform(prompt.truth)
        found.append(np.sqrt(prompt.chances @ off**2))
    return np.array(found)


def missed(prompts, rows, adaptive):
    """The share of responses whose C is outside of its band, at the K where the prompt stopped."""
    outside = []
    for prompt, references in zip(prompts, rows, strict=True):
        K = len(references)
        lower, upper = band(K, adaptive.delta_at(K), adaptive.kind)
        below, upto = prompt.counts(references)
        low, high = (lower[2 * below] + lower[2 * upto]) / 2, (upper[2 * below] + upper[2 * upto]) / 2
        outside.append(prompt.chances @ ((prompt.truth < low - 1e-9) | (prompt.truth > high + 1e-9)))
    return float(np.mean(outside))


def told(found):
    """The two errors of a run."""
    return {"rms": float(np.sqrt(np.mean(found**2))), "worst": float(np.quantile(found, 0.95))}


def run(adaptive, drawn):
    """How many references each prompt ends with."""
    have = dict.fromkeys(drawn, 0)
    while asked := adaptive.next((key, row[: have[key]]) for key, row in drawn.items()):
        have |= asked
    return have


def same_error(by_fixed, which, error):
    """The fixed K with this error, or None where even the largest has a larger one."""
    sizes = np.array([by_fixed[K][which] for K in FIXED])
    if error < sizes[-1]:
        return None
    return float(np.exp(np.interp(-np.log(error), -np.log(sizes), np.log(FIXED))))


def compare(name, prompts, drawn, transform, adaptive):
    """One line of the first table."""
    have = run(adaptive, drawn)
    rows = {key: row[: have[key]] for key, row in drawn.items()}
    by_fixed = {K: told(errors(prompts, [row[:K] for row in drawn.values()], transform)) for K in FIXED}
    used, error = sum(have.values()) / PROMPTS, told(errors(prompts, rows.values(), transform))
    return {
        "reward": name,
        "transform": repr(transform),
        "width": adaptive.width,
        "K_used": used,
        "stopped_early": float(np.mean(np.array([*have.values()]) < ROUNDS[-1])),
        "error": error,
        "K_fixed_at_same_error": {which: same_error(by_fixed, which, error[which]) for which in ("rms", "worst")},
        "K_fixed_by_bands": {which: adaptive.saved(rows.items(), which).fixed for which in ("worst", "mean")},
        "outside_of_band": missed(prompts, rows.values(), adaptive),
        "fixed": by_fixed,
    }


def within(name, prompts, drawn, transform, adaptive):
    """One line of the second table: the same rollouts for all, or for the widest bands first."""
    have = run(adaptive, drawn)
    return {
        "reward": name,
        "transform": repr(transform),
        "budget": adaptive.budget,
        "adaptive": told(errors(prompts, [row[: have[key]] for key, row in drawn.items()], transform)),
        "fixed": told(errors(prompts, [row[: adaptive.budget // PROMPTS] for row in drawn.values()], transform)),
    }


def main():
    """Both tables."""
    rng = np.random.default_rng(SEED)
    compared, budgeted = [], []
    for name, prompts in kinds(rng).items():
        drawn = {i.to_bytes(4, "big"): prompt.draw(rng) for i, prompt in enumerate(prompts)}
        for transform in TRANSFORMS.values():
            compared += [compare(name, prompts, drawn, transform, Adaptive(transform, w, ROUNDS)) for w in WIDTHS]
            narrow = Adaptive(transform, WIDTHS[-1] / 10, ROUNDS, budget=64 * PROMPTS)
            budgeted.append(within(name, prompts, drawn, transform, narrow))
    print("until bands are as narrow as asked: K used, and the fixed K with the same error")
    print(
        f"{'':38}{'transform':>10}{'band':>7}{'K used':>8}{'rms':>8}{'K':>6}{'worst':>8}{'K':>6}"
        f"{'K by bands':>12}{'outside':>9}"
    )
    for row in compared:
        sizes = {which: f"{K:.0f}" if K else f">{FIXED[-1]}" for which, K in row["K_fixed_at_same_error"].items()}
        print(
            f"{row['reward']:38}{SHORT[row['transform']]:>10}{row['width']:7.2f}{row['K_used']:8.1f}"
            f"{row['error']['rms']:8.4f}{sizes['rms']:>6}{row['error']['worst']:8.4f}{sizes['worst']:>6}"
            f"{row['K_fixed_by_bands']['worst']:12}{row['outside_of_band']:9.4f}"
        )
    print(f"\n64 rollouts a prompt{'':28}{'rms: fixed':>12}{'adaptive':>10}{'worst: fixed':>14}{'adaptive':>10}")
    for row in budgeted:
        print(
            f"{row['reward']:38}{SHORT[row['transform']]:>10}{row['fixed']['rms']:12.4f}"
            f"{row['adaptive']['rms']:10.4f}{row['fixed']['worst']:14.4f}{row['adaptive']['worst']:10.4f}"
        )
    save("adaptive", {"prompts": PROMPTS, "rounds": ROUNDS, "until": compared, "within": budgeted})


if __name__ == "__main__":
    main()
