"""The reference policy of the experiments: SmolLM2-135M-Instruct in bfloat16, and how completions are drawn from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrated_rewards.cli.demo.assets import fetch_language_model
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding

DECODING = Decoding(max_tokens=24, temperature=0.8)


def policy(cache: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(fetch_language_model(cache), dtype=dtype).to(device).eval()


def sampler(
    cache: Path, tokens: int = DECODING.max_tokens, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> HfSampler:
    """What draws from it, so many tokens at most."""
    tokenizer, decoding = (
        AutoTokenizer.from_pretrained(fetch_language_model(cache)),
        replace(DECODING, max_tokens=tokens),
    )
    return HfSampler(policy(cache, dtype), tokenizer, decoding, **options)
