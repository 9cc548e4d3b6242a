"""Language model, reward model and judge in miniature, made on the spot: random weights, two layers, a letter a token.

What they write means nothing. They are for seeing, in seconds and without a download, that the parts fit together.
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


def tokenizer() -> Any:
    """A token a letter, and the one that ends a text."""
    vocabulary = {END: 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=backend, eos_token=END, pad_token=END, padding_side="left"
    )


def config() -> Any:
    """Two layers, 32 wide."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(LETTERS) + 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return cast(Any, LlamaConfig)(**shape, **ids, max_position_embeddings=128, num_labels=1)


def policy(folder: Path) -> None:
    """Save a model that likes some letters better than others."""
    torch.manual_seed(0)
    model: Any = cast(Any, LlamaForCausalLM)(config())
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    _save(model, folder)


def reward_models(folder: Path) -> None:
    """Save a reward model, and a judge that is mostly of its opinion."""
    torch.manual_seed(1)
    model: Any = cast(Any, LlamaForSequenceClassification)(config())
    with torch.no_grad():
        model.score.weight.normal_()
        judge = copy.deepcopy(model)
        judge.score.weight.add_(torch.randn_like(judge.score.weight), alpha=0.5)
    _save(model, folder / "reward-model")
    _save(judge, folder / "judge")


def prompts(count: int) -> list[str]:
    """So many different ones."""
    return [f"{first}{second}: " for first in string.ascii_lowercase for second in string.ascii_lowercase][:count]


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
