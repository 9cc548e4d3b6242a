"""What reaches `from_pretrained`, and where a model goes; loading itself is tested with `load_scorer`."""

import pytest
import torch

from calibrated_rewards.scorers.pretrained import Placement, own_device


def test_defaults() -> None:
    """The checkpoint's precision, all of the model on this process's device, no foreign code."""
    assert Placement().options() == {"dtype": "auto", "device_map": {"": own_device()}, "trust_remote_code": False}


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
    assert own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == torch.device("cuda", 1)
