"""The exact world: a language model with 12 prompts of 211 completions each, scorers whose scores tie, transforms.

    python benchmarks/tabular/world.py        # what the world is like, and what theory says of it: tabular_world.json

The model has its own logits in every context (tests/enumerable.py), so that it can be any law. Win rates, KL and optima
are enumerated in plain numpy (tests/exact.py). Scores are rounded, so that they tie, and their scale is another one for
each prompt, from 1/4 to 4, as a reward model's may be: what is calibrated does not notice, the raw reward does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import enumerable
from environment import save
from exact import Exact

from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, Standard, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, NormalQuantile, Transform

# None begins another one; of several lengths, so that batches are padded.
PROMPTS = ("a", "ba", "bb", "bc", "cad", "cbe", "d", "ea", "ebg", "f", "ga", "gbc")
LENGTH, LETTERS, SKEW = 2, 14, 2.0
REFERENCES = 50_000
SCALES = dict(zip(PROMPTS, np.geomspace(0.25, 4, len(PROMPTS)).tolist(), strict=True))
TRANSFORMS: dict[str, Transform] = {
    "identity": Identity(),
    "log": Log(),
    "e^{5u}": Exponential(5.0),
    "e^{10u}": Exponential(10.0),
    "-e^{-10u}": Exponential(-10.0),
    "best of 4": optimum(BestOf(4), kl=0.5).transform,
    "worst of 4": optimum(WorstOf(4), kl=0.25).transform,
}
# What the trainers are asked for. With transforms for worst-of-n a larger KL has a beta far below the reward's spread.
KLS = {name: 0.25 if name in ("-e^{-10u}", "worst of 4") else 0.5 for name in TRANSFORMS}
PROCEDURES = {repr(each): each for each in (Standard(), BestOf(4), WorstOf(4), RewindAndRepeat())}


def known(name: str) -> list[dict[str, Any]]:
    """Read the results that earlier runs of a script wrote; none if it has not run."""
    path = Path(__file__).resolve().parents[1] / "results" / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


@dataclass(frozen=True)
class RoundedScorer:
    """A reward model whose scores are a multiple of a step, times the prompt's own scale."""

    seed: int = 0
    step: float = 0.2

    def __call__(self, prompts: Any, completions: Any, /) -> np.ndarray:
        """A score for each pair."""
        each = np.round(HashScorer(self.seed)(prompts, completions) / self.step) * self.step
        return (each * np.array([SCALES[prompt] for prompt in prompts])).astype(np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """All there is."""
        return {"kind": "rounded", "seed": self.seed, "step": self.step}


@dataclass(frozen=True)
class World:
    """The reference policy's laws and a scorer's scores, over all completions."""

    scorer: RoundedScorer = RoundedScorer()

    @cached_property
    def texts(self) -> list[str]:
        """The completions as text."""
        return [enumerable.text(ids) for ids in enumerable.completions(LENGTH, LETTERS)]

    def model(self) -> Any:
        """The reference policy, new."""
        return enumerable.Tabular(LENGTH, skew=SKEW, prompts=PROMPTS, letters=LETTERS)

    @cached_property
    def exact(self) -> Exact:
        """All that is enumerated."""
        return Exact(laws(self.model()), self.scores(self.scorer))

    def scores(self, scorer: Any) -> np.ndarray:
        """Any scorer's, of all completions."""
        return np.array([scorer([prompt] * len(self.texts), self.texts) for prompt in PROMPTS])

    def table(self, prompts: Any = PROMPTS, scorer: Any = None) -> ReferenceTable:
        """References in the proportions of the law, by largest remainders: nothing is left to sampling."""
        scores = self.exact.scores if scorer is None else self.scores(scorer)
        rows = zip(PROMPTS, scores, counts(self.exact.laws), strict=True)
        return ReferenceTable.build((prompt, np.repeat(row, n)) for prompt, row, n in rows if prompt in prompts)

    def values(self, name: str) -> np.ndarray:
        """The rewards of all completions."""
        return valued(self.exact, TRANSFORMS[name])


def valued(exact: Exact, transform: Transform | None) -> np.ndarray:
    """Phi(C) of each completion, on the scale that CalibratedReward has by default; the raw score without a Phi."""
    if transform is None:
        return np.asarray(exact.scores, np.float64)
    return np.asarray(scaled(transform, "unit")(exact.quantiles))


def laws(model: Any) -> np.ndarray:
    """A policy's laws of the completions of each prompt."""
    return np.array([enumerable.law(model, prompt, LENGTH) for prompt in PROMPTS])


def counts(chances: np.ndarray) -> np.ndarray:
    """So many references a prompt in these proportions, by largest remainders."""
    whole = np.floor(chances * REFERENCES).astype(int)
    order = np.argsort(whole - chances * REFERENCES, axis=1, kind="stable")
    for row, best, left in zip(whole, order, REFERENCES - whole.sum(axis=1), strict=True):
        row[best[:left]] += 1
    return whole


def fine(completions: int = 20_000) -> Exact:
    """A world of many completions, each of them rare, without ties, whose raw scores have the same scales."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(len(PROMPTS), completions)) * np.array([*SCALES.values()])[:, None]
    return Exact(rng.dirichlet(np.ones(completions), len(PROMPTS)), scores)


def rewards(kl: float) -> dict[str, Transform | None]:
    """What is compared at a KL: the optima are those for it. None is the raw score."""
    best = {"best of 4": optimum(BestOf(4), kl=kl).transform, "worst of 4": optimum(WorstOf(4), kl=kl).transform}
    return {**TRANSFORMS, **best, "raw": None}


def predicted(transform: Transform | None, kl: float) -> dict[str, float]:
    """What theory says, of a continuous world; raw scores that are normal have a KL of scale^2 / (2 beta^2) each."""
    if transform is not None:
        beta = beta_for_kl(transform, kl)
        return {key: win_rate(transform, beta, each) for key, each in PROCEDURES.items()}
    scales = np.array([*SCALES.values()])
    betas = (np.sqrt((scales**2).mean() / (2 * kl)) / scales).tolist()
    means = {key: [win_rate(NormalQuantile(), beta, each) for beta in betas] for key, each in PROCEDURES.items()}
    return {key: float(np.mean(rates)) for key, rates in means.items()}


def compared(exact: Exact, kl: float) -> list[dict[str, Any]]:
    """Each reward's optimum at one KL: enumerated win rates, and what the continuous theory says."""
    found = []
    for name, transform in rewards(kl).items():
        own = exact.at_kl(valued(exact, transform), kl)
        spread = float(exact.kl_by_prompt(own).std())
        rates = {"exact": exact.win_rates(own), "theory": predicted(transform, kl)}
        found.append({"reward": name, "kl": kl, "spread": spread, **rates})
    return found


def main() -> None:
    """What the world is like, and the optima side by side: with ties, and in a fine-grained world without."""
    results: dict[str, Any] = {}
    for label, exact in {"the world": World().exact, "fine": fine()}.items():
        mass = exact.by_level(exact.laws)
        about = {
            "completions": exact.laws.shape[1],
            "likeliest completion": exact.laws.max(),
            "rarest completion": exact.laws.min(),
            "levels": (mass > 0).sum(1).mean(),
            "chance of a tie": (mass**2).sum(1).mean(),
        }
        rows = [row for kl in (0.25, 0.5, 1.0) for row in compared(exact, kl)]
        results[label] = {"about": {key: float(value) for key, value in about.items()}, "optima": rows}
        print(results[label]["about"])
        for row in rows:
            told = (f"{value:.4f} ({row['theory'][key]:.4f})" for key, value in row["exact"].items())
            print(f"{row['kl']:4} {row['reward']:<10} ±{row['spread']:.2f}", *told)
    save("tabular_world", results)


if __name__ == "__main__":
    main()
