"""A head on a model: what is trained, which adapter it reads with, and that it comes back from its files."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from calibrated_rewards.heads import HeadedModel, SelectedLayers
from calibrated_rewards.heads.preference_head import SETTINGS_FILE
from calibrated_rewards.models.adapters import (
    adapter_layers,
    build_lora_config,
    ignore_peft_warning,
    list_linear_layers,
)
from calibrated_rewards.models.parts import body_of, pad_right
from calibrated_rewards.scorers import PreferenceHeadScorer
from calibrated_rewards.scorers.protocol import score

PROMPTS = ["Hi", [{"role": "user", "content": "Who are you?"}], "2+2=", "Hi"]
COMPLETIONS = ["hello there", "a llama", "4", ""]
BACKBONES = ["frozen", "lora", "full"]
LAYERS = [(-1,), (0, 1, -1)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer with a chat template."""
    return tiny.tokenizer()


@pytest.fixture
def policy(tmp_path: Path, tokenizer: Any) -> str:
    """The folder of a saved tiny policy, which tests load as transformers does."""
    return tiny.saved(tiny.causal(), tmp_path / "policy", tokenizer)


def load(policy: str) -> Any:
    """The policy, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy).eval()


def adapt(model: Any) -> Any:
    """The policy with a LoRA adapter of its own."""
    with ignore_peft_warning():
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def falcon() -> Any:
    """A model whose linear layers are of a class of its own."""
    torch.manual_seed(0)
    return FalconForCausalLM(
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


def gpt2() -> Any:
    """A policy whose linear layers are transformers' Conv1D."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))


def disturb(model: Any, seed: int = 0) -> None:
    """Change all weights that are trained: an adapter and a head that were not trained do nothing yet."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))


def build(policy: str, tokenizer: Any, **settings: Any) -> HeadedModel:
    """A headed model whose trained weights are not those of the start."""
    headed = HeadedModel.build(load(policy), tokenizer, **settings)
    disturb(headed)
    return headed.eval()


def ends_of(rows: list[list[int]]) -> torch.Tensor:
    """Row and position of each row's last token."""
    return torch.tensor([(i, len(row) - 1) for i, row in enumerate(rows)])


def one_by_one(headed: HeadedModel, rows: list[list[int]]) -> torch.Tensor:
    """The oracle: the whole model's own forward, a row at a time, and the head on its last token."""
    scores = []
    with torch.no_grad(), headed.activate():
        for row in rows:
            states = headed.model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            scores.append(headed.head(headed.head.select(states, torch.tensor([len(row) - 1])))[0])
    return torch.stack(scores)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_batch_scores_as_rows_alone(policy: str, tokenizer: Any, backbone: str, layers: tuple[int, ...]) -> None:
    """Batched and padded, with and without gradients, a pair has the score that it has alone."""
    headed = build(policy, tokenizer, backbone=backbone, layers=layers, pooler="tanh", names=("a", "b"))
    rows = headed.encode(PROMPTS, COMPLETIONS)
    ids, mask = pad_right(rows, 0, torch.device("cpu"))

    expected = one_by_one(headed, rows)

    assert expected.std(0).min() > 0.01
    torch.testing.assert_close(headed.score_rows(rows), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(headed(ids, ends_of(rows), attention_mask=mask).detach(), expected, atol=1e-5, rtol=1e-4)
    body = SelectedLayers(body_of(headed.model), headed.head)
    with torch.no_grad(), headed.activate():
        states = body(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = headed.head(states[range(len(rows)), mask.sum(1) - 1])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_trained(policy: str, tokenizer: Any, backbone: str) -> None:
    """Gradients reach the head, and of the model nothing, its new adapter, or all of the body."""
    headed = build(policy, tokenizer, backbone=backbone)
    rows = headed.encode(PROMPTS, COMPLETIONS)
    ids, mask = pad_right(rows, 0, torch.device("cpu"))
    headed(ids, ends_of(rows), attention_mask=mask).sum().backward()

    reached = {name for name, weight in headed.named_parameters() if weight.grad is not None and weight.grad.any()}

    assert "head.score.weight" in reached
    inside = {name for name in reached if name.startswith("model.")}
    assert inside == {name for name, weight in headed.model.named_parameters(prefix="model") if weight.requires_grad}
    if backbone == "lora":
        assert inside
        assert all(".preference_head." in name for name in inside)
    assert bool(inside) == (backbone != "frozen")
    assert ("model.lm_head.weight" in inside) is False


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_and_loaded(policy: str, tokenizer: Any, tmp_path: Path, backbone: str, beside: bool) -> None:
    """A head comes back with its model and scores the same; a frozen one may lie in the model's own folder."""
    headed = build(policy, tokenizer, backbone=backbone, pooler="swiglu", layers=(1, -1))
    rows = headed.encode(PROMPTS, COMPLETIONS)
    folder = Path(policy) if beside and backbone == "frozen" else tmp_path / "head"

    headed.save_pretrained(folder)
    loaded = HeadedModel.from_pretrained(folder)

    if folder.name == "head":
        weights = {"frozen": set(), "lora": {"adapter_model.safetensors"}, "full": {"model.safetensors"}}[backbone]
        assert {path.name for path in folder.glob("*.safetensors")} == {"preference_head.safetensors", *weights}
    assert loaded.encode(PROMPTS, COMPLETIONS) == rows
    assert torch.equal(loaded.score_rows(rows), headed.score_rows(rows))
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


@pytest.mark.parametrize("backbone", ["frozen", "lora"])
def test_the_policys_adapter_is_off(policy: str, tokenizer: Any, tmp_path: Path, backbone: str) -> None:
    """On a policy that carries an adapter, the head reads without it, and the policy is as it was afterwards."""
    headed = build(policy, tokenizer, backbone=backbone)
    rows = headed.encode(PROMPTS, COMPLETIONS)
    headed.save_pretrained(tmp_path / "head")
    adapted = adapt(load(policy))
    disturb(adapted, seed=1)
    adapted.train()
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    ids = torch.tensor([rows[0]])
    before = adapted(input_ids=ids).logits

    attached = HeadedModel.attach(tmp_path / "head", adapted, tokenizer)

    torch.testing.assert_close(attached.score_rows(rows), headed.score_rows(rows))
    assert torch.equal(adapted(input_ids=ids).logits, before)
    assert adapted.active_adapters == ["default"]
    assert adapted.training
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad} == trained
    with adapted.disable_adapter():
        torch.testing.assert_close(attached.score_rows(rows), headed.score_rows(rows))
        plain = adapted(input_ids=ids).logits
    assert not torch.allclose(plain, before)


@pytest.mark.parametrize("backbone", ["frozen", "lora"])
def test_built_on_a_policy_with_an_adapter(policy: str, tokenizer: Any, backbone: str) -> None:
    """A new head on an adapted policy trains its own adapter alone, and the policy's is off while it reads."""
    adapted = adapt(load(policy))
    disturb(adapted, seed=1)
    headed = HeadedModel.build(adapted, tokenizer, backbone=backbone)
    rows = headed.encode(PROMPTS, COMPLETIONS)
    plain = HeadedModel(load(policy), tokenizer, headed.head)
    plain.head.settings = headed.settings
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}

    assert all(".preference_head." in name for name in trained)
    assert bool(trained) == (backbone == "lora")
    with torch.no_grad():  # a fresh adapter changes nothing
        states = load(policy)(input_ids=torch.tensor([rows[0]]), output_hidden_states=True).hidden_states[-1][:, -1]
        torch.testing.assert_close(headed.score_rows(rows)[:1], headed.head.eval()(states))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("of", [tiny.causal, gpt2, falcon])
def test_an_adapter_is_on_pefts_linear_layers(of: Any, adapted: bool) -> None:
    """Those that PEFT finds for "all-linear", also on a policy that carries an adapter."""
    where = list_linear_layers(adapt(of()) if adapted else of())
    with ignore_peft_warning():
        own = get_peft_model(of(), LoraConfig(target_modules=where, task_type="CAUSAL_LM"))
    assert {*adapter_layers(own)} == {*adapter_layers(adapt(of()))}


def test_an_adapter_leaves_routers_alone() -> None:
    """Llama 4's is a linear layer that returns two tensors: PEFT adapts it, and fails."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Llama4TextConfig(
        vocab_size=300, num_key_value_heads=2, head_dim=16, num_local_experts=4, intermediate_size_mlp=32, **shape
    )
    with ignore_peft_warning():
        adapted = get_peft_model(Llama4ForCausalLM(config), build_lora_config(Llama4ForCausalLM(config), 2))
    assert {name.rpartition(".")[2] for name in adapter_layers(adapted)} >= {"q_proj", "v_proj"}
    assert adapted(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_an_adapter_leaves_experts_alone() -> None:
    """A mixture of experts is scored: PEFT would move the experts' weights in each forward."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, **shape))
    headed = HeadedModel.build(model.eval(), tiny.tokenizer(), backbone="lora")
    disturb(headed)
    scores = score(PreferenceHeadScorer(headed.eval()), PROMPTS, COMPLETIONS)
    alone = [headed.score_rows([row]).item() for row in headed.encode(PROMPTS, COMPLETIONS)]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert np.ptp(scores) > 1e-3


def test_another_base_is_refused(policy: str, tokenizer: Any, tmp_path: Path) -> None:
    """Other weights than the head was trained on are refused, unless any will do; 16 bits of the same are not."""
    headed = build(policy, tokenizer)
    headed.save_pretrained(tmp_path / "head")
    other = tiny.causal(seed=5)
    with pytest.raises(ValueError, match="was trained on other weights"):
        HeadedModel.attach(tmp_path / "head", other, tokenizer)
    HeadedModel.attach(tmp_path / "head", other, tokenizer, any_base=True)
    HeadedModel.attach(tmp_path / "head", load(policy).bfloat16(), tokenizer)
    with pytest.raises(ValueError, match="reads 32 numbers, the model has hidden states of 64"):
        HeadedModel.attach(tmp_path / "head", tiny.causal(hidden_size=64), tokenizer)
    adapted = adapt(load(policy))
    with pytest.raises(ValueError, match="without adapters: merge_and_unload"):
        HeadedModel.build(adapted, tokenizer, backbone="full")


def test_a_base_that_has_moved(policy: str, tokenizer: Any, tmp_path: Path) -> None:
    """The error names the head and its base, and what to say; where it is said, that name is the one."""
    base = shutil.copytree(policy, tmp_path / "base")
    build(str(base), tokenizer).save_pretrained(tmp_path / "head")
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"head was trained on .*base, which is not there: say .*, base=PATH"):
        HeadedModel.from_pretrained(tmp_path / "head")
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere'"):
        HeadedModel.from_pretrained(tmp_path / "head", base="/nowhere")
    assert HeadedModel.from_pretrained(tmp_path / "head", base=str(tmp_path / "moved")).settings.base == str(base)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_missing_or_cut_off(policy: str, tokenizer: Any, tmp_path: Path, file: str) -> None:
    """A head with an adapter of its own is refused without it, by the name of the file."""
    build(policy, tokenizer, backbone="lora").save_pretrained(tmp_path / "head")
    weights = tmp_path / "head" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors of .*head cannot be read, copy it again"):
        HeadedModel.from_pretrained(tmp_path / "head")
    weights.write_bytes(whole)
    (tmp_path / "head" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"head has no {file}, and its head reads with an adapter"):
        HeadedModel.from_pretrained(tmp_path / "head")


PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("there", PRECISIONS, ids=str)
@pytest.mark.parametrize("here", PRECISIONS, ids=str)
def test_another_base_is_noticed_in_every_precision(
    tokenizer: Any, tmp_path: Path, there: torch.dtype, here: torch.dtype
) -> None:
    """Casts of one checkpoint are one base; a layer that was trained a little is another, and so is another name."""
    HeadedModel.build(tiny.causal().to(there), tokenizer).save_pretrained(tmp_path)

    HeadedModel.attach(tmp_path, tiny.causal().to(here), tokenizer)

    other = tiny.causal()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"other weights .* which (model.layers.1.mlp.up_proj.weight|a digest)"):
        HeadedModel.attach(tmp_path, other.to(here), tokenizer)
    shorter = tiny.causal()
    shorter.model.layers = shorter.model.layers[:1]
    with pytest.raises(ValueError, match=r"which model.layers.1.* shows"):
        HeadedModel.attach(tmp_path, shorter.to(here), tokenizer)


def test_a_head_of_before_has_a_digest_alone(policy: str, tokenizer: Any, tmp_path: Path) -> None:
    """Saved without values of the weights: in float32 and bfloat16 the digest tells, in float16 nothing does."""
    build(policy, tokenizer).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / SETTINGS_FILE).read_text())
    del settings["base_sample"]
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings))
    for kind in PRECISIONS[:2]:
        HeadedModel.attach(tmp_path, load(policy).to(kind), tokenizer)
        with pytest.raises(ValueError, match="other weights"):
            HeadedModel.attach(tmp_path, tiny.causal(seed=5).to(kind), tokenizer)
    HeadedModel.attach(tmp_path, tiny.causal(seed=5).half(), tokenizer)


def test_a_quantised_base_is_known_by_what_is_not_quantised(policy: str, tokenizer: Any, tmp_path: Path) -> None:
    """Its whole numbers are not compared; its norms and embeddings are."""
    build(policy, tokenizer).save_pretrained(tmp_path)
    for seed, same in ((None, True), (5, False)):
        model = load(policy) if seed is None else tiny.causal(seed)
        for layer in model.model.layers:
            linear = layer.mlp.up_proj
            linear.weight = torch.nn.Parameter(linear.weight.mul(100).to(torch.int8), requires_grad=False)
        if same:
            HeadedModel.attach(tmp_path, model, tokenizer)
        else:
            with pytest.raises(ValueError, match=r"which model.embed_tokens.weight shows"):
                HeadedModel.attach(tmp_path, model, tokenizer)


def test_a_model_in_16_bits_has_scores_in_float32(policy: str, tokenizer: Any) -> None:
    """The head of a bfloat16 model computes in float32: scores are not rounded to 8 bits."""
    headed = build(policy, tokenizer).to(torch.bfloat16)
    scores = headed.score_rows(headed.encode(PROMPTS, COMPLETIONS))
    assert headed.model.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_heads_read_one_policy(policy: str, tokenizer: Any, tmp_path: Path, wrapped: bool) -> None:
    """Each by its own adapter, also where both were attached to the model without PEFT's wrapper."""
    rows, scores = [], []
    for seed in range(2):
        headed = build(policy, tokenizer, backbone="lora")
        disturb(headed, seed)
        headed.save_pretrained(tmp_path / str(seed))
        rows = headed.encode(PROMPTS, COMPLETIONS)
        scores.append(headed.score_rows(rows))
    assert not torch.allclose(*scores, atol=0.01)

    model = load(policy)
    first = HeadedModel.attach(tmp_path / "0", model, tokenizer)
    with ignore_peft_warning(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`|You are trying to modify a model with PEFT")
        second = HeadedModel.attach(tmp_path / "1", first.model if wrapped else model, tokenizer)

    torch.testing.assert_close(first.score_rows(rows), scores[0])
    torch.testing.assert_close(second.score_rows(rows), scores[1])
    second.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(HeadedModel.from_pretrained(tmp_path / "again").score_rows(rows), scores[1])


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, partial(torch.compile, backend="eager")])
def test_a_wrapped_model_is_the_one_inside(policy: str, tokenizer: Any, tmp_path: Path, wrap: Any) -> None:
    """torch.compile's and data-parallel wrappers change neither scores nor the fingerprint."""
    headed = build(policy, tokenizer)
    headed.save_pretrained(tmp_path / "head")
    for each in (
        HeadedModel.attach(tmp_path / "head", wrap(load(policy)), tokenizer),
        HeadedModel.build(wrap(load(policy)), tokenizer),
    ):
        each.head.load_state_dict(headed.head.state_dict())
        rows = each.encode(PROMPTS, COMPLETIONS)
        assert torch.equal(each.score_rows(rows), headed.score_rows(rows))
        assert PreferenceHeadScorer(each).fingerprint() == PreferenceHeadScorer(headed).fingerprint()


def test_last_states_that_are_narrower(tokenizer: Any, tmp_path: Path) -> None:
    """OPT-350M's last hidden states are projected: a head of the last layer reads those, of another the wide ones."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=tiny.VOCABULARY, num_attention_heads=4, **sizes)).eval()
    for layers, size in (((-1,), 16), ((1,), 32)):
        headed = HeadedModel.build(model, tokenizer, layers=layers)
        assert headed.settings.hidden_size == size
        headed.save_pretrained(tmp_path)
        rows = headed.encode(PROMPTS, COMPLETIONS)
        assert torch.equal(HeadedModel.attach(tmp_path, model, tokenizer).score_rows(rows), headed.score_rows(rows))
