"""Checkpoints are inspected as they were saved: names and shapes of weights, and the kind by the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
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

LAYERS = {f"model.layers.{i}.weight": torch.randn(4, 4) for i in range(5)}


def written(folder: Path, weights: dict[str, torch.Tensor], file: str = "model.safetensors") -> Checkpoint:
    """A checkpoint that holds these weights."""
    folder.mkdir(exist_ok=True)
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file)
    return find_checkpoint(str(folder))


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_names_and_shapes(tmp_path: Path, shard: str) -> None:
    """In one file or in many, with an index: the names and shapes of the model that was saved, and its config."""
    model = tiny.classifier()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    found = find_checkpoint(str(tmp_path))
    assert {name: found.shape(name) for name in found.weights} == {
        name: tuple(weight.shape) for name, weight in model.state_dict().items()
    }
    torch.testing.assert_close(found.tensor("score.weight"), model.score.weight.detach())
    assert found.config["architectures"] == ["LlamaForSequenceClassification"]
    assert found.adapter == {}


def test_pickled_weights(tmp_path: Path) -> None:
    """A .bin file is read as well, and nothing in it is run."""
    found = written(tmp_path / "good", {**LAYERS, "v_head.weight": torch.ones(1, 4)}, "pytorch_model.bin")
    assert found.value_heads == {"v_head": ["v_head.weight"]}
    torch.testing.assert_close(found.tensor("v_head.weight"), torch.ones(1, 4))
    bad: Any = {"model.weight": print}
    with pytest.raises(Exception, match="Weights only load failed"):
        written(tmp_path / "bad", bad, "pytorch_model.bin").weights  # noqa: B018


def test_safetensors_come_first(tmp_path: Path) -> None:
    """Of two files that hold the same, the one is read that transformers reads."""
    written(tmp_path, {"old.weight": torch.ones(1)}, "pytorch_model.bin")
    assert list(written(tmp_path, {"new.weight": torch.ones(1)}).weights) == ["new.weight"]


@pytest.mark.parametrize(
    ("shapes", "is_head"),
    [
        ({"head.weight": (1, 4)}, True),
        ({"head.weight": (1, 4), "head.bias": (1,)}, True),
        ({"head.2.weight": (8, 4), "head.2.bias": (8,), "head.10.weight": (1, 8)}, True),
        ({"head.weight": (3, 4)}, False),  # classes
        ({"head.0.weight": (8, 4), "head.2.weight": (1, 7)}, False),  # the layers do not fit
        ({"head.norm.weight": (4,), "head.out.weight": (1, 4)}, False),  # a norm, whose formula the weights do not say
        ({"head.scale": (1,)}, False),
        ({"model.layers.3.head.weight": (1, 4)}, False),  # within the body
    ],
)
def test_value_heads(tmp_path: Path, shapes: dict[str, tuple[int, ...]], is_head: bool) -> None:
    """Linear layers beside the body that end in one number, and nothing else."""
    found = written(tmp_path, {**LAYERS, **{name: torch.zeros(shape) for name, shape in shapes.items()}})
    assert bool(found.value_heads) == is_head
    if is_head:
        weights = [name for name in found.value_heads["head"] if name.endswith("weight")]
        assert weights == [name for name in shapes if name.endswith("weight")]


def test_whole_models_have_no_value_head(tmp_path: Path) -> None:
    """A language model has none, with its lm_head or as a bare body."""
    tiny.causal().save_pretrained(tmp_path / "causal")
    tiny.causal().model.save_pretrained(tmp_path / "body")
    assert find_checkpoint(str(tmp_path / "causal")).value_heads == {}
    assert find_checkpoint(str(tmp_path / "body")).value_heads == {}


def test_value_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    """LLaMA-Factory writes the head beside the model."""
    written(tmp_path, LAYERS)
    head = {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.ones(1)}
    found = written(tmp_path, head, "value_head.safetensors")
    assert found.value_heads == {"v_head": ["v_head.summary.bias", "v_head.summary.weight"]}


def test_adapter(tmp_path: Path) -> None:
    """An adapter's weights have the names that they have in its base, and its head says how many labels."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "task_type": "SEQ_CLS"}))
    lora = {f"base_model.model.model.layers.{i}.lora_A.weight": torch.zeros(2, 4) for i in range(3)}
    head = {
        "base_model.model.classifier.dense.weight": torch.zeros(4, 4),
        "base_model.model.classifier.out_proj.weight": torch.zeros(3, 4),
        "base_model.model.pooler.dense.weight": torch.zeros(4, 4),
    }
    found = written(tmp_path, {**lora, **head}, "adapter_model.safetensors")
    assert "classifier.out_proj.weight" in found.weights
    assert found.labels == 3
    assert found.adapter["task_type"] == "SEQ_CLS"


def test_no_such_folder() -> None:
    """A path that is no folder is not looked up on the Hub."""
    for path in ("./nothing", "/nothing/here", "~/nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no folder"):
            find_checkpoint(path)


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
