"""Tiny random models for `demo --quick`: a policy, a reward model and a judge of two layers, with a token per letter.

They show in seconds, and without a download, that the parts fit together. What they write means nothing.
"""

import copy
import string
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase + " :."
END = "</s>"


def make_config() -> Any:
    """Configure a Llama of two layers, 32 wide."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(LETTERS) + 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return cast(Any, LlamaConfig)(**shape, **ids, max_position_embeddings=128, num_labels=1)


def save_policy(folder: Path) -> None:
    """Save a model that prefers some letters."""
    torch.manual_seed(0)
    model: Any = cast(Any, LlamaForCausalLM)(make_config())
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    save(model, folder)


def save_reward_models(folder: Path) -> None:
    """Save a reward model, and a judge that mostly agrees with it."""
    torch.manual_seed(1)
    model: Any = cast(Any, LlamaForSequenceClassification)(make_config())
    with torch.no_grad():
        model.score.weight.normal_()
        judge = copy.deepcopy(model)
        judge.score.weight.add_(torch.randn_like(judge.score.weight), alpha=0.5)
    save(model, folder / "reward-model")
    save(judge, folder / "judge")


def make_prompts(count: int) -> list[str]:
    """Make different prompts, up to 676."""
    return [f"{first}{second}: " for first in string.ascii_lowercase for second in string.ascii_lowercase][:count]


def save(model: Any, folder: Path) -> None:
    """Save a model with a tokenizer that has a token for each letter and one for the end."""
    vocabulary = {END: 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=backend, eos_token=END, pad_token=END, padding_side="left"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
