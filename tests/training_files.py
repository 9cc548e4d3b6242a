"""Files of small runs of `train offline` and `train head`, and their command lines, which several tests share."""

import json
from pathlib import Path

import enumerable
import tiny
import torch

from calibrated_rewards import CalibratedReward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.testing.suites import HashScorer

PROMPTS = ["a", "bc", "d", "efg", "cc", "ab", "fe", "gg", "ddd", "eb", "fd", "ca"]
TEMPERATURE, TOKENS, BETA = 0.8, 5, 0.3
# A run of 16 steps, of two prompts each: 8 prompts, of which each comes four times, and 4 that are held out.
SMALL = (
    "--layers 0 --epochs 4 --prompts-a-step 2 --completions 6 --held-out 0.3 --check-steps 3 --save-steps 2 --lr 0.1"
)
TEMPLATES = {"even": {"prompt": "Even? {question}", "answers": ["even", "odd"], "chat": True}}


def write_offline_files(root: Path) -> Path:
    """A policy with a token a letter, its calibration, and the reward, without a model."""
    model = tiny.causal(vocab_size=1 + enumerable.LETTERS, eos_token_id=0, pad_token_id=0, bos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    tiny.saved(model, root / "policy", enumerable.tokenizer())
    decoding = Decoding(TOKENS, TEMPERATURE)
    sampler = HfSampler(model, enumerable.tokenizer(), decoding, show_progress=False)
    table = calibrate(PROMPTS, sampler, HashScorer(), k=8, out=root / "table", show_progress=False)
    CalibratedReward(HashScorer(), table, beta=BETA).save_pretrained(root / "reward")
    return root


def offline_command(files: Path, out: Path, *more: str) -> list[str]:
    """The command of a small run of `train offline`."""
    named = {"policy": files / "policy", "reward": files / "reward", "rollouts": files / "table", "out": out}
    return ["train", "offline", *(word for name, path in named.items() for word in (f"--{name}", str(path))), *more]


def write_head_files(root: Path) -> Path:
    """A policy, pairs of two tasks, and templates."""
    tiny.saved(tiny.causal(), root / "policy", tiny.tokenizer())
    words = sorted(set(tiny.texts(40, seed=1, longest=10)))
    rows = [{"prompt": word, "chosen": f"{word}!", "rejected": f"{word}?"} for word in words]
    (root / "marks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [{"question": word, "label": len(word) % 2} for word in words]
    (root / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (root / "templates.json").write_text(json.dumps(TEMPLATES))
    return root


def head_command(files: Path, out: Path, *options: str) -> list[str]:
    """The command line of a short run of `train head`."""
    pairs = [f"marks={files / 'marks.jsonl'}", f"even={files / 'even.jsonl'}"]
    usual = ["--templates", str(files / "templates.json"), "--pairs-a-step", "8", "--held-out", "0.25", "--steps", "6"]
    return ["train", "head", "--policy", str(files / "policy"), "--pairs", *pairs, "--out", str(out), *usual, *options]
