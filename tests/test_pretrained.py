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


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU of the local rank; more processes than GPUs share them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == torch.device("cuda", 1)
