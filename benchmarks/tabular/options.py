"""What each option of calibration costs, in the exact world: K, estimators, unknown prompts, combined rewards.

    python benchmarks/tabular/options.py            # goes on where it was; some minutes
    python benchmarks/tabular/options.py --quick    # one case each, two draws, nothing is kept

Here references are drawn, as they are in life. A reward made of K of them has an optimum of its own, pi_ref e^{R/beta}
/ Z, where R is what CalibratedReward itself gives for each completion: no training is needed to know it. Two distances
from the optimum for infinitely many references: total variation at the same beta, and win rate under the transform's
own procedure at the same KL; means over draws of the references, with the error of the mean. The last cases are trained
by PPO, to show that training ends at the optimum of the reward that it was given.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from trainers import TRAINERS
from world import KLS, PROMPTS, TRANSFORMS, RoundedScorer, World, known, laws, save

from calibrated_rewards.calibration.on_demand import OnTheSpot
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.combined import And, CombinedReward, Lowest, WeightedMean
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.table.reference_table import ReferenceTable

SIZES, ESTIMATORS = (4, 16, 64, 256), ("empirical", "posterior", "unbiased", "randomised")
# Each transform, and the procedure that it is for.
FOR = {"identity": "Standard()", "log": "BestOf(n=4)", "e^{10u}": "BestOf(n=4)", "-e^{-10u}": "WorstOf(n=4)"}
MISSING = PROMPTS[::3]
OTHER = RoundedScorer(seed=1)
WAYS = {"WeightedMean": WeightedMean(), "Lowest": Lowest(), "And": And()}
# The same in plain numpy, of the quantiles under both scorers.
FORMULAS = {
    "WeightedMean": lambda a, b: (a + b) / 2,
    "Lowest": np.minimum,
    "And": lambda a, b: np.log(a) + np.log(b),
}


@dataclass(frozen=True)
class LawSampler:
    """Draws from the reference policy's enumerated law."""

    here: World

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """One completion for each seed."""
        return [[self.one(prompt, seed) for seed in own] for prompt, own in zip(prompts, seeds, strict=True)]

    def one(self, prompt: str, seed: int) -> Rollout:
        """The completion of a seed."""
        law = self.here.exact.laws[PROMPTS.index(prompt)]
        return Rollout(self.here.texts[np.random.default_rng(seed).choice(len(law), p=law / law.sum())])


def drawn(here: World, scores: np.ndarray, size: int, seed: int, prompts: Any = PROMPTS) -> ReferenceTable:
    """A table of so many references of each prompt, drawn from the law."""
    rng = np.random.default_rng([seed, size])
    rows = [
        (p, rng.choice(s, size, p=law / law.sum())) for p, s, law in zip(PROMPTS, scores, here.exact.laws, strict=True)
    ]
    return ReferenceTable.build([row for row in rows if row[0] in prompts])


def lost(here: World, values: np.ndarray, best: np.ndarray, kl: float, procedure: str) -> dict[str, float]:
    """How far the optimum of some values is from that of the best ones: at its beta, and at its KL."""
    exact = here.exact
    beta = exact.beta(best, kl)
    there = exact.optimum(best, beta)
    rates = [exact.win_rates(each)[procedure] for each in (there, exact.at_kl(values, kl))]
    found = exact.optimum(values, beta)
    return {"tv": exact.distance(found, there), "kl": exact.kl(found), "missed": rates[0] - rates[1]}


def averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over draws, and the errors of the means."""
    names, n = rows[0], len(rows)
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    errors = {f"{name} ±": float(np.std([row[name] for row in rows]) / np.sqrt(max(n - 1, 1))) for name in names}
    return {**means, **errors, "draws": n}


def finite(here: World, name: str, size: int, estimator: Any, draws: int) -> dict[str, float]:
    """An estimator with K references."""
    found = []
    for seed in range(draws):
        table = drawn(here, here.exact.scores, size, seed)
        reward = CalibratedReward(here.scorer, table, TRANSFORMS[name], estimator=estimator)
        values = reward.from_scores(list(PROMPTS), here.exact.scores)
        found.append(lost(here, values, here.values(name), KLS[name], FOR[name]))
    return averaged(found)


def missing(here: World, name: str, what: str, draws: int) -> dict[str, float]:
    """A third of the prompts has no references: what is lost on those that have, and on those that have none."""
    have = [prompt for prompt in PROMPTS if prompt not in MISSING]
    chosen = here.values(name)
    exact, unknown = here.exact, np.isin(PROMPTS, MISSING)
    beta = exact.beta(chosen, KLS[name])
    there, rows = exact.optimum(chosen, beta), []
    for seed in range(draws):
        table = drawn(here, exact.scores, 64, seed, have)
        spot = OnTheSpot(None, LawSampler(here), here.scorer, k=64, seed=seed)
        reward = CalibratedReward(
            here.scorer, table, TRANSFORMS[name], on_missing=spot if what == "spot" else "neutral"
        )
        found = exact.optimum(reward.from_scores(list(PROMPTS), exact.scores), beta)
        apart = np.abs(found - there).sum(1) / 2
        rate = exact.win_rates(there)[FOR[name]] - exact.win_rates(found)[FOR[name]]
        split = {"tv known": float(apart[~unknown].mean()), "tv unknown": float(apart[unknown].mean())}
        rows.append({**split, "kl": exact.kl(found), "missed at this beta": rate})
    return averaged(rows)


def combination(here: World, way: str, size: int, draws: int) -> dict[str, float]:
    """Two scorers' quantiles made one: the optimum with K references of each, and with infinitely many."""
    best = combined_values(here, way)
    first, second = here.exact, World(OTHER).exact
    rows = []
    for seed in range(draws):
        reward = combined(here, way, size, seed)
        raw = {"first": first.scores, "second": second.scores}
        values = reward.from_scores(list(PROMPTS), raw)
        there, law = first.at_kl(best, 0.5), first.at_kl(values, 0.5)
        each = {
            f"missed, {name}": own.win_rates(there)["Standard()"] - own.win_rates(law)["Standard()"]
            for name, own in (("first", first), ("second", second))
        }
        gained = float((law * best).sum(1).mean() - (first.laws * best).sum(1).mean())
        share = gained / float(((there - first.laws) * best).sum(1).mean())
        rows.append({"tv": first.distance(law, there), **each, "share of the gain": share})
    both = {
        f"optimum, {n}": e.win_rates(first.at_kl(best, 0.5))["Standard()"]
        for n, e in (("first", first), ("second", second))
    }
    return {**averaged(rows), **both}


def combined_values(here: World, way: str) -> np.ndarray:
    """The combination of exact quantiles."""
    return np.asarray(FORMULAS[way](here.exact.quantiles, World(OTHER).exact.quantiles))


def combined(here: World, way: str, size: int, seed: int) -> CombinedReward:
    """The reward of two scorers, each with a table of its own."""
    scorers = {"first": here.scorer, "second": OTHER}
    tables = {n: drawn(here, here.scores(s), size, 2 * seed + i) for i, (n, s) in enumerate(scorers.items())}
    return CombinedReward({n: CalibratedReward(s, tables[n]) for n, s in scorers.items()}, WAYS[way])


def trained(here: World, label: str, draws: int) -> dict[str, Any]:
    """PPO on a reward of K = 16 references: how far it ends from that reward's optimum, and from the exact one."""
    name, estimator = label.split(", ")
    table = drawn(here, here.exact.scores, 16, 0)
    reward = CalibratedReward(here.scorer, table, TRANSFORMS[name], estimator=estimator)  # type: ignore[arg-type]
    exact, values = here.exact, reward.from_scores(list(PROMPTS), here.exact.scores)
    beta, model = exact.beta(here.values(name), KLS[name]), here.model()
    TRAINERS["PPO"](model, reward, beta, 0, 800 if draws > 2 else 20)
    got, own, best = laws(model), exact.optimum(values, beta), exact.optimum(here.values(name), beta)
    return {"tv to its own": exact.distance(got, own), "tv to the best": exact.distance(got, best), "kl": exact.kl(got)}


def cases(draws: int) -> dict[str, Any]:
    """What is asked, each with a name."""
    found: dict[str, Any] = {}
    for name in FOR:
        for estimator in ESTIMATORS:
            for size in SIZES:
                found[f"finite | {name} | {estimator} | {size}"] = partial(
                    finite, World(), name, size, estimator, draws
                )
        for what in ("neutral", "spot"):
            found[f"missing | {name} | {what} | 64"] = partial(missing, World(), name, what, max(1, draws // 10))
    for way in WAYS:
        for size in SIZES:
            found[f"combined | {way} | empirical | {size}"] = partial(combination, World(), way, size, draws)
    for label in ("e^{10u}, empirical", "e^{10u}, posterior"):
        found[f"trained | {label.replace(', ', ' | ')} | 16"] = partial(trained, World(), label, draws)
    return found


def main() -> None:
    """All that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case of each kind, two draws, nothing is kept")
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = cases(2 if args.quick else args.draws)
    if args.quick:
        asked = dict({name.split(" | ")[0]: (name, case) for name, case in asked.items()}.values())
    rows = [] if args.quick else known("tabular_options")
    done = {row["case"] for row in rows}
    for name, case in tqdm([each for each in asked.items() if each[0] not in done], delay=3, disable=None):
        rows.append({"case": name, **case()})
        tqdm.write(str(rows[-1]), file=sys.stderr)
        if not args.quick:
            save("tabular_options", rows)


if __name__ == "__main__":
    main()
