"""What is read of checkpoints on the disk, compared with the models that were saved there."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from calibrated_rewards.models.checkpoints import Checkpoint, find_checkpoint

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
