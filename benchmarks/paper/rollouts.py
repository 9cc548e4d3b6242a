"""The real rollouts behind the paper's figures: a calibration with two reward models, made if it is missing.

SmolLM2-135M-Instruct goes on from the first words of held-out movie reviews, 4 tokens at temperature 0.8, in float32.
"reward" is a MiniLM trained on 1,500 texts with human ratings and "judge" another one on as many others. The
calibration lies in the demo's cache, or wherever `--rollouts` says: directories of `calibrate` with these two scorers,
whose prompts are put together.

    python benchmarks/paper/rollouts.py                           # minutes: 96 prompts, 64 rollouts each
    python benchmarks/paper/rollouts.py --prompts 420 --k 48      # the prompts and seeds of the committed figures

Those were made from two calibrations, "dev" (the first 120 of these prompts) and "test" (the other 300).

The optimum for any reward at a KL is the rollouts with weights: what training would reach if it found the optimum.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))

from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.references import read_scores

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
FIRST, TOKENS, TEXTS, SEED = 384, 4, 1500, 1


def parser(about: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that say which rollouts are read."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cache", type=Path, default=CACHE, help="of models, ratings and the calibration")
    options.add_argument("--rollouts", type=Path, nargs="+", help="calibrations with scores of reward and judge")
    options.add_argument("--prompts", type=int, default=96, help="of the calibration that is made")
    options.add_argument("--k", type=int, default=64, help="rollouts of a prompt")
    return options


def find_rollouts(options: Any) -> list[Path]:
    """Return the calibrations' directories; calibrate if none is given and none is in the cache."""
    if options.rollouts:
        return list(options.rollouts)
    folder: Path = options.cache.expanduser() / f"paper-rollouts-{options.prompts}x{options.k}"
    if not all((folder / name / "table.json").is_file() for name in ("reward", "judge")):
        import torch
        from calibrate import run

        from calibrated_rewards.cli.demo.reward_models import make_prompts

        prompts = make_prompts(options.cache, FIRST + options.prompts)[FIRST:]
        run(options.cache, prompts, folder, options.k, TEXTS, SEED, tokens=TOKENS, dtype=torch.float32)
    return [folder]


def describe(samples: Samples) -> dict[str, Any]:
    """Say how many rollouts there are, for the JSON."""
    return {"prompts": len(samples), "rollouts of a prompt": int(samples.sizes.min()), "tokens": TOKENS}


def load_samples(options: Any) -> Samples:
    """Read the scores of reward, which selects, and of the judge."""
    parts = [read_scores(folder, "reward", "judge") for folder in find_rollouts(options)]
    return Samples([row for part in parts for row in part.select], [row for part in parts for row in part.judge])


def main() -> None:
    """Make the calibration, and say where it is."""
    options = parser(__doc__).parse_args()
    print(*find_rollouts(options), load_samples(options))


if __name__ == "__main__":
    main()
