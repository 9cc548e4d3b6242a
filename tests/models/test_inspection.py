"""Kinds by configs alone: folders with a config.json, and weights only where they decide."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calibrated_rewards.models.checkpoints import (
    Checkpoint,
    check_writes,
    detect_kind,
    find_checkpoint,
    is_encoder,
    needs_code,
)

ONE: dict[str, Any] = {"id2label": {"0": "good"}}
TWO: dict[str, Any] = {}
HEAD = {"score.weight": torch.zeros(1, 4)}
BODY = {f"model.layers.{i}.weight": torch.zeros(4, 4) for i in range(4)}


def described(folder: Path, weights: dict[str, torch.Tensor] | None = None, **config: Any) -> Checkpoint:
    """A checkpoint with this config, and these weights beside a body's."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**BODY, **(weights or {})}, folder / "model.safetensors")
    return find_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("model_type", "architecture", "labels", "kind"),
    [
        ("llama", "LlamaForSequenceClassification", ONE, "sequence-classifier"),
        ("llama", "LlamaForSequenceClassification", TWO, "sequence-classifier"),
        ("deberta-v2", "DebertaV2ForSequenceClassification", ONE, "cross-encoder"),
        ("deberta-v2", "DebertaV2ForSequenceClassification", {"num_labels": 1}, "cross-encoder"),
        ("deberta-v2", "DebertaV2ForSequenceClassification", TWO, "sequence-classifier"),
        ("modernbert", "ModernBertForSequenceClassification", ONE, "cross-encoder"),
        ("bart", "BartForSequenceClassification", ONE, "sequence-classifier"),
        ("t5", "T5ForSequenceClassification", ONE, "sequence-classifier"),
    ],
)
def test_classifiers(tmp_path: Path, model_type: str, architecture: str, labels: dict[str, Any], kind: str) -> None:
    """Encoders with one label read pairs; decoders, encoder-decoders and several labels do not."""
    found = described(tmp_path, model_type=model_type, architectures=[architecture], **labels)
    assert detect_kind(found, found) == kind


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "RewardModel", "INFORMForSequenceClassification", None])
def test_head_decides_where_the_class_does_not(tmp_path: Path, architecture: str | None) -> None:
    """A causal model, a class that transformers does not know, or none: with a value head it is one."""
    named = {"architectures": [architecture]} if architecture else {}
    found = described(tmp_path, HEAD, model_type="llama", **named)
    assert detect_kind(found, found) == "value-head"
    bare = described(tmp_path, model_type="llama", **named)
    with pytest.raises(ValueError, match="no head that gives a score"):
        detect_kind(bare, bare)


def test_custom_code_that_transformers_took_over(tmp_path: Path) -> None:
    """A checkpoint that still names its own code for a class that transformers has by now does not need it."""
    auto = {"AutoModelForSequenceClassification": "modeling.Qwen2ForSequenceClassification"}
    known = described(tmp_path, model_type="qwen2", architectures=["Qwen2ForSequenceClassification"], auto_map=auto)
    assert not needs_code(known)
    assert detect_kind(known, known) == "sequence-classifier"
    own = described(tmp_path, model_type="qwen2", architectures=["Qwen2ForReward"], auto_map=auto)
    assert needs_code(own)
    assert detect_kind(own, own, trust_remote_code=True) == "sequence-classifier"


@pytest.mark.parametrize(
    ("config", "reads_both_ways"),
    [
        ({"model_type": "bert"}, True),
        ({"model_type": "bert", "is_decoder": True}, False),
        ({"model_type": "mbart"}, False),
        ({"model_type": "gpt2"}, False),
        ({"model_type": "no such"}, False),
        ({}, False),
    ],
)
def test_encoders(tmp_path: Path, config: dict[str, Any], reads_both_ways: bool) -> None:
    """What fills in words and does not write."""
    assert is_encoder(described(tmp_path, **config)) == reads_both_ways


def test_encoder_without_head(tmp_path: Path) -> None:
    """An embedding model is told to train a head, and is not offered the kinds that write."""
    found = described(tmp_path, model_type="bert", architectures=["BertModel"])
    with pytest.raises(ValueError, match="of an embedding model train a classification head first") as raised:
        detect_kind(found, found)
    assert "judge" not in str(raised.value)


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "Reward"])
def test_reward_models_write_nothing(tmp_path: Path, architecture: str) -> None:
    """A model with a head for scores and none for words is no judge; with both, or with neither, it may be."""
    scores = described(tmp_path, HEAD, model_type="llama", architectures=[architecture])
    with pytest.raises(ValueError, match=rf"the kind judge reads the words.*{architecture}.*Leave out kind=judge"):
        check_writes(scores, scores, "judge")
    both = described(
        tmp_path, {**HEAD, "lm_head.weight": torch.zeros(9, 4)}, model_type="llama", architectures=[architecture]
    )
    check_writes(both, both, "judge")
    tied = described(tmp_path, HEAD, model_type="llama", architectures=["LlamaForCausalLM"])
    check_writes(tied, tied, "judge")


def test_reward_adapters_write_nothing(tmp_path: Path) -> None:
    """An adapter for scores on a language model is no judge."""
    (tmp_path / "base").mkdir()
    base = described(tmp_path / "base", model_type="llama", architectures=["LlamaForCausalLM"])
    for task, writes in [("SEQ_CLS", False), ("CAUSAL_LM", True)]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": task}))
        adapter = find_checkpoint(str(tmp_path))
        if writes:
            check_writes(adapter, base, "implicit")
        else:
            with pytest.raises(ValueError, match="the kind implicit reads the words"):
                check_writes(adapter, base, "implicit")
