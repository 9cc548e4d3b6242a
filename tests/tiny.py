"""Tiny real models and tokenizers, built from configs: no download, and small enough for one thread."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>", "[SEP]"]
VOCABULARY = 256 + len(SPECIALS)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, template: str | None = TEMPLATE, bos: bool = True, side: str = "right", **options: Any) -> Any:
    """One token a byte, with special tokens; it puts BOS first where asked to add special tokens."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A [SEP] $B:1", special_tokens=[("<s>", BOS), ("[SEP]", 7)]
        )
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **specials)
    made.chat_template = template
    return made


def config(**options: Any) -> LlamaConfig:
    """A Llama of two layers, 32 wide."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaConfig(**{**small, **ids, "max_position_embeddings": 512, "num_labels": 1, **options})


def classifier(seed: int = 0, **options: Any) -> LlamaForSequenceClassification:
    """A Llama with a classification head whose scores spread: a fresh head gives nearly the same to all."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config(**options)).eval()
    with torch.no_grad():
        model.score.weight.normal_(std=1.0)
    return model


def causal(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A Llama that writes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**options)).eval()


def saved(model: Any, folder: Path, tokenizer: Any) -> str:
    """A checkpoint as `from_pretrained` reads it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Words of random letters, of many lengths."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), rng.integers(1, longest))) for _ in range(n)]
