"""The files of a small training run, which the tests of the command `train` share."""

import json
from pathlib import Path

import pytest
import tiny

from calibrated_rewards import CalibratedReward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers import load_scorer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model, prompts with ids, and a calibrated reward, all saved."""
    root = tmp_path_factory.mktemp("recipes")
    tiny.saved(tiny.causal(), root / "policy", tiny.tokenizer())
    tiny.saved(tiny.classifier(), root / "rm", tiny.tokenizer())
    rows = [{"prompt": prompt, "prompt_id": i} for i, prompt in enumerate(tiny.texts(3))]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    draw = load_sampler(root / "policy", Decoding(5, temperature=0.9), dtype="float32")
    scorer = load_scorer(root / "rm", dtype="float32")
    table = calibrate(root / "prompts.jsonl", draw, scorer, k=4, out=root / "run")
    CalibratedReward(scorer, table, id_column="prompt_id", beta=0.3).save_pretrained(root / "reward")
    return Path(root)
