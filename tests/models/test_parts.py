"""The parts of models of every architecture, the modes in which they are read, and the errors of their forwards."""

import gc
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import ALL, DECODERS, ENCODERS, HYBRIDS, SEQUENCE_TO_SEQUENCE, Architecture
from tiny import BOS, VOCABULARY, causal, classifier, saved, tokenizer
from torch import nn
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

from calibrated_rewards.models import parts as body
from calibrated_rewards.models.fingerprint import config_digest, model_fingerprint, tokenizer_digest, weights_digest
from calibrated_rewards.models.parts import (
    ANY_ID,
    RAISED,
    UnreadError,
    body_of,
    check_vocabulary,
    device_of,
    dtype_of,
    for_scoring,
    heads_of,
    in_float32,
    lock_of,
    multiplies_bfloat16,
    pad_right,
    reading_errors,
    rope_turn,
    vocabulary,
)


@pytest.mark.parametrize("name", ALL)
def test_body_and_heads_are_the_model(name: str) -> None:
    """The body has the embeddings, and between them body and heads have all the weights."""
    model = ALL[name].classifier()
    transformer, heads = body_of(model), heads_of(model)
    weights = {id(p) for part in (transformer, *heads.values()) for p in part.parameters()}

    assert weights == {id(p) for p in model.parameters()}
    assert heads
    assert not any(part is transformer for part in heads.values())
    assert len(heads) == 1 or name in {*ENCODERS, "FNet", "XLNet", "Canine", "ConvBert"}


def test_parts_of_a_model_that_writes() -> None:
    """Its head is the one that gives logits; a bare transformer is its own body."""
    model = causal()

    assert body_of(model) is model.model
    assert list(heads_of(model).values()) == [model.lm_head]
    assert body_of(model.model) is model.model


@pytest.mark.parametrize("name", ALL)
def test_vocabularies(name: str) -> None:
    """As many ids as there are embeddings; any id where characters are hashed."""
    model = ALL[name].classifier()
    if name == "Canine":
        assert vocabulary(model) == ANY_ID
        check_vocabulary([[0x10FFFF]], model)
        return
    assert vocabulary(model) == VOCABULARY
    check_vocabulary([[1, VOCABULARY - 1], [2]], model)
    with pytest.raises(ValueError, match=f"gives id {VOCABULARY}, the reward model has {VOCABULARY} embeddings"):
        check_vocabulary([[1], [VOCABULARY, 2]], model)
    model.resize_token_embeddings(VOCABULARY + 8)
    check_vocabulary([[VOCABULARY]], model)


def test_devices() -> None:
    """Where the embeddings are; of a model that is partly nowhere, where the first weight is."""
    model = classifier()
    assert device_of(model) == torch.device("cpu")
    model.model.embed_tokens.to("meta")
    assert device_of(model) == torch.device("cpu")
    assert device_of(classifier().to("meta")) == torch.device("cpu")
    assert device_of(ALL["Canine"].classifier()) == torch.device("cpu")


def test_precisions() -> None:
    """That of the body, whatever the head is in, and whole numbers do not count."""
    model = classifier().to(torch.bfloat16)
    model.score.float()
    assert dtype_of(model) == torch.bfloat16
    part = nn.Sequential(nn.Linear(2, 2).half())
    part.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert dtype_of(part) == torch.float16


def test_bfloat16_on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as the kernel lists the processor's instructions; what is no CPU has bfloat16."""
    listed = Path("/proc/cpuinfo")
    flags = set(re.findall(r"avx512_bf16|amx_tile|bf16", listed.read_text())) if listed.exists() else set()
    assert multiplies_bfloat16(torch.device("cpu")) == bool(flags)
    assert multiplies_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert multiplies_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize("name", [*DECODERS, *HYBRIDS, *ENCODERS, *SEQUENCE_TO_SEQUENCE])
def test_most_models_have_one_set_of_angles(name: str) -> None:
    """And those without any have none."""
    assert rope_turn(ALL[name].classifier()) is None


def test_long_rope_turns() -> None:
    """At the length that it was trained for first."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    options = {
        "original_max_position_embeddings": 40,
        "rope_parameters": {**rope, "original_max_position_embeddings": 40},
    }
    model = Architecture("Phi3", {**DECODERS["Phi3"].options, **options}).classifier()

    assert rope_turn(model) == 40


def test_heads_in_float32() -> None:
    """A copy in float32 with the same values, without gradients or dropout; what is float32, or no float, is itself."""
    head = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).bfloat16().train()
    copy: Any = in_float32(head)

    assert copy[0].weight.dtype == torch.float32
    assert torch.equal(copy[0].weight, head[0].weight.float())
    assert not copy.training
    assert not any(p.requires_grad for p in copy.parameters())
    assert (head[0].weight.dtype, head.training, head[0].weight.requires_grad) == (torch.bfloat16, True, True)
    assert in_float32(copy) is copy
    head.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert in_float32(head) is head


def test_while_scoring() -> None:
    """No gradient, no dropout, no autocast, one at a time; afterwards, or after an error, all as before."""
    model = classifier().train()
    model.model.layers[0].eval()
    before = {part: part.training for part in model.modules()}
    lock = threading.RLock()
    taken: list[bool] = []

    def fail() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), for_scoring(model, lock):
            assert not any(part.training for part in model.modules())
            assert torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {part: part.training for part in model.modules()} == before
    assert taken == [False]
    assert not torch.is_inference_mode_enabled()
    assert lock.acquire(blocking=False)


def test_locks_are_the_models() -> None:
    """All scorers of a model wait for one another, also those that see it with another head; others do not."""
    model, other = classifier(), classifier()

    assert lock_of(model) is lock_of(model) is lock_of(model.model)
    assert lock_of(model) is not lock_of(other)
    held = len(body._locks)
    del model
    gc.collect()
    assert len(body._locks) < held


def test_right_padding() -> None:
    """Rows begin at the left; the mask counts their tokens."""
    ids, mask = pad_right([[1, 2, 3], [4], [5, 6]], 9, torch.device("cpu"))

    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_weights_have_a_digest() -> None:
    """The same for the same values wherever they lie; another for another value, shape, name or precision."""
    model = classifier()
    whole = {name: weight.clone() for name, weight in model.state_dict().items()}
    digest = weights_digest(model.state_dict())
    assert weights_digest(whole) == digest
    assert weights_digest(dict(reversed(whole.items()))) == digest
    assert weights_digest({name: torch.stack([w, w], -1)[..., 0] for name, w in whole.items()}) == digest

    name = "model.layers.1.mlp.up_proj.weight"
    changed = whole[name].clone()
    changed[0, 0] += 1e-3
    others = [
        {**whole, name: changed},
        {**whole, name: whole[name].reshape(-1)},
        {**whole, name: whole[name].bfloat16()},
        {**{n: w for n, w in whole.items() if n != name}, "renamed": whole[name]},
        {n: w for n, w in whole.items() if n != name},
        {**whole, name: whole[name].to("meta")},
    ]
    assert len({digest, *map(weights_digest, others)}) == len(others) + 1
    assert weights_digest({"a": torch.tensor(1.0), "b": torch.zeros(0), "c": torch.tensor([True])})


def test_a_large_weight_is_looked_at_all_over() -> None:
    """Also near its end, where adapters and later layers of a stack are."""
    weight = torch.zeros(5, 1_001)
    digest = weights_digest({"w": weight})
    for row in range(5):
        other = weight.clone()
        other[row] = 1
        assert weights_digest({"w": other}) != digest


def test_configs_have_a_digest() -> None:
    """Of what scores depend on: not of where the model came from, or how it is trained."""
    base = classifier().config
    same = classifier().config
    same.use_cache, same._name_or_path, same.architectures = False, "elsewhere", ["Other"]
    same.id2label = {0: "GOOD"}
    others = [
        classifier(rms_norm_eps=1e-3).config,
        classifier(pad_token_id=BOS).config,
        classifier(rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}).config,
        classifier(hidden_act="gelu").config,
    ]

    assert config_digest(same) == config_digest(base)
    assert len({config_digest(config) for config in (base, *others)}) == len(others) + 1


def test_tokenizers_have_a_digest(tmp_path: Any) -> None:
    """The same when loaded again; another with another vocabulary, special token or post-processor."""
    made = tokenizer()
    saved(classifier(), tmp_path, made)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(made)
    assert tokenizer_digest(tokenizer(side="left")) == tokenizer_digest(made)

    more = tokenizer()
    more.add_tokens(["<|new|>"])
    others = [more, tokenizer(bos=False), tokenizer(pad_token="</s>"), tokenizer(eos_token="<|end|>")]
    others += [tokenizer(bos_token="</s>", eos_token="<s>")]
    assert len({tokenizer_digest(each) for each in (made, *others)}) == len(others) + 1


def test_a_digest_does_not_depend_on_use() -> None:
    """A call that truncates or pads changes a fast tokenizer's state, not what it does to text."""
    made = tokenizer()
    before = model_fingerprint(classifier(), made)
    made(["abc", "abcdefgh"], truncation=True, max_length=4, padding=True)

    assert model_fingerprint(classifier(), made) == before


def test_any_bit_of_a_weight_counts() -> None:
    """Also one that no evenly spread sample would see."""
    weight = torch.zeros(1024, 1024)
    before = weights_digest({"a": weight})
    weight[5, 7] = 1e-6

    assert weights_digest({"a": weight}) != before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_have_a_digest() -> None:
    """The scale of a LoRA is in no weight; an idle adapter is in no score, and a disabled one neither."""
    from peft import LoraConfig, get_peft_model

    def lora(alpha: int) -> Any:
        torch.manual_seed(0)
        return get_peft_model(tiny.classifier(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))

    made = tiny.tokenizer()
    said = {alpha: model_fingerprint(lora(alpha), made) for alpha in (8, 64)}
    idle = lora(8)
    idle.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))

    assert said[8] != said[64]
    assert model_fingerprint(idle, made) == said[8]
    with idle.disable_adapter():
        assert model_fingerprint(idle, made)["adapters"] == {}


@pytest.mark.parametrize("kind", RAISED)
def test_errors_become_sentences(kind: type[Exception]) -> None:
    """Whatever their class; the library's own error is the cause."""
    with (
        pytest.raises(UnreadError, match=r"Linear does not read an input of 2 tokens: .*language unknown") as raised,
        reading_errors(nn.Linear(1, 1), 2),
    ):
        raise kind("language unknown")

    assert type(raised.value.__cause__) is kind


def test_memory_that_does_not_suffice_is_not_that() -> None:
    """Batches are halved by the error itself; and what is no error of a forward passes through."""
    for error in (
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
        KeyboardInterrupt(),
        FloatingPointError("nan"),
    ):
        with pytest.raises(type(error)), reading_errors(nn.Linear(1, 1), 2):
            raise error


def test_the_body_of_llama_4() -> None:
    """It names its body otherwise than it says, and gives itself as its decoder: a head would read logits."""
    small = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8, "vocab_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(**small, **heads, pad_token_id=0)).eval()
    assert body_of(model) is model.model
    assert body_of(model.model) is model.model
