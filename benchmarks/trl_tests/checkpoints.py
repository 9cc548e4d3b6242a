"""Tiny checkpoints and datasets under the names that TRL's tests load from the Hub, built from configs, offline.

    python benchmarks/trl_tests/checkpoints.py CHECKOUT FOLDER

Writes `FOLDER/trl-internal-testing/...`. A process whose working directory is FOLDER then finds
`from_pretrained("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5")` and `load_dataset("trl-internal-testing/zen", ...)`
on disk. Chat templates and the dataset's rows come from the checkout itself. Models that read images are not built.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ORGANIZATION = "trl-internal-testing"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320
SMALL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# What the tests load: the config's class, its options, and the checkout's chat template.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}, "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", {"num_labels": 1}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("Qwen3", {"head_dim": 4}, "qwen3"),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3", {"head_dim": 4, "num_labels": 1}, "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", {**EXPERTS, "head_dim": 4}, "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("Llama", {}, "llama3_2"),
    "tiny-LlamaForSequenceClassification-3.2": ("Llama", {"num_labels": 1}, "llama3_2"),
    "tiny-MistralForCausalLM-0.2": ("Mistral", {"sliding_window": None}, "qwen2_5"),
    "tiny-Gemma2ForCausalLM": ("Gemma2", {"head_dim": 4}, "gemma"),
    "tiny-Cohere2ForCausalLM": ("Cohere2", {}, "cohere2"),
    "tiny-GptOssForCausalLM": ("GptOss", {"head_dim": 4, "num_local_experts": 4}, "gptoss"),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe",
        {"head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1},
        "glm4moe",
    ),
}


def build(checkout: Path, folder: Path) -> list[str]:
    """Write all of them; the names of those that are there afterwards."""
    home = folder / ORGANIZATION
    for name, (family, options, template) in CHECKPOINTS.items():
        _save_checkpoint(home / name, family, options, (checkout / f"trl/chat_templates/{template}.jinja").read_text())
    _save_zen(checkout, home / "zen")
    return sorted(path.name for path in home.iterdir())


def _save_checkpoint(to: Path, family: str, options: dict[str, Any], template: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    kind = "ForSequenceClassification" if "num_labels" in options else "ForCausalLM"
    model = getattr(transformers, f"{family}{kind}")(config)
    if kind == "ForSequenceClassification":
        with torch.no_grad():
            model.score.weight.normal_()  # a fresh head gives nearly the same score to everything
    model.save_pretrained(to)
    tokenizer = _byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(to)


def _byte_tokenizer() -> Any:
    """One token a byte: no vocabulary to download."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )


def _save_zen(checkout: Path, to: Path) -> None:
    """Run the script with which TRL makes the dataset, with a folder in place of the Hub."""

    def keep(data: Dataset | DatasetDict, _repo: str, config_name: str) -> None:
        assert isinstance(data, DatasetDict)
        for split, rows in data.items():
            rows.to_parquet(str(to / config_name / f"{split}.parquet"))

    to.mkdir(parents=True, exist_ok=True)
    main = runpy.run_path(str(checkout / "scripts" / "generate_zen_dataset.py"))["main"]
    with patch.object(DatasetDict, "push_to_hub", keep):
        main(test_size=0.1, push_to_hub=True, repo_id="")
    configs = sorted(path.name for path in to.iterdir() if path.is_dir())
    lines = [
        line
        for name in configs
        for line in (
            f"- config_name: {name}",
            "  data_files:",
            *(f"  - {{split: {split}, path: {name}/{split}.parquet}}" for split in ("train", "test")),
        )
    ]
    (to / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))


if __name__ == "__main__":
    print(*build(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()), sep="\n")
