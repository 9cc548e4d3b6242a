"""Policies from checkpoints: what the model in memory would write, loaded late, and nothing that cannot write."""

import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.continuous import ContinuousSampler
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.loading import LoadedSampler, load_sampler
from calibrated_rewards.samplers.protocol import Decoding, Particular, Rendering, Sampler

# peft asks the model by a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS, SEEDS, DECODING = ["Once upon", "a time"], [[1, 2, 3], [4]], Decoding(6, temperature=0.9)


def writer(**options: Any) -> Any:
    return tiny.causal(initializer_range=0.5, **options)


def saved(folder: Path, model: Any) -> str:
    return tiny.saved(model, folder, tiny.tokenizer())


def test_a_checkpoint_writes_what_the_model_would(tmp_path: Path) -> None:
    """Also after pickling, which carries no weights; nothing is loaded before it is used."""
    plain = HfSampler(writer(), tiny.tokenizer(), DECODING)
    loaded = load_sampler(saved(tmp_path, writer()), DECODING, show_progress=False, batch_tokens=999)
    again = pickle.loads(data := pickle.dumps(loaded))

    assert "sampler" not in vars(loaded)
    assert loaded(PROMPTS, SEEDS) == again(PROMPTS, SEEDS) == plain(PROMPTS, SEEDS)
    assert pickle.dumps(loaded) == data  # now that it has loaded, too
    assert len(data) < 1500
    assert (again, hash(again)) == (loaded, hash(loaded))
    assert loaded.sampler is loaded.sampler
    assert loaded.sampler.batch_tokens == 999
    assert not loaded.sampler.model.lm_head.weight.requires_grad
    assert loaded.fingerprint() == plain.fingerprint()
    assert all(isinstance(loaded, each) for each in (Sampler, Particular, Rendering))
    assert repr(loaded) == f"LoadedSampler({str(tmp_path)!r}, 'hf', {DECODING!r})"


def test_prompts_are_read_as_told(tmp_path: Path) -> None:
    """By a text's settings, and with a tokenizer that lies elsewhere."""
    writer().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    text = Text(chat=True, template="Q: {{ messages[0]['content'] }} A:")
    loaded = load_sampler(tmp_path / "model", DECODING, text=text, tokenizer=tmp_path / "words")

    assert isinstance(loaded, LoadedSampler)
    assert loaded.rendered("Why?") == "Q: Why? A:"
    with pytest.raises(ValueError, match="at most 512 tokens, got 606"):
        loaded.check(["x" * 600])


def test_precision_and_engine(tmp_path: Path) -> None:
    """Those asked for."""
    folder = saved(tmp_path, writer())
    halved = load_sampler(folder, DECODING, dtype="bf16")
    other = load_sampler(folder, DECODING, engine="continuous", batching={"num_blocks": 9})

    assert isinstance(halved, LoadedSampler)
    assert isinstance(other, LoadedSampler)
    assert halved.sampler.model.dtype == torch.bfloat16
    assert isinstance(other.sampler, ContinuousSampler)
    assert other.sampler.batching == {"num_blocks": 9}


def test_an_adapter_writes_on_top_of_its_base(tmp_path: Path) -> None:
    """What the PEFT model in memory writes, which is not what its base writes; the base may have moved."""
    base = saved(tmp_path / "base", writer())
    torch.manual_seed(1)
    model = peft.get_peft_model(writer(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(base, "moved/away"))
    loaded = load_sampler(tmp_path / "adapter", DECODING, base=base)
    expected = HfSampler(model.eval(), tiny.tokenizer(), DECODING)(PROMPTS, SEEDS)

    assert loaded(PROMPTS, SEEDS) == expected
    assert load_sampler(base, DECODING)(PROMPTS, SEEDS) != expected


def test_what_cannot_write_is_refused_at_once(tmp_path: Path) -> None:
    """A reward model, an encoder, an encoder-decoder, custom code that is not allowed, and no checkpoint at all."""
    small = {"vocab_size": tiny.VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=8))
    t5 = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    own = writer()
    own.config.auto_map = {"AutoModelForCausalLM": "mine.Mine"}
    own.config.architectures = ["Mine"]
    cases = {
        r"\(LlamaForSequenceClassification\) gives scores": tiny.classifier(),
        r"\(BertForMaskedLM\) gives scores or fills in words": bert,
        r"is an encoder-decoder \(T5": T5ForConditionalGeneration(t5),
    }

    for i, (message, model) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            load_sampler(saved(tmp_path / str(i), model), DECODING)
    folder = Path(saved(tmp_path / "own", writer()))
    config = (folder / "config.json").read_text().replace("LlamaForCausalLM", "Mine")
    (folder / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModelForCausalLM": "mine.Mine"},', 1))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_sampler(folder, DECODING)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_sampler("./nowhere", DECODING)


def test_a_missing_head_is_not_made_up(tmp_path: Path) -> None:
    """Weights that are not there would be random ones."""
    folder = saved(tmp_path, writer())
    weights = {name: w for name, w in load_file(tmp_path / "model.safetensors").items() if "lm_head" not in name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    with pytest.raises(ValueError, match="no weights for lm_head"):
        load_sampler(folder, DECODING)(PROMPTS, SEEDS)


def test_what_it_is_told_is_checked(tmp_path: Path) -> None:
    """The engine, and its options."""
    folder = saved(tmp_path, writer())

    with pytest.raises(ValueError, match="one of hf, continuous, vllm, got engine='sglang'"):
        load_sampler(folder, DECODING, engine="sglang")
    with pytest.raises(TypeError, match="the engine hf takes no max_model_len=; it takes batch_tokens, "):
        load_sampler(folder, DECODING, max_model_len=9)
    with pytest.raises(TypeError, match="engine='vllm' takes no device_map="):
        load_sampler(folder, DECODING, engine="vllm", device_map="auto")
