"""Do `recommend` and the frontier keep their promises? Bias and coverage where the truth is an integral, and speed.

Scores of reward model and judge are normals with a correlation, K = 100 rollouts of 200 prompts, drawn anew in each
repetition. Truth: of the frontier the optimum with infinitely many references; of `recommend` the policy that fits the
rewards of K references, averaged over draws of them. Writes benchmarks/results/recommend.json.

    python benchmarks/recommend.py           # half an hour
    python benchmarks/recommend.py --speed   # seconds; recommend_speed.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from environment import save
from reweighted import TRANSFORMS
from scipy.special import ndtr, ndtri

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.objectives import OBJECTIVES, OptimumAtKL
from calibrated_rewards.evaluation.recommend import recommend
from calibrated_rewards.evaluation.references import References
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.theory.tilted_policy import beta_for_kl

PROMPTS, ROLLOUTS, N = 200, 100, 4
KLS, CORRELATIONS = (0.25, 0.5, 1.0), (0.6, 0.9)
GRID = (np.arange(4000) + 0.5) / 4000


@cache
def beats(correlation):
    """P(the judge prefers a rollout at quantile u to one at v), u and v on the grid."""
    x = ndtri(GRID)
    return ndtr(correlation * (x[:, None] - x) / np.sqrt(2 * (1 - correlation**2)))


def judged(density, correlation):
    """The judge's win rate of the best of N of a policy with this density on the grid, against the reference's."""
    mass = density / density.sum()
    ours = np.diff(np.concatenate([[0.0], np.cumsum(mass)]) ** N)
    theirs = np.diff(np.concatenate([[0.0], (np.arange(len(GRID)) + 1) / len(GRID)]) ** N)
    return float(ours @ beats(correlation) @ theirs)


def limit(transform, kl, correlation):
    """Truth with infinitely many references."""
    heights = np.asarray(transform(GRID), np.float64)
    return judged(np.exp((heights - heights.max()) / beta_for_kl(transform, kl)), correlation)


def with_references(answer, correlation, draws=200):
    """Truth of the policy that fits the rewards of K references at the recommended beta, over draws of references."""
    rewards = values(answer.transform, ROLLOUTS, answer.estimator)[::2]
    rng, wins = np.random.default_rng(0), []
    for _ in range(draws):
        below = np.searchsorted(np.sort(rng.random(ROLLOUTS)), GRID)
        wins.append(judged(np.exp((rewards[below] - rewards.max()) / answer.beta), correlation))
    return float(np.mean(wins))


def draw(rng, correlation, prompts=PROMPTS):
    """Fresh rollouts of all prompts with both scores."""
    x = rng.normal(size=(prompts, ROLLOUTS))
    return Samples(x, correlation * x + np.sqrt(1 - correlation**2) * rng.normal(size=x.shape))


@dataclass(frozen=True)
class Solved:
    """An optimum that is solved for once, for all repetitions."""

    optima: dict

    def at(self, kl):
        """Return the optimal reward at this KL."""
        return self.optima[kl]


def repeat(log, part, correlation, repetitions, estimate):
    """Estimate anew in each repetition, but for those that the log has already; return all, in order."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = {each["repetition"]: each["values"] for each in lines if [part, correlation] == each["of"]}
    for repetition in range(repetitions):
        if repetition not in found:
            samples = draw(np.random.default_rng([repetition, int(100 * correlation)]), correlation)
            found[repetition] = estimate(samples)
            with log.open("a") as file:
                line = {"of": [part, correlation], "repetition": repetition, "values": found[repetition]}
                file.write(json.dumps(line) + "\n")
    return [found[repetition] for repetition in range(repetitions)]


def summarise(key, truth, estimates):
    """Compare repeated estimates, each with the ends of its interval, with the truth."""
    value, low, high = np.array(estimates).T
    return {
        **key,
        "truth": round(truth, 4),
        "bias": round(float(value.mean()) - truth, 4),
        "spread": round(float(value.std()), 4),
        "coverage": round(float(np.mean((low <= truth) & (truth <= high))), 3),
        "repetitions": len(value),
    }


def measure_frontier(correlation, repetitions, log):
    """Error and coverage of each objective's win rate by the judge."""
    arms = {name: OBJECTIVES[name] for name in ("raw", "identity", "exp:10")}
    optima = {kl: OptimumAtKL(BestOf(N)).at(kl) for kl in KLS}
    # Only betas are read from this table: a small one is faster.
    table = ReferenceTable.build((f"prompt {i}", np.arange(16.0)) for i in range(2000))

    def estimate(samples):
        frontier = estimate_frontier(samples, {**arms, "best-of:4": Solved(optima)}, KLS, [BestOf(N)], table=table)
        rates = {(point.arm, point.kl): point.win_rates["judge"][f"BestOf(n={N})"] for point in frontier.points}
        return [[rates[key].value, rates[key].low, rates[key].high] for key in keys]

    keys = [(name, kl) for name in (*arms, "best-of:4") for kl in KLS]
    found = np.array(repeat(log, "frontier", correlation, repetitions, estimate))
    for (name, kl), estimates in zip(keys, found.transpose(1, 0, 2), strict=True):
        transform = optima[kl].transform if name == "best-of:4" else TRANSFORMS[name]
        key = {"correlation": correlation, "objective": name, "kl": kl}
        yield summarise(key, limit(transform, kl, correlation), estimates)


def measure_recommend(correlation, repetitions):
    """Error of what `recommend` promises by the judge."""
    for kl in KLS:
        errors = []
        for repetition in range(repetitions):
            samples = draw(np.random.default_rng([repetition, int(100 * correlation)]), correlation)
            table = ReferenceTable.build((f"prompt {i}", row) for i, row in enumerate(samples.select))
            answer = recommend(References(samples, table, "reward", "judge"), BestOf(N), kl, estimator="posterior")
            truth = with_references(answer, correlation) if not repetition else truth
            errors.append(answer.win_rate.value - truth)
        yield {"correlation": correlation, "kl": kl, "truth": round(truth, 4), "bias": round(float(np.mean(errors)), 4)}


def measure_speed():
    """Seconds of a frontier of 1,000 prompts, and of the command `recommend` from its start on a small table."""
    samples = draw(np.random.default_rng(0), 0.6, prompts=1000)
    start = time.perf_counter()
    estimate_frontier(samples, kls=[0.5, 1.0, 2.0], procedures=[BestOf(N)])
    frontier = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rows = ((f"prompt {i}", row[:32]) for i, row in enumerate(samples.select[:256]))
        ReferenceTable.build(rows, path=Path(folder, "table"))
        command = [sys.executable, "-m", "calibrated_rewards", "recommend", f"{folder}/table", "--best-of", "8"]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        cold = time.perf_counter() - start
    return {"frontier_1000_prompts_x_100_s": round(frontier, 2), "recommend_cold_256_prompts_x_32_s": round(cold, 2)}


def main():
    """Measure bias and coverage, or with --speed seconds, and save them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--log", type=Path, default=Path("recommend.jsonl"), help="repetitions done, to go on from")
    parser.add_argument("--only", choices=["frontier", "recommend"], help="measure one of the two, saving no JSON")
    parser.add_argument("--speed", action="store_true", help="measure seconds instead")
    options = parser.parse_args()
    if options.speed:
        speed = measure_speed()
        print(speed, save("recommend_speed", speed), sep="\n")
        return
    results = {"prompts": PROMPTS, "rollouts": ROLLOUTS, "best_of": N, "repetitions": options.repetitions}
    few = max(2, options.repetitions // 25)
    for name, measure in (
        ("recommend", partial(measure_recommend, repetitions=few)),
        (
            "frontier",
            partial(measure_frontier, repetitions=options.repetitions, log=options.log),
        ),
    ):
        if options.only not in (None, name):
            continue
        results[name] = [row for correlation in CORRELATIONS for row in measure(correlation)]
        print(name, *results[name], sep="\n  ")
    if options.only is None:
        print(save("recommend", results))


if __name__ == "__main__":
    main()
