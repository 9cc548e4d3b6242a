"""Value heads: the hidden state of transformers' own causal model at the last token, times the head's weights."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from calibrated_rewards.models.checkpoints import find_checkpoint
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.value_head import ValueHead, load_head


def head(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(32, 1).to(dtype)


def by_itself(model: Any, head: nn.Module, ids: list[int]) -> float:
    """The head on the last hidden state of one unpadded row."""
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return float(head(states[0, -1]))


def stored(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    """A causal model's checkpoint with more weights in it."""
    tiny.saved(tiny.causal(), folder, tiny.tokenizer())
    file = folder / "model.safetensors"
    save_file({**load_file(file), **extra}, file, {"format": "pt"})
    return folder


def test_equals_own_forward() -> None:
    """A batch of many lengths, some with a common prompt, equals each row alone."""
    model, tokenizer, value = tiny.causal(), tiny.tokenizer(), head()
    prompts, completions = ["a long prompt that all share, more or less"] * 8 + tiny.texts(6, 1), tiny.texts(14, 2)
    rows = [tokenizer(p + c)["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    expected = np.array([by_itself(model, value, ids) for ids in rows])
    for share in (True, False):
        scores = ValueHead(model, tokenizer, value, share_prefixes=share)(prompts, completions)
        np.testing.assert_allclose(scores, expected, atol=1e-4 * expected.std())
        assert scores.dtype == np.float32


def test_appended_eos() -> None:
    """With an EOS the head reads there, even where EOS is also the padding token."""
    model, tokenizer, value = tiny.causal(pad_token_id=tiny.EOS), tiny.tokenizer(pad_token="</s>"), head()
    scores = ValueHead(model, tokenizer, value, text=Text(append_eos=True))(["ab", "abcd"], ["cd", "</s>"])
    rows = [[*tokenizer("abcd")["input_ids"], tiny.EOS]] * 2
    np.testing.assert_allclose(scores, [by_itself(model, value, ids) for ids in rows], atol=1e-5)


def test_normalised() -> None:
    """OpenRLHF's mean and std shift and scale; a std that is no scale is refused."""
    model, tokenizer, value = tiny.causal(), tiny.tokenizer(), head()
    raw = ValueHead(model, tokenizer, value)(["a", "b"], ["c", "d"])
    scaled = ValueHead(model, tokenizer, value, mean=0.5, std=2.0)(["a", "b"], ["c", "d"])
    np.testing.assert_allclose(scaled, (raw - 0.5) / 2, rtol=1e-5)
    with pytest.raises(ValueError, match="std > 0, got std=0"):
        ValueHead(model, tokenizer, value, std=0)


def test_half_precision_head_has_no_ties() -> None:
    """A head of 16 bits is computed in 32, and itself stays as it was."""
    model, tokenizer, value = tiny.causal().to(torch.bfloat16), tiny.tokenizer(), head(dtype=torch.bfloat16)
    scores = ValueHead(model, tokenizer, value)(tiny.texts(60, 0), tiny.texts(60, 1))
    assert len(np.unique(scores)) == 60
    assert value.weight.dtype == torch.bfloat16


def test_head_of_several_numbers() -> None:
    """A value is one number."""
    with pytest.raises(ValueError, match=r"one number for each input, got shape \(1, 2\)"):
        ValueHead(tiny.causal(), tiny.tokenizer(), nn.Linear(32, 2))(["a"], ["b"])


@pytest.mark.parametrize("name", ["v_head.summary", "score", "value_head"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_head_from_checkpoint(tmp_path: Path, name: str, bias: bool) -> None:
    """TRL's and OpenRLHF's heads are found by their shape, whatever they are called."""
    value = head().requires_grad_(False)
    weights = {f"{name}.weight": value.weight} | ({f"{name}.bias": value.bias} if bias else {})
    found = load_head(find_checkpoint(str(stored(tmp_path, weights))))
    states = torch.randn(5, 32)
    torch.testing.assert_close(found(states), states @ value.weight.T + (value.bias if bias else 0))


def test_two_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers after one another have a ReLU between them, and that this is assumed is logged."""
    caplog.set_level(logging.INFO)
    first, last = torch.randn(48, 32), torch.randn(1, 48)
    weights = {"score.0.weight": first, "score.0.bias": torch.ones(48), "score.2.weight": last}
    found = load_head(find_checkpoint(str(stored(tmp_path, weights))))
    states = torch.randn(5, 32)
    torch.testing.assert_close(found(states), (states @ first.T + 1).clamp(min=0) @ last.T)
    assert "ReLU" in caplog.text


def test_several_heads(tmp_path: Path) -> None:
    """Of two heads one is named."""
    found = find_checkpoint(
        str(stored(tmp_path, {"cost.weight": torch.zeros(1, 32), "reward.weight": torch.ones(1, 32)}))
    )
    assert float(load_head(found, "reward")(torch.ones(1, 32))) == 32
    with pytest.raises(ValueError, match=r"head= one of its value heads \['cost', 'reward'\], got None"):
        load_head(found)


def test_empty_and_fingerprint() -> None:
    """No input gives no score; the fingerprint knows the head, its layers and the normalisation."""
    model, tokenizer = tiny.causal(), tiny.tokenizer()
    scorer = ValueHead(model, tokenizer, head())
    assert scorer([], []).shape == (0,)
    prints = [ValueHead(model, tokenizer, head(seed)).fingerprint() for seed in (0, 1)]
    assert scorer.fingerprint() == prints[0] != prints[1]
    assert ValueHead(model, tokenizer, head(), std=2.0).fingerprint() != prints[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_training_is_read_as_it_is(dtype: torch.dtype) -> None:
    """Its weights of now, without its dropout; it stays in training."""
    made = nn.Sequential(nn.Dropout(0.5), head(dtype=dtype))
    scorer = ValueHead(tiny.causal().to(dtype), tiny.tokenizer(), made)
    before = scorer(["a", "b"], ["c", "d"])
    np.testing.assert_array_equal(scorer(["a", "b"], ["c", "d"]), before)
    made[1].weight.data *= -2  # type: ignore[union-attr,operator]
    made[1].bias.data *= -2  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(scorer(prompts=["a", "b"], completions=["c", "d"]), -2 * before, rtol=0.02)
    assert all(part.training for part in made.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_learned_prompt_is_refused() -> None:
    """It stands before the body: body and head alone would score without it."""
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="'default' is a learned prompt"):
        ValueHead(peft.get_peft_model(tiny.causal(), soft), tiny.tokenizer(), head())
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    ValueHead(peft.get_peft_model(tiny.causal(), lora), tiny.tokenizer(), head())


def test_lists_and_nan() -> None:
    """A text for a list is refused, and a head of nan is named with its pair."""
    value = head()
    scorer = ValueHead(tiny.causal(), tiny.tokenizer(), value)
    with pytest.raises(TypeError, match="prompts are a list"):
        scorer("a", ["b"])
    value.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="ValueHead gave nan for completion 'b' of prompt 'a'"):
        scorer(["a"], ["b"])
