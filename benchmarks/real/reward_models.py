"""How well the demo's reward model and its judge do on what neither has read.

    python benchmarks/real/reward_models.py                # minutes, the first time: an epoch of MiniLM for each
    python benchmarks/real/reward_models.py --texts 3000   # as the demo has them

Writes benchmarks/results/real_reward_models.json (or real_reward_models_<texts>.json); the models stay in the cache.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.cli.demo.assets import CACHE, Rated
from calibrated_rewards.cli.demo.reward_models import split_ratings, train_judge, train_reward_model
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score


def load(folder: Path, **options: Any) -> Any:
    """A reward model as a scorer that reads one text."""
    return load_scorer(folder, kind="sequence-classifier", **options)


def agreement(given: Any, rated: list[Rated]) -> dict[str, float]:
    """Correlation with the mean ratings, and how often the sign is theirs."""
    wanted = np.array([each.rating for each in rated])
    return {
        "pearson": float(np.corrcoef(given, wanted)[0, 1]),
        "spearman": float(stats.spearmanr(given, wanted).statistic),
        "sign_accuracy": float((np.sign(given) == np.sign(wanted)).mean()),
    }


def main() -> None:
    """Train both, and see how they do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--texts", type=int, help="that each learns from, if not all of its half")
    args = parser.parse_args()
    logging.disable_progress_bar()
    parts = split_ratings(args.cache)
    openings, texts = [rated.opening for rated in parts.held_out], [rated.text for rated in parts.held_out]
    results: dict[str, Any] = {"held_out": len(texts)}
    given = []
    for name, make in (("reward_model", train_reward_model), ("judge", train_judge)):
        folder = make(args.cache, args.texts)
        given.append(score(load(folder), openings, texts))
        how = json.loads((folder / "trained.json").read_text())
        results[name] = {**how, **agreement(given[-1], parts.held_out)}
        print(name, results[name])
    results["pearson_between"] = float(np.corrcoef(*given)[0, 1])
    print("between them", results["pearson_between"])
    print(save("real_reward_models" if args.texts is None else f"real_reward_models_{args.texts}", results))


if __name__ == "__main__":
    main()
