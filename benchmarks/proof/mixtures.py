"""Best of N on held-out prompts by a mixture: the reference, and with probability p a policy far from it.

    python benchmarks/proof/mixtures.py --steps 96 --arms raw identity     # after held_out_prompts.py --steps 96
    python benchmarks/proof/mixtures.py --quick OUT                        # after held_out_prompts.py --quick OUT

What best of N wants is convex in the quantile: little changes below, and the top comes far more often. A line of
weights does not learn that from few completions. A mixture has the shape by construction: the ratio to the reference
is 1 - p + p rho, where rho is that of a trained arm whose weights are stretched to a larger KL; each draw chooses
between the two by its seed. The larger KL is chosen on the arm's 32 other prompts, by best of 16 and the reward model;
the factor that reaches it, and the p whose mixture is at KL .25, are found on the prompts that are measured, as the
factors of the other arms are. Measured as in held_out_prompts.py, by the judge, against the arms that were trained
there: by weights, paired, and by fresh draws. Results: benchmarks/results/proof_mixtures*.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import measure
from held_out_prompts import MEASURED, NAMES, PROMPTS, QUICK, Bench, World, find_folder, make_parts, make_world
from lines import Line
from scipy.optimize import brentq
from shares import average

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.evaluation.estimates import Estimate, Samples, difference
from calibrated_rewards.evaluation.held_out_results import compare_held_out
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.training.offline.log_probabilities import GroupReader

# KLs that a policy is stretched to, as multiples of the one asked for; the other prompts choose among them.
FAR = (1.5, 2, 3, 4)
PROCEDURES = ("one draw", "best of 4", "best of 16", "best of 32", "worst of 4")
CHOOSE_BY = BestOf(16)


def mix(log_ratios: np.ndarray, p: float) -> np.ndarray:
    """Compute the log-ratios of the mixture: log(1 - p + p rho)."""
    return np.log1p(p * np.expm1(log_ratios))


def find_share(line: Line, log_ratios: np.ndarray, kl: float) -> float:
    """Find the p whose mixture has the KL."""
    return float(brentq(lambda p: line.measure_kl(mix(log_ratios, p)) - kl, 1e-6, 1.0))


def choose_far(dev: Line, kl: float) -> dict[str, Any]:
    """Choose the KL to stretch to on a line's prompts: the one whose mixture wins most, by the reward."""
    found = []
    for times in FAR:
        factor, log_ratios = dev.stretch(times * kl)
        p = find_share(dev, log_ratios, kl)
        check = compare_held_out({"mixture": mix(log_ratios, p)}, dev.scores, [CHOOSE_BY]).checks["mixture"]
        rate = check.win_rates["select"][repr(CHOOSE_BY)].value
        found.append({"far": dev.measure_kl(log_ratios), "factor": factor, "p": p, "win_rate": rate})
    return {"far": max(found, key=lambda each: each["win_rate"])["far"], "tried": found}


def draw_mixture(bench: Bench, line: Line, factor: float, p: float, seed: int) -> Samples:
    """Draw from the mixture by fresh seeds, the far policy where the seed says so, and score."""
    place = bench.folder / f"fresh-reference-{seed}.npz"
    if not place.exists():
        line.set(0.0)
        own = bench.draw(seed)
        np.savez(place, select=np.stack(own.select), judge=np.stack(own.judge or ()))
    reference = np.load(place)
    line.set(factor)
    far = bench.draw(seed + 100)
    is_far = np.random.default_rng([seed, 5]).random(reference["select"].shape) < p
    return Samples(
        *(
            np.where(is_far, np.stack(own), reference[name])
            for name, own in (("select", far.select), ("judge", far.judge))
        )
    )


def run(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """Choose an arm's mixture, and measure it."""
    began = time.process_time()
    world = bench.world
    _, dev_groups = bench.choose(arm, seed)
    bench.reset()
    reader = GroupReader(bench.policy.model.eval(), bench.policy.decoding.temperature, world.k)
    read = [*bench.recorded.read(reader, dev_groups)]
    test = bench.line(arm, seed)
    dev = replace(
        test,
        tokens=[group.tokens._replace(states=states) for group, (_, states) in read],
        reference=[known for _, (known, _) in read],
        scores=Samples(np.stack([group.scores for group, _ in read])),
    )
    choice = choose_far(dev, world.kl)
    factor, far = test.stretch(choice["far"])
    p = find_share(test, far, world.kl)
    log_ratios = mix(far, p)
    np.save(bench.place(f"mixture of {arm}", seed, "npy"), log_ratios)
    kl = test.measure_kl(log_ratios)
    fresh = measure(
        factor, draw_mixture(bench, test, factor, p, seed), bench.references, np.full(len(bench.references), kl)
    )
    return {
        "arm": arm, "seed": seed, "kl": kl, "far": test.measure_kl(far), "factor": factor, "p": p,
        "tried": choice["tried"], "seconds": round(time.process_time() - began), "fresh": fresh.to_json(),
    }  # fmt: skip


def summarise(bench: Bench, rows: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each mixture with each arm that was trained as it is, seed by seed and in the mean."""
    by_case = {(row["arm"], row["seed"]): row for row in trained}
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        for other in dict.fromkeys(row["arm"] for row in trained):
            pairs = [row for row in own if (other, row["seed"]) in by_case]
            policies = [
                compare_held_out(
                    {name: np.load(bench.place(name, row["seed"], "npy")) for name in (other, f"mixture of {arm}")},
                    bench.references,
                    MEASURED,
                )
                for row in pairs
            ]
            for procedure in PROCEDURES if pairs else ():
                # 48 rollouts are too few for the weights of best of 32: fresh draws alone.
                by_weights = procedure in NAMES
                gains = [each.gain(f"mixture of {arm}", other, NAMES[procedure]) for each in policies if by_weights]
                fresh = [
                    difference(
                        *(
                            Estimate(np.array(each["fresh"]["rates"]["judge"][procedure]))
                            for each in (row, by_case[other, row["seed"]])
                        )
                    )
                    for row in pairs
                ]
                found.append(
                    {
                        "mixture_of": arm, "over": other, "under": procedure, "seeds": [row["seed"] for row in pairs],
                        "gain": average(np.array([each.value for each in gains])) if gains else None,
                        "by_seed": [[each.value, each.low, each.high] for each in gains],
                        "fresh": average(np.array([each.value for each in fresh])),
                        "fresh_by_seed": [[each.value, *each.interval()] for each in fresh],
                        "kl": [[row["kl"], by_case[other, row["seed"]]["kl"]] for row in pairs],
                    }
                )  # fmt: skip
    return found


def main() -> None:
    """Measure the mixtures that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--steps", type=int, default=World.steps, help="of held_out_prompts.py")
    parser.add_argument("--lr", type=float, default=World.lr, help="of held_out_prompts.py")
    parser.add_argument("--task", choices=PROMPTS, default="reviews")
    parser.add_argument("--arms", nargs="+", default=["raw", "identity"], metavar="ARM")
    parser.add_argument("--quick", type=Path, metavar="OUT")
    parser.add_argument("--summarise", action="store_true", help="measure nothing: write the results of what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = QUICK if args.quick else make_world(args.steps, args.lr, args.task)
    cache = args.cache.expanduser()
    folder: Path = args.quick or find_folder(cache, args.task)
    bench = Bench(world, make_parts(cache, world, args.quick), folder)
    trained = [json.loads(line) for line in (folder / f"arms-{world.steps}.jsonl").read_text().splitlines()]
    lines = folder / f"mixtures-{world.steps}.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    there = {(row["arm"], row["seed"]) for row in rows}
    for row in trained:
        case = row["arm"], row["seed"]
        if row["arm"] in args.arms and case not in there and not args.summarise:
            rows.append(run(bench, *case))
            with lines.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(*(f"{name}={rows[-1][name]}" for name in ("arm", "seed", "kl", "far", "p", "seconds")), flush=True)
    results = {
        "world": asdict(world),
        "mixtures": [{name: each for name, each in row.items() if name != "fresh"} for row in rows],
        "gains": summarise(bench, rows, trained),
    }
    if args.quick is None:
        save(world.name.replace("held_out_prompts", "mixtures"), results)
    else:
        (folder / "mixtures.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
