"""The reference policy of the experiments: SmolLM2-135M-Instruct in bfloat16, and how completions are drawn from it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrated_rewards.cli.demo.assets import fetch_language_model
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding

DECODING = Decoding(max_tokens=24, temperature=0.8)


def policy(cache: Path) -> Any:
    """The model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(fetch_language_model(cache), dtype=torch.bfloat16).to(device).eval()


def sampler(cache: Path, **options: Any) -> HfSampler:
    """What draws from it."""
    return HfSampler(policy(cache), AutoTokenizer.from_pretrained(fetch_language_model(cache)), DECODING, **options)
