"""A whole experiment as `calibrated-rewards demo` leaves one, in a second: samplers and scorers without models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from calibrated_rewards import BestOf, CalibratedReward, WorstOf
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.evaluation import check_log_ratios
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.held_out_results import compare_held_out
from calibrated_rewards.evaluation.objectives import OBJECTIVES
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.theory.optimum import Optimal
from calibrated_rewards.theory.transforms import Affine, Chain

NASTY = "<script>alert('prompt')</script> & \"quotes\""
PROMPTS = [NASTY, [{"role": "user", "content": "Rate <b>this</b> café"}], *(f"Prompt number {i}" for i in range(22))]
SAID = "<img src=x onerror=alert(2)> I say"


@dataclass(frozen=True)
class Shifted:
    """A policy whose numbers are higher than the reference's by so much."""

    by: float

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """The reference's, moved."""
        drawn = NumberSampler()(prompts, seeds)
        return [[Rollout(f"{SAID} {float(r.completion) + self.by:.4f}", 9, "stop") for r in own] for own in drawn]

    def fingerprint(self) -> dict[str, Any]:
        """How far."""
        return {"kind": "shifted", "by": self.by}


@dataclass(frozen=True)
class Noisy:
    """A judge: the number, and as much noise."""

    def __call__(self, prompts: Any, completions: Any, /) -> np.ndarray:
        """The score of each pair."""
        return NumberScorer()(prompts, completions) + HashScorer(5)(prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        """What it is."""
        return {"kind": "noisy number", "name": "judges/<noisy>"}


@dataclass(frozen=True)
class ShiftKL:
    """The KL of normals that are `by` apart."""

    by: float

    def __call__(self, prompts: Any, rollouts: Any) -> list[list[tuple[float, bool]]]:
        """The same for each completion."""
        return [[(self.by**2 / 2, True) for _ in own] for own in rollouts]

    def fingerprint(self) -> dict[str, Any]:
        """How far."""
        return {"kind": "shift", "by": self.by}


SCORERS = {"reward": NumberScorer(), "judge": Noisy()}


def make(at: Path, k: int = 24, m: int = 8) -> Path:
    """All of it."""
    tables = calibrate(PROMPTS, NumberSampler(), SCORERS, at / "table", k=k, show_progress=False)
    best = Chain(Optimal(BestOf(4), beta=0.2), Affine(2.0))
    CalibratedReward(NumberScorer(), tables["reward"], best, beta=0.4).save_pretrained(at / "reward")
    both = rollout_scores(at / "table", k)
    arms = {name: OBJECTIVES[name] for name in ("raw", "identity", "exp:10")}
    estimate_frontier(Samples(both["reward"], both["judge"]), arms, kls=[0.5, 1.0]).save(at / "frontier.json")
    calibrated = {"kind": "calibrated", "transform": repr(best)}
    for name, said, rise in (("calibrated", calibrated, 0.01), ("raw", {"kind": "raw"}, 0.008)):
        train(at / name, said, rise)
    compare(at)
    policies = {"calibrated": Shifted(1.0), "raw": Shifted(0.9)}
    divergence = {name: ShiftKL(policy.by) for name, policy in policies.items()}
    evaluate(
        policies, NumberSampler(), PROMPTS, SCORERS, at / "evaluation", m=m, divergence=divergence, show_progress=False
    )
    return at


def compare(at: Path) -> None:
    """Both policies on the same held-out rollouts, of which one is ahead under worst of 4."""
    rng = np.random.default_rng(1)
    u = rng.random((30, 12))
    rows = {"raw": 0.5 * u - 0.26, "calibrated": 1.5 * u - 0.84}
    compare_held_out(rows, Samples(u, u + 0.1 * rng.normal(size=u.shape)), [WorstOf(4), BestOf(2)]).save(
        at / "held_out.json"
    )


def rollout_scores(run: Path, k: int) -> dict[str, np.ndarray]:
    """Every rollout's score by each scorer, prompts by k."""
    columns = [pq.read_table(path) for path in sorted((run / "rollouts").glob("*.parquet"))]
    return {
        name: np.concatenate([table.column(f"score:{name}").to_numpy() for table in columns]).reshape(-1, k)
        for name in SCORERS
    }


def train(at: Path, reward: dict[str, str], rise: float, steps: int = 30) -> None:
    """A run that was killed as it wrote its last line."""
    at.mkdir(parents=True)
    rng = np.random.default_rng(round(1e4 * rise))
    rows = [
        {"step": i, "reward": i / steps, "u": 0.5 + rise * i + rng.normal(0, 0.03), "kl": i / 60, "seconds": 2.0}
        for i in range(steps)
    ]
    d = 0.5 * rng.normal(size=(12, 10)) - 0.125
    check = check_log_ratios(d, Samples(d + rng.normal(size=d.shape)), 2 * d).metrics()
    lines = [json.dumps({**row, "seconds_scoring": 0.5, **(check if row["step"] % 10 == 9 else {})}) for row in rows]
    (at / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "rew')
    settings = {"recipe": "train_rloo", "policy": "<policy>", "reward": reward, "settings": {"beta": 0.125}}
    (at / "settings.json").write_text(json.dumps(settings))
