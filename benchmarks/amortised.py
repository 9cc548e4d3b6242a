"""Predicted reference quantiles of unseen prompts: how far off they are, and how many rollouts that is worth.

    python benchmarks/amortised.py              # known distributions; some minutes
    python benchmarks/amortised.py --quick      # a look
    python benchmarks/amortised.py --table RUN_DIRECTORY --model REWARD_MODEL [--kind KIND]    # a calibration of yours

Known: a prompt has 8 hidden numbers, of which 512 features are a bent and noisy image, as hidden states are. Its scores
have a location (a part of it bent, and a part with standard deviation 0.2 that no feature tells), a scale around 0.5,
and a skew, all of which depend on the hidden numbers; so the true quantile u* of any score is known. Errors are mean
|u - u*| over 64 scores of each of 500 fresh prompts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from environment import save
from scipy.special import ndtr, ndtri

from calibrated_rewards.calibration.prediction import fit
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.table.reference_table import ReferenceTable

HIDDEN, WIDTH, NOISE, UNTOLD = 8, 512, 0.5, 0.2
FRESH, GROUP = 500, 64
IMAGE = np.random.default_rng(0).normal(size=(HIDDEN, WIDTH)) / np.sqrt(HIDDEN)
# Prompts learnt from, and references of each.
CASES = [(100, 100), (500, 100), (2000, 100), (2000, 16), (8000, 16)]
OWN = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class World:
    """Prompts with their features and their distributions of scores."""

    features: np.ndarray
    told: np.ndarray
    location: np.ndarray
    scale: np.ndarray
    skew: np.ndarray
    seed: int

    @property
    def prompts(self) -> list[str]:
        """A name for each."""
        return [f"{self.seed}: {i}" for i in range(len(self.location))]

    def scores(self, k: int, seed: int) -> np.ndarray:
        """K scores a prompt, of a sinh-arcsinh distribution."""
        drawn = np.random.default_rng(seed).normal(size=(len(self.location), k))
        bent = np.sinh(np.arcsinh(drawn) + self.skew[:, None]) / np.cosh(self.skew[:, None])
        return self.location[:, None] + self.scale[:, None] * bent

    def cdf(self, scores: np.ndarray) -> np.ndarray:
        """The quantile of each score, exactly."""
        bent = (scores - self.location[:, None]) / self.scale[:, None] * np.cosh(self.skew[:, None])
        return ndtr(np.sinh(np.arcsinh(bent) - self.skew[:, None]))


def world(prompts: int, seed: int) -> World:
    """Other prompts for each seed, from one way to make features and distributions of hidden numbers."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(prompts, HIDDEN))
    features = np.tanh(h @ IMAGE) + NOISE * rng.normal(size=(prompts, WIDTH))
    told = 0.8 * h[:, 0] + 0.3 * np.cos(2 * h[:, 1])
    location, scale = told + UNTOLD * rng.normal(size=prompts), 0.5 * np.exp(0.3 * h[:, 2])
    return World(features.astype(np.float32), told, location, scale, 0.6 * np.tanh(2 * h[:, 3]), seed)


@dataclass(frozen=True)
class Written:
    """The features that were made with the prompts."""

    rows: dict[str, np.ndarray]

    def __call__(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """A row for each prompt."""
        return np.array([self.rows[str(prompt)] for prompt in prompts])


def learnt(prompts: int, k: int, fresh: World, asked: np.ndarray) -> dict[str, Any]:
    """A fit on so many prompts with so many references, what it says of itself, and its errors on fresh prompts."""
    seen = world(prompts, 1)
    pairs = [pair for each in (seen, fresh) for pair in zip(each.prompts, each.features, strict=True)]
    table = ReferenceTable.build(zip(seen.prompts, seen.scores(k, 2), strict=True))
    began, used = time.perf_counter(), time.process_time()
    found = fit(table, seen.prompts, Written(dict(pairs)))
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    pooled = np.sort(seen.scores(k, 2), axis=None)
    exact, u = fresh.cdf(asked), found.cdf(fresh.prompts, asked)
    error = float(np.abs(u - exact).mean())
    pooled_error = float(np.abs(np.searchsorted(pooled, asked) / pooled.size - exact).mean())
    print(f"\n{prompts} prompts, K = {k}: {seconds:.0f} s\n{found.errors}")
    print(f"fresh prompts: |u - u*| {error:.3f}; with one distribution for all {pooled_error:.3f}")
    return {
        "prompts": prompts,
        "k": k,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "fresh": {"u": error, "u_pooled": pooled_error},
        "report": found.errors.as_json(),
    }


def own(fresh: World, asked: np.ndarray) -> dict[int, float]:
    """The same error with K rollouts of the prompt itself, by the quantile of Eq. 12."""
    exact, errors = fresh.cdf(asked), {}
    for k in OWN:
        references = np.sort(fresh.scores(k, 4), axis=1)
        u = np.array([np.searchsorted(row, scores) / k for row, scores in zip(references, asked, strict=True)])
        errors[k] = float(np.abs(u - exact).mean())
    return errors


def known(cases: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """All cases, and what rollouts of the prompts themselves would give."""
    fresh = world(FRESH, 3)
    asked = fresh.scores(GROUP, 5)
    rollouts, exact = own(fresh, asked), fresh.cdf(asked)
    # Who knew all but what no feature tells would say the mean quantile over that.
    shifts = UNTOLD * ndtri((np.arange(50) + 0.5) / 50)
    best = np.mean([replace(fresh, location=fresh.told + shift).cdf(asked) for shift in shifts], axis=0)
    least = float(np.abs(best - exact).mean())
    print(f"|u - u*| of who knew all that features can tell: {least:.3f}")
    print("|u - u*| with rollouts of one's own:", ", ".join(f"{k}: {error:.3f}" for k, error in rollouts.items()))
    return {"own_rollouts": rollouts, "best_possible": least, "learnt": [learnt(*case, fresh, asked) for case in cases]}


def real(table: Path, model: str, kind: str | None) -> dict[str, Any]:
    """The report of a fit on a calibrated directory, with the states of its reward model as features."""
    from calibrated_rewards.calibration.prediction.prompt_features import PromptFeatures
    from calibrated_rewards.calibration.run_directory import RunDirectory
    from calibrated_rewards.scorers import load_scorer

    run = RunDirectory(table)
    prompts = [planned.prompt for name in run.names() for planned in run.prompts(name)]
    began = time.perf_counter()
    found = fit(ReferenceTable.load(table), prompts, PromptFeatures(load_scorer(model, kind=kind)))
    seconds = time.perf_counter() - began
    print(f"{found.errors}\n{seconds:.0f} s, the features' included")
    return {"k": found.k, "seconds": round(seconds, 1), "report": found.errors.as_json()}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--kind", help="the kind of reward model, as load_scorer takes it")
    args = parser.parse_args()
    if args.table:
        print(save("amortised_real", real(args.table, args.model, args.kind)))
    elif args.quick:
        known(CASES[:1])
    else:
        print(save("amortised", known(CASES)))


if __name__ == "__main__":
    main()
