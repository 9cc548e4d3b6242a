"""Samplers: K completions of the reference policy for each prompt. A plain function of prompts and seeds is one.

`protocol.py` has `Decoding`, `Rollout`, the protocol and `sample`, which calls any sampler. `loading.py` has
`load_sampler`, which loads a policy (`policy.py`) into an engine: transformers (`hf.py`, which writes by `writer.py`,
`generation.py` and `drawing.py`), its continuous batching (`continuous.py`), or vLLM (`vllm.py`, `vllm_engine.py`).
`openai.py` asks a server. `reranking.py` has `Reranked`, the best of N of a sampler as a sampler, and
`completions_file.py` writes completions to a file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.samplers.protocol import (
    Decoding as Decoding,
    Rollout as Rollout,
    Sampler as Sampler,
    sample as sample,
)

if TYPE_CHECKING:
    from calibrated_rewards.samplers.completions_file import write_completions as write_completions
    from calibrated_rewards.samplers.continuous import ContinuousSampler as ContinuousSampler
    from calibrated_rewards.samplers.hf import HfSampler as HfSampler
    from calibrated_rewards.samplers.loading import load_sampler as load_sampler, share_model as share_model
    from calibrated_rewards.samplers.openai import OpenAISampler as OpenAISampler
    from calibrated_rewards.samplers.reranking import Choice as Choice, Reranked as Reranked
    from calibrated_rewards.samplers.vllm import VllmSampler as VllmSampler

# Imported at their first use: they bring heavy libraries.
LAZY = {
    "load_sampler": "loading",
    "share_model": "loading",
    "HfSampler": "hf",
    "OpenAISampler": "openai",
    "VllmSampler": "vllm",
    "ContinuousSampler": "continuous",
    "Choice": "reranking",
    "Reranked": "reranking",
    "write_completions": "completions_file",
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
