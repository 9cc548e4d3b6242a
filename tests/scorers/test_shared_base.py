"""The reward as an adapter on the policy's base: equal to the standalone reward model, and the policy as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from torch import nn

from calibrated_rewards.models.checkpoints import find_checkpoint
from calibrated_rewards.models.labels import Label
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.value_head import SharedBase, load_head

# peft asks the model by a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS, COMPLETIONS = ["a prompt that some share"] * 4 + tiny.texts(8, 0), tiny.texts(12, 1)


def lora(task: str, **options: Any) -> peft.LoraConfig:
    """Not the usual zero at the start: an adapter that changes something."""
    return peft.LoraConfig(task_type=task, r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], **options)


def reward(folder: Path, labels: int = 1) -> Any:
    """A standalone PEFT reward model on the base of seed 0, saved as an adapter."""
    classifier = tiny.classifier(seed=5, num_labels=labels)
    classifier.model.load_state_dict(tiny.causal().model.state_dict())
    model = peft.get_peft_model(classifier, lora("SEQ_CLS")).eval()
    model.save_pretrained(folder)
    return model


def policy(folder: Path | None = None, **options: Any) -> Any:
    """A policy in training, with the reward's adapter beside its own."""
    torch.manual_seed(9)
    model = peft.get_peft_model(tiny.causal(), lora("CAUSAL_LM", lora_dropout=0.5, **options))
    if folder is not None:
        model.load_adapter(str(folder), "reward")
    return model.train()


def state(model: Any) -> list[Any]:
    """All that scoring could leave changed."""
    return [
        model.active_adapter,
        [(layer.active_adapter, layer.disable_adapters) for layer in model.modules() if isinstance(layer, Layer)],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, part.training) for name, part in model.named_modules()],
    ]


Layer = peft.tuners.tuners_utils.BaseTunerLayer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward adapter."""
    folder = tmp_path_factory.mktemp("reward")
    reward(folder)
    return folder


def test_equals_standalone(tmp_path: Path) -> None:
    """The same scores as the reward model with a base of its own, to 1e-6; the policy stays as it was."""
    standalone = SequenceClassifier(reward(tmp_path), tiny.tokenizer())
    model = policy(tmp_path)
    before = state(model)
    scorer = SharedBase(model, tiny.tokenizer(), load_head(find_checkpoint(str(tmp_path)), "score"))
    scores = scorer(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores, standalone(PROMPTS, COMPLETIONS), atol=1e-6, rtol=1e-6)
    assert state(model) == before
    assert np.abs(scores - without_adapter(scorer)).max() > 0.01


def without_adapter(scorer: SharedBase) -> np.ndarray:
    """What the head would give on the base alone."""
    rows = [scorer.tokenizer(p + c, return_tensors="pt") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        return np.array([scorer.head(tiny.causal().model(**row).last_hidden_state[0, -1]).item() for row in rows])


def test_as_before_after_an_error(adapter: Path) -> None:
    """Also when scoring fails, adapters, trained parameters and training mode are what they were."""
    model = policy(adapter)
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes"):
        SharedBase(model, tiny.tokenizer(), nn.Linear(31, 1))(["a"], ["b"])
    assert state(model) == before


def test_within_disabled_adapters(adapter: Path) -> None:
    """Where the policy's adapters are disabled, to get the reference, the reward's acts all the same."""
    model = policy(adapter)
    scorer = SharedBase(model, tiny.tokenizer(), load_head(find_checkpoint(str(adapter)), "score"))
    expected = scorer(PROMPTS, COMPLETIONS)
    with model.disable_adapter():
        before = state(model)
        np.testing.assert_array_equal(scorer(PROMPTS, COMPLETIONS), expected)
        assert state(model) == before


def test_policy_goes_on_learning(adapter: Path) -> None:
    """Between scorings the policy's adapter trains, the reward's does not, and the scores stay the same."""
    model = policy(adapter, modules_to_save=["embed_tokens"])
    scorer = SharedBase(model, tiny.tokenizer(), load_head(find_checkpoint(str(adapter)), "score"))
    first, print_before = scorer(PROMPTS, COMPLETIONS), scorer.fingerprint()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    assert model(input_ids=ids, labels=ids).loss != loss
    np.testing.assert_array_equal(scorer(PROMPTS, COMPLETIONS), first)
    assert scorer.fingerprint() == print_before


def test_merged_policy_is_refused(adapter: Path) -> None:
    """With the policy's adapter merged into the base the reward would be another: an error that says what to do."""
    model = policy(adapter)
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"\['default'\] is merged into it: unmerge_adapter"):
        SharedBase(model, tiny.tokenizer(), nn.Linear(32, 1))(["a"], ["b"])


def test_adapter_must_be_there() -> None:
    """The name of an adapter that is not loaded is an error that lists those that are."""
    with pytest.raises(ValueError, match=r"\['default'\], got adapter='reward'"):
        SharedBase(policy(), tiny.tokenizer(), nn.Linear(32, 1))


def test_learned_prompt_is_refused() -> None:
    """A learned prompt is in no layer, so it cannot be made active there."""
    model = peft.get_peft_model(tiny.causal(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="learned prompt"):
        SharedBase(model, tiny.tokenizer(), nn.Linear(32, 1), adapter="default")


def test_several_labels(adapter: Path) -> None:
    """Two labels are log-odds, three need a choice."""
    model, head = policy(adapter), nn.Linear(32, 2)
    odds = SharedBase(model, tiny.tokenizer(), head)(PROMPTS, COMPLETIONS)
    each = [SharedBase(model, tiny.tokenizer(), head, labels=Label(i))(PROMPTS, COMPLETIONS) for i in (0, 1)]
    np.testing.assert_allclose(odds, each[1] - each[0], atol=1e-6)
    with pytest.raises(ValueError, match="3 labels"):
        SharedBase(model, tiny.tokenizer(), nn.Linear(32, 3))(["a"], ["b"])


def test_empty_and_fingerprint(adapter: Path) -> None:
    """No input gives no score; the fingerprint knows the head and the text."""
    model, heads = policy(adapter), [nn.Linear(32, 1), nn.Linear(32, 1)]
    scorer = SharedBase(model, tiny.tokenizer(), heads[0])
    assert scorer([], []).shape == (0,)
    assert scorer.fingerprint() != SharedBase(model, tiny.tokenizer(), heads[1]).fingerprint()
    other = SharedBase(model, tiny.tokenizer(), heads[0], text=Text(append_eos=True))
    assert scorer.fingerprint() != other.fingerprint()


def test_a_head_in_training_is_read_as_it_is(adapter: Path) -> None:
    """Its weights of now, without its dropout."""
    made = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 1))
    scorer = SharedBase(policy(adapter), tiny.tokenizer(), made)
    before = scorer(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scorer(PROMPTS, COMPLETIONS), before)
    made[1].weight.data *= -2  # type: ignore[union-attr,operator]
    made[1].bias.data *= -2  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(scorer(prompts=PROMPTS, completions=COMPLETIONS), -2 * before, rtol=1e-5)
    assert made[0].training
    made[1].weight.data[:] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="SharedBase gave nan"):
        scorer(PROMPTS, COMPLETIONS)
    with pytest.raises(TypeError, match="prompts are a list"):
        scorer("a", ["b"])


def test_the_fingerprint_is_of_base_reward_and_head(adapter: Path) -> None:
    """The adapter's scale, the config and the head's layers are in it; adapters that the policy gains are not."""

    def told(model: Any, made: nn.Module) -> dict[str, Any]:
        return SharedBase(model, tiny.tokenizer(), made).fingerprint()

    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(32, 1))
    own = told(policy(adapter), linear)
    many = policy(adapter)
    # In layers that had none, of embeddings, with a whole layer beside, and under names that are parts of others.
    wide = {"target_modules": ["k_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    many.add_adapter("layers", peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, **wide))
    assert told(many, linear) == own
    for parameter in (p for name, p in many.named_parameters() if "layers." in name and ".layers." not in name):
        parameter.data += 1
    louder, turned, moved = policy(adapter), policy(adapter), policy(adapter)
    louder.peft_config["reward"].lora_alpha = 77
    turned.config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    moved.get_base_model().model.layers[0].mlp.up_proj.weight.data += 1
    others = [told(louder, linear), told(turned, linear), told(moved, linear)]
    others.append(told(policy(adapter), nn.Sequential(*linear, nn.Tanh())))
    assert len({str(each) for each in (own, *others)}) == 5
