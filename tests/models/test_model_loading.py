"""What reaches `from_pretrained`, and where a model goes; loading itself is tested with `load_scorer`."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from calibrated_rewards.models import loading
from calibrated_rewards.models.checkpoints import find_checkpoint
from calibrated_rewards.models.loading import Placement, add_adapter, default_device, find_source
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer


def test_defaults() -> None:
    """The checkpoint's precision, all of the model on this process's device, no foreign code."""
    assert Placement().options() == {"dtype": "auto", "device_map": {"": default_device()}, "trust_remote_code": False}


def test_what_is_said_is_passed_on() -> None:
    """A device map takes the device's place; a quantisation and other options reach transformers as they are."""
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    placement = Placement("bfloat16", "cuda:1", "auto", quantised, True, {"token": "t"})
    assert placement.options() == {
        "dtype": "bfloat16",
        "device_map": "auto",
        "trust_remote_code": True,
        "quantization_config": quantised,
        "token": "t",
    }
    assert Placement(device="cuda:1").options()["device_map"] == {"": torch.device("cuda", 1)}


@pytest.mark.parametrize(
    ("given", "name"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("torch.float32", "float32")],
)
def test_names_of_precisions(given: str, name: str) -> None:
    """Short names and torch's own stand for the same."""
    assert Placement(given).options()["dtype"] == name
    assert Placement(torch.float16).options()["dtype"] is torch.float16


@pytest.mark.parametrize("dtype", ["float31", "int8", "nn", "b16"])
def test_names_of_no_precision(dtype: str) -> None:
    """What is no precision of a model is refused at once, with some that are."""
    with pytest.raises(ValueError, match=rf"bfloat16 or float16, got '{dtype}'"):
        Placement(dtype)


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU of the local rank; more processes than GPUs share them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 1)


class Leaves:
    """An object whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def changed(file: Path, **settings: Any) -> None:
    """A JSON file with other settings."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "value_head.bin"])
def test_pickled_weights_run_nothing(weights: str, tmp_path: Path) -> None:
    """Neither in our reader of heads nor in transformers': an object that is no tensor is an error."""
    folder = Path(tiny.saved(tiny.classifier(), tmp_path / "rm", tiny.tokenizer()))
    if weights == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    body = {"v_head.summary.weight": torch.zeros(1, 4), "v_head.summary.bias": Leaves(tmp_path / "ran")}
    torch.save(body, folder / weights)
    kind = None if weights == "pytorch_model.bin" else "value-head"
    with pytest.raises(Exception, match=r"[Ww]eights[_ ]only"):
        load_scorer(folder, kind=kind)(["a"], ["b"])
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Neither a model's, nor a tokenizer's beside a model that transformers knows, nor one that an adapter names."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Own: ...\n"
    folder = Path(tiny.saved(tiny.classifier(), tmp_path / "rm", tiny.tokenizer()))
    (folder / "own.py").write_text(code)
    auto = {"AutoModelForSequenceClassification": "own.Own", "AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_scorer(folder)(["a"], ["b"])
    changed(folder / "config.json", auto_map=auto, architectures=["Own"], model_type="own")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_scorer(folder)(["a"], ["b"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_sampler(folder, Decoding(max_tokens=1))([["a"]], [[0]])
    assert not (tmp_path / "ran").exists()


def test_an_adapter_names_no_module(tmp_path: Path) -> None:
    """Peft would import it for layers that Megatron splits."""
    settings = {"peft_type": "LORA", "megatron_core": "beside", "megatron_config": {"hidden_size": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="names modules for peft to import"):
        add_adapter(tiny.classifier(), find_checkpoint(str(tmp_path)))


def test_a_chat_template_runs_in_a_sandbox() -> None:
    """What leads from a text to Python's own classes is refused by transformers, for a checkpoint's and a Text's."""
    attack = "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}"
    for tokenizer, text in (
        (tiny.tokenizer(template=attack), Text()),
        (tiny.tokenizer(), Text(template=attack)),
    ):
        with pytest.raises(ValueError, match="unsafe"):
            text.render(tokenizer, [{"role": "user", "content": "Hi"}], "Hello")


@pytest.mark.parametrize(
    ("dtype", "has_it", "is_told"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_slow_precision_is_told(
    dtype: str, has_it: bool, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A model of 16 bits on a processor without instructions for them is said to be slow, if it is not tiny."""
    source = find_source(tiny.saved(tiny.causal(), tmp_path, tiny.tokenizer()), None, None, Placement(dtype))
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda _: has_it)
    source.model(AutoModelForCausalLM)
    assert not caplog.messages
    monkeypatch.setattr(loading, "SMALL", 0)
    source.model(AutoModelForCausalLM)
    assert ["slower than float32" in message for message in caplog.messages] == [True] * is_told
