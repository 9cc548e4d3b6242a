"""A tokenizer with a token a word, and models whose weights make some words much likelier than others."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calibrated_rewards.samplers.protocol import Rollout

WORDS = 24


def words(size: int = WORDS) -> Any:
    """A token a word, so that a text tells its tokens."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0")


def spread(model: Any, seed: int = 0) -> Any:
    """Weights that make some tokens much likelier than others: fresh ones give nearly the same to all."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
    return model.eval()


def ids_of(rollout: Rollout, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that were drawn, the end included."""
    return (*tokenizer(rollout.completion)["input_ids"], *([0] if rollout.finish == "stop" else []))
