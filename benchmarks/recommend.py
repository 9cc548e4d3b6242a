"""Do `recommend` and the frontier keep their promises? Bias and coverage where the truth is an integral, and speed.

Scores of reward model and judge are normals with a correlation, K = 100 rollouts of 200 prompts, drawn anew in each
repetition. Truth: of the frontier the optimum with infinitely many references; of `recommend` the policy that fits the
rewards of K references, averaged over draws of them. Weights of pairs are the same in all repetitions and computed
once; in the first one all numbers are checked to be those of `estimate_frontier` and `recommend`. Writes
benchmarks/results/recommend.json.

    python benchmarks/recommend.py           # minutes; --log FILE to go on after an interruption
    python benchmarks/recommend.py --speed   # seconds; recommend_speed.json
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
from environment import save
from reweighted import TRANSFORMS
from scipy.special import ndtr, ndtri

from calibrated_rewards.evaluation.estimates import Samples, estimate_columns
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.objectives import OBJECTIVES, Fixed, OptimumAtKL
from calibrated_rewards.evaluation.pair_weights import compare_pairs, weigh_pairs
from calibrated_rewards.evaluation.recommend import average_at_k, recommend
from calibrated_rewards.evaluation.references import References
from calibrated_rewards.evaluation.weighted_rollouts import RolloutsAtKL, extrapolate
from calibrated_rewards.reward.calibrators import Uncalibrated
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


def table_of(samples):
    """Make the table of a draw."""
    return ReferenceTable.build((f"prompt {i}", row) for i, row in enumerate(samples.select))


def prepare(correlation):
    """Return the truth of each cell, and weights of pairs for those with a known law: all but those of the raw score.

    What is recommended, and its law at K, is that of the first repetition in all of them. There the win rates are
    checked to be those of `estimate_frontier` and of `recommend`.
    """
    first, best = draw(np.random.default_rng([0, int(100 * correlation)]), correlation), BestOf(N)
    truth, weights, promised = {}, {}, {}
    for kl in KLS:
        arms = {name: OBJECTIVES[name] for name in ("raw", "identity", "exp:10")}
        arms["best-of:4"] = Fixed(OptimumAtKL(best).at(kl))
        for point in estimate_frontier(first, arms, [kl], [best]).points:
            promised[point.arm, kl] = point.win_rates["judge"][repr(best)]
        for name, arm in arms.items():
            transform = TRANSFORMS["raw"] if name == "raw" else arm.at(kl).transform
            truth[name, kl] = limit(transform, kl, correlation)
            if name != "raw":
                weights[name, kl] = weigh_pairs(transform, beta_for_kl(transform, kl), best, ROLLOUTS)
        answer = recommend(References(first, table_of(first), "reward", "judge"), best, kl, estimator="posterior")
        promised["recommend", kl] = answer.win_rate
        truth["recommend", kl] = with_references(answer, correlation)
        smooth, smooth_kl = average_at_k(answer.transform, answer.beta, answer.estimator, best, ROLLOUTS)
        weights["recommend", kl] = weigh_pairs(smooth, beta_for_kl(smooth, smooth_kl), best, ROLLOUTS)
    for key, estimate in zip(truth, estimate_cells(first, list(truth), weights), strict=True):
        if abs(estimate[0] - promised[key].value) > 1e-6 or abs(estimate[1] - promised[key].low) > 1e-6:
            raise ValueError(f"{key} is {estimate}, and the library has {promised[key]}")
    return truth, weights


def estimate_cells(samples, keys, weights):
    """Estimate the win rate of each cell by the judge, with the ends of its interval."""
    rollouts = RolloutsAtKL(samples, (BestOf(N),))
    halves, pools, columns = rollouts.halves(), rollouts.pools, []
    ranks = np.take_along_axis(pools.by_judge.below + pools.by_judge.upto, pools.by_select.order, 1)
    for key in keys:
        if key in weights:
            columns.append(compare_pairs(weights[key], ranks))
            continue
        parts = [each.reweight("raw", Uncalibrated(), key[1]) for each in (rollouts, *halves)]
        columns.append(extrapolate(parts[0], parts[1:], 2.0, rollouts.judge_rate).win_rates[:, 1])
    clipped = [each.clip(0.0, 1.0) for each in estimate_columns(np.stack(columns, axis=1))]
    return [[each.value, each.low, each.high] for each in clipped]


def measure(correlation, repetitions, log):
    """Measure bias and coverage of all cells, going on from the repetitions that the log has."""
    truth, weights = prepare(correlation)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    found = {each["repetition"]: each["values"] for each in lines if each["correlation"] == correlation}
    for repetition in range(repetitions):
        if repetition not in found:
            samples = draw(np.random.default_rng([repetition, int(100 * correlation)]), correlation)
            found[repetition] = estimate_cells(samples, list(truth), weights)
            line = {"correlation": correlation, "repetition": repetition, "values": found[repetition]}
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    values = np.array([found[repetition] for repetition in range(repetitions)])
    for (name, kl), exact, (value, low, high) in zip(truth, truth.values(), values.transpose(1, 2, 0), strict=True):
        yield {
            "correlation": correlation,
            "objective": name,
            "kl": kl,
            "truth": round(exact, 4),
            "bias": round(float(value.mean()) - exact, 4),
            "spread": round(float(value.std()), 4),
            "coverage": round(float(np.mean((low <= exact) & (exact <= high))), 3),
        }


def measure_speed():
    """Seconds, by the clock and of the CPU, of a frontier of 1,000 prompts and of `recommend` from its start."""
    samples = draw(np.random.default_rng(0), 0.6, prompts=1000)
    start, used = time.perf_counter(), time.process_time()
    estimate_frontier(samples, kls=[0.5, 1.0, 2.0], procedures=[BestOf(N)])
    frontier, frontier_cpu = time.perf_counter() - start, time.process_time() - used
    with tempfile.TemporaryDirectory() as folder:
        rows = ((f"prompt {i}", row[:32]) for i, row in enumerate(samples.select[:256]))
        ReferenceTable.build(rows, path=Path(folder, "table"))
        command = [sys.executable, "-m", "calibrated_rewards", "recommend", f"{folder}/table", "--best-of", "8"]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        cold = time.perf_counter() - start
        used_by_command = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "frontier_1000_prompts_x_100_s": round(frontier, 2),
        "frontier_1000_prompts_x_100_cpu_s": round(frontier_cpu, 2),
        "recommend_cold_256_prompts_x_32_s": round(cold, 2),
        "recommend_cold_256_prompts_x_32_cpu_s": round(used_by_command.ru_utime + used_by_command.ru_stime, 2),
    }


def main():
    """Measure bias and coverage, or with --speed seconds, and save them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="a file of the repetitions that are done, to go on from"
    )
    parser.add_argument("--speed", action="store_true", help="measure seconds instead")
    options = parser.parse_args()
    if options.speed:
        speed = measure_speed()
        print(speed, save("recommend_speed", speed), sep="\n")
        return
    results = {"prompts": PROMPTS, "rollouts": ROLLOUTS, "best_of": N, "repetitions": options.repetitions}
    results["cells"] = [row for each in CORRELATIONS for row in measure(each, options.repetitions, options.log)]
    print(*results["cells"], save("recommend", results), sep="\n  ")


if __name__ == "__main__":
    main()
