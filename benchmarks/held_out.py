"""How far off checks on held-out rollouts are: win rates and KL from importance weights, against quadrature.

    OMP_NUM_THREADS=1 python benchmarks/held_out.py

Prints a table and writes benchmarks/results/held_out.json. The world is continuous: the reference's scores of a prompt
are normal, and the judge's correlate with them by .9. A policy's log-ratio is a function of the score, as an optimum's
is, and noise that the scores say nothing of, as a trained network's has (60 % of the KL in the trial on SmolLM2-135M).
Its win rates are integrals, by the midpoint rule on 4,000 quantiles. Each repetition draws 120 prompts with K rollouts;
the standard error of a bias is its standard deviation over the root of 30 (of a KL, of 300).

"pooled" and "prompt" are the two ways of `weighted_win_rate`. "plug-in" makes distribution functions of weights that
are normalised in a prompt, as the frontier does (`WeightedPools`), and "plug-in, halves" adds the difference that half
of the rollouts make. The KL is the mean of w log w - w + 1 ("check"), of w log w ("plain"), or that of weights
normalised in a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from environment import save
from scipy.special import ndtr, ndtri

from calibrated_rewards.evaluation.estimates import Estimate, Samples
from calibrated_rewards.evaluation.importance_weights import HeldOutPolicy, weighted_win_rate
from calibrated_rewards.evaluation.win_rate import WeightedPools, win_rates_of
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

PROMPTS, REPETITIONS, CORRELATION, NOISE = 120, 30, 0.9, 0.6
GRID = (np.arange(4000) + 0.5) / 4000
Procedure = Standard | BestOf | WorstOf
Rates = tuple[np.ndarray, np.ndarray]


@cache
def solve(name: str, kl: float) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Find the transform and the beta of an optimum."""
    chosen = optimum(BestOf(4) if name == "best of 4" else WorstOf(4), kl=kl)
    return chosen.transform, chosen.beta


@dataclass(frozen=True)
class Policy:
    """A policy whose log-ratio is a function of the score's quantile and noise, of a KL."""

    name: str
    kl: float
    noise: float = NOISE
    """The share of the KL that is noise, of which the scores say nothing."""

    def tilt(self, u: np.ndarray) -> np.ndarray:
        """Compute the log-ratio without its noise, up to a constant."""
        own = self.kl * (1 - self.noise)
        if self.name == "raw":
            return np.sqrt(2 * own) * ndtri(u)
        transform, beta = solve(self.name, own)
        return np.asarray(transform(u) / beta)

    def mass(self) -> np.ndarray:
        """Compute the policy's law of the quantile, on the grid."""
        weight = np.exp(self.tilt(GRID) - self.tilt(GRID).max())
        return np.asarray(weight / weight.sum())

    def log_ratios(self, u: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Compute the log-ratios of rollouts with these quantiles; `noise` is normal."""
        constant = np.log(np.exp(self.tilt(GRID)).mean())
        spread = np.sqrt(2 * self.kl * self.noise)
        return np.asarray(self.tilt(u) - constant + spread * noise - spread**2 / 2)

    def win_rates(self, procedure: Procedure) -> tuple[float, float]:
        """Integrate the win rates by the score that selects and by the judge."""
        ours, theirs = (output(mass, procedure) for mass in (self.mass(), np.full(len(GRID), 1 / len(GRID))))
        z = ndtri(GRID)
        spread = np.sqrt(2 * (1 - CORRELATION**2))
        judged = sum(
            share * (theirs @ ndtr(CORRELATION * (at - z) / spread)) for share, at in zip(ours, z, strict=True)
        )
        return float(ours @ (np.cumsum(theirs) - theirs / 2)), float(judged)


def output(mass: np.ndarray, procedure: Procedure) -> np.ndarray:
    """Compute the law of the quantile that a procedure returns."""
    if isinstance(procedure, WorstOf):
        return output(mass[::-1], BestOf(procedure.n))[::-1]
    upto = np.cumsum(mass) ** procedure.draws
    return np.diff(upto, prepend=0.0)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Rollouts of the reference: quantiles, the judge's scores, and noise."""

    u: np.ndarray
    judge: np.ndarray
    noise: np.ndarray

    @classmethod
    def draw(cls, k: int, rng: np.random.Generator) -> Rollouts:
        """Draw k rollouts of each prompt."""
        u = rng.random((PROMPTS, k))
        judge = CORRELATION * ndtri(u) + np.sqrt(1 - CORRELATION**2) * rng.normal(size=u.shape)
        return cls(u, judge, rng.normal(size=u.shape))

    def halves(self) -> list[Rollouts]:
        """Split each prompt's rollouts into a first and a second half."""
        half = self.u.shape[1] // 2
        return [Rollouts(*(of[:, part] for of in (self.u, self.judge, self.noise))) for part in np.s_[:half, half:]]


def weighted(normalise: str, policy: Policy, rollouts: Rollouts, procedure: Procedure) -> Rates:
    """Estimate each prompt's win rates, by the score that selects and by the judge."""
    d = policy.log_ratios(rollouts.u, rollouts.noise)
    pair = Samples(rollouts.u), Samples(rollouts.u, rollouts.judge)
    by_select, by_judge = (weighted_win_rate(d, each, procedure, normalise).per_prompt for each in pair)  # type: ignore[arg-type]
    return by_select, by_judge


def plug_in(policy: Policy, rollouts: Rollouts, procedure: Procedure) -> Rates:
    """Estimate win rates from distribution functions of normalised weights, as the frontier does."""
    pools = WeightedPools(Samples(rollouts.u, rollouts.judge))
    weights, _ = pools.tilted(policy.log_ratios(rollouts.u, rollouts.noise), 1.0)
    ours, theirs = (pools.output(each, procedure) for each in (weights, pools.uniform))
    by_select = win_rates_of(ours, theirs, pools.by_select.beaten(theirs), itself=True)
    return by_select, win_rates_of(ours, theirs, pools.by_judge.beaten(theirs), itself=False)


def extrapolated(policy: Policy, rollouts: Rollouts, procedure: Procedure) -> Rates:
    """Estimate by the plug-in, and add its difference to that of half the rollouts."""
    whole, halves = plug_in(policy, rollouts, procedure), [plug_in(policy, h, procedure) for h in rollouts.halves()]
    by_select, by_judge = (2 * each - (a + b) / 2 for each, a, b in zip(whole, *halves, strict=True))
    return by_select, by_judge


ESTIMATORS: dict[str, Callable[[Policy, Rollouts, Procedure], Rates]] = {
    "pooled": partial(weighted, "pooled"),
    "prompt": partial(weighted, "prompt"),
    "plug-in": plug_in,
    "plug-in, halves": extrapolated,
}


def measure(policy: Policy, k: int, procedures: list[Procedure]) -> dict[str, object]:
    """Bias, standard deviation and coverage of each estimator under each procedure."""
    results: dict[str, object] = {"policy": policy.name, "kl": policy.kl, "noise": policy.noise, "K": k}
    for procedure in procedures:
        truth, rng, by = policy.win_rates(procedure), np.random.default_rng(0), {name: [] for name in ESTIMATORS}
        covered = []
        for _ in range(REPETITIONS):
            rollouts = Rollouts.draw(k, rng)
            for name, estimate in ESTIMATORS.items():
                rates = estimate(policy, rollouts, procedure)
                by[name].append([each.mean() for each in rates])
                if name == "pooled":
                    low, high = Estimate(rates[1]).interval(method="normal")
                    covered.append(low < truth[1] < high)
        rows = {}
        for name, values in by.items():
            bias, spread = np.mean(values, axis=0) - truth, np.std(values, axis=0, ddof=1)
            rows[name] = {"bias": [*map(float, bias)], "sd": [*map(float, spread)]}
        results[repr(procedure)] = {"truth": truth, "coverage": float(np.mean(covered)), "estimators": rows}
        show(f"{policy.name}, KL {policy.kl:g}, {policy.noise:.0%} noise, K {k}, {procedure!r}", truth, rows)
    return results


def compare(a: Policy, b: Policy, k: int, procedure: Procedure) -> dict[str, object]:
    """Bias and standard deviation of a paired difference, the noise of both mostly the same."""
    truth = tuple(x - y for x, y in zip(a.win_rates(procedure), b.win_rates(procedure), strict=True))
    rng, by = np.random.default_rng(0), {name: [] for name in ESTIMATORS}
    for _ in range(REPETITIONS):
        one = Rollouts.draw(k, rng)
        mixed = 0.95 * one.noise + np.sqrt(1 - 0.95**2) * rng.normal(size=one.noise.shape)
        other = Rollouts(one.u, one.judge, mixed)
        for name, estimate in ESTIMATORS.items():
            pairs = zip(estimate(a, one, procedure), estimate(b, other, procedure), strict=True)
            by[name].append([(x - y).mean() for x, y in pairs])
    rows = {}
    for name, values in by.items():
        bias, spread = np.mean(values, axis=0) - truth, np.std(values, axis=0, ddof=1)
        rows[name] = {"bias": [*map(float, bias)], "sd": [*map(float, spread)]}
    show(f"{a.name} less {b.name}, KL {a.kl:g}, K {k}, {procedure!r}", truth, rows)
    return {"a": a.name, "b": b.name, "kl": a.kl, "K": k, "procedure": repr(procedure), "truth": truth, **rows}


def show(title: str, truth: tuple[float, ...], rows: dict[str, dict[str, list[float]]]) -> None:
    """Print bias and standard deviation, by the score that selects and by the judge."""
    print(f"{title}: {truth[0]:.4f} by the score, {truth[1]:.4f} by the judge", flush=True)
    for name, row in rows.items():
        (b, c), (s, t) = row["bias"], row["sd"]
        print(f"  {name:16} bias {b:+.4f} {c:+.4f}  sd {s:.4f} {t:.4f}", flush=True)


def measure_kl(policy: Policy, k: int) -> dict[str, object]:
    """Measure bias and standard deviation of the estimates of the KL."""
    rng, by = np.random.default_rng(0), {"check": [], "plain": [], "normalised": []}
    for _ in range(10 * REPETITIONS):
        rollouts = Rollouts.draw(k, rng)
        d = policy.log_ratios(rollouts.u, rollouts.noise)
        checked = HeldOutPolicy.of(d, Samples(rollouts.u))
        by["check"].append(checked.kl.value)
        by["plain"].append(float((np.exp(d) * d).mean()))
        by["normalised"].append(checked.kl_normalised.value)
    rows = {
        name: {"bias": float(np.mean(values)) - policy.kl, "sd": float(np.std(values, ddof=1))}
        for name, values in by.items()
    }
    print(
        f"KL of {policy.name}, {policy.kl:g}, K {k}:",
        {n: (round(r["bias"], 4), round(r["sd"], 4)) for n, r in rows.items()},
    )
    return {"policy": policy.name, "kl": policy.kl, "K": k, **rows}


def main() -> None:
    """Measure all estimates, print the table and save the numbers."""
    one, best, worst = Standard(), BestOf(4), WorstOf(4)
    win_rates = [measure(Policy("raw", kl), 48, [one, best, worst]) for kl in (0.3, 1.0)]
    win_rates += [measure(Policy(name, 0.3), 48, [best, worst]) for name in ("best of 4", "worst of 4")]
    win_rates += [measure(Policy("raw", 0.3), k, [best]) for k in (16, 128)]
    win_rates.append(measure(Policy("raw", 0.3, noise=0.0), 48, [best]))
    win_rates.append(measure(Policy("raw", 0.3), 128, [BestOf(16), WorstOf(16)]))
    pairs = [
        compare(Policy("best of 4", 0.3), Policy("raw", 0.3), 48, BestOf(4)),
        compare(Policy("worst of 4", 0.3), Policy("raw", 0.3), 48, WorstOf(4)),
    ]
    kls = [measure_kl(Policy("raw", kl), k) for kl in (0.1, 0.3, 1.0) for k in (16, 48, 128)]
    print(save("held_out", {"win rates": win_rates, "differences": pairs, "kl": kls}))


if __name__ == "__main__":
    main()
