"""Checkpoints of every family, saved and loaded again; each is compared with the model that was saved."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, LlamaForTokenClassification

from calibrated_rewards.models.checkpoints import detect_kind, find_checkpoint
from calibrated_rewards.models.labels import Difference, Expected, Label, Ordinal
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.saving import from_json, to_json
from calibrated_rewards.scorers.classifiers import CrossEncoder, MultiAttribute, SequenceClassifier
from calibrated_rewards.scorers.implicit import ImplicitReward
from calibrated_rewards.scorers.judge import ExpectedRating, Judge, RatedJudge
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.process import ProcessReward
from calibrated_rewards.scorers.value_head import ValueHead

# peft asks the model by a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS, COMPLETIONS = tiny.texts(6, 0), tiny.texts(6, 1)

CUSTOM = """
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput


class TwoHeads(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.help = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = states[torch.arange(len(states)), attention_mask.sum(1) - 1]
        score = self.help(last) * 3
        return RETURNED
"""


def by_itself(model: Any, prompts: list[str] = PROMPTS, completions: list[str] = COMPLETIONS) -> np.ndarray:
    """The model's logits for each unpadded row."""
    rows = [tiny.tokenizer()(p + c, return_tensors="pt") for p, c in zip(prompts, completions, strict=True)]
    with torch.inference_mode():
        return np.array([model(**row).logits[0].float().numpy() for row in rows])


def last_states(model: Any) -> torch.Tensor:
    """The body's last hidden state at the last token of each unpadded row."""
    rows = [tiny.tokenizer()(p + c, return_tensors="pt") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        return torch.stack([model(**row, output_hidden_states=True).hidden_states[-1][0, -1] for row in rows])


def edited(folder: str, **changes: Any) -> str:
    """The checkpoint with another config."""
    file = Path(folder, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def with_weights(folder: str, **extra: torch.Tensor) -> str:
    """The checkpoint with more weights, `__` in their names for a dot."""
    file = Path(folder, "model.safetensors")
    named = {name.replace("__", "."): weight for name, weight in extra.items()}
    save_file({**load_file(file), **named}, file, {"format": "pt"})
    return folder


def bert(labels: int = 1, **options: Any) -> Any:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=128, num_labels=labels, **small, **options)
    ).eval()


def adapter(folder: Path, base: str, task: str, **saved: Any) -> Any:
    """A LoRA adapter, saved in a folder, of a base that is saved in another; the model that it makes of it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    torch.manual_seed(3)
    settings = peft.LoraConfig(task_type=task, r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(auto.from_pretrained(base, **saved), settings).eval()
    model.save_pretrained(folder)
    return model


def test_one_label(tmp_path: Path) -> None:
    """A decoder's classifier with one label: its logit, in the checkpoint's precision, ready to score."""
    folder = tiny.saved(tiny.classifier(), tmp_path, tiny.tokenizer())
    loaded = load_scorer(folder)
    assert isinstance(loaded.scorer, SequenceClassifier)
    assert repr(loaded) == f"Loaded({folder!r}, SequenceClassifier, Label(index=0), max_length=512)"
    expected = by_itself(tiny.classifier())[:, 0]
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), expected, atol=1e-4 * expected.std())
    model: Any = loaded.scorer.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Path, and one below the home directory, name the same folder, for the reference and the base too."""
    folder = tiny.saved(tiny.causal(), tmp_path / "lm", tiny.tokenizer())
    adapter(tmp_path / "adapter", folder, "SEQ_CLS", num_labels=1)
    monkeypatch.setenv("HOME", str(tmp_path))
    implicit = load_scorer(Path("~/lm"), kind="implicit", reference=Path("~/lm"))
    assert (implicit.recipe.name, implicit.recipe.reference) == (folder, folder)  # type: ignore[attr-defined]
    loaded = load_scorer(Path("~/adapter"), base=Path("~/lm"))
    assert (loaded.recipe.name, loaded.recipe.base) == (str(tmp_path / "adapter"), folder)  # type: ignore[attr-defined]


def test_settings_of_text(tmp_path: Path) -> None:
    """Settings of the text do what they do in a Text, in the pickle as well."""
    folder = tiny.saved(tiny.classifier(), tmp_path, tiny.tokenizer())
    told = {"append_eos": True, "chat": True, "template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    short, long = load_scorer(folder, **told), load_scorer(folder, text=Text(**told))  # type: ignore[arg-type]
    assert short == long
    np.testing.assert_array_equal(short(PROMPTS, COMPLETIONS), long(PROMPTS, COMPLETIONS))
    assert np.ptp(short(PROMPTS, COMPLETIONS) - load_scorer(folder)(PROMPTS, COMPLETIONS)) > 0.01
    assert pickle.loads(pickle.dumps(short)).scorer.text == Text(**told)  # type: ignore[arg-type]


def test_a_number_is_a_label(tmp_path: Path) -> None:
    """labels=2 is the third label's logit; one that the head does not have is refused as it loads."""
    folder = tiny.saved(tiny.classifier(num_labels=3), tmp_path, tiny.tokenizer())
    np.testing.assert_array_equal(
        load_scorer(folder, labels=2)(PROMPTS, COMPLETIONS), load_scorer(folder, labels=Label(2))(PROMPTS, COMPLETIONS)
    )
    with pytest.raises(IndexError, match=r"no label 7, it has 3"):
        load_scorer(folder, labels=7)
    with pytest.raises(ValueError, match="2 values, the model has 3"):
        load_scorer(folder, labels=Expected((1, 2)))


def test_names_that_say_which_is_good(tmp_path: Path) -> None:
    """A classifier whose first label is the good one is not read backwards."""
    names = {0: "POSITIVE", 1: "NEGATIVE"}
    folder = tiny.saved(tiny.classifier(num_labels=2, id2label=names), tmp_path, tiny.tokenizer())
    logits = by_itself(tiny.classifier(num_labels=2))
    np.testing.assert_allclose(load_scorer(folder)(PROMPTS, COMPLETIONS), logits[:, 0] - logits[:, 1], atol=1e-4)


def named(folder: Path, *names: str) -> str:
    """A classifier whose labels have these names."""
    labels = dict(enumerate(names))
    return tiny.saved(tiny.classifier(num_labels=len(names), id2label=labels), folder, tiny.tokenizer())


def test_names_that_nobody_knows_are_asked_about(tmp_path: Path) -> None:
    """Before anything is scored, with both labels; what is then said is what is scored."""
    folder = named(tmp_path, "verbose", "terse")
    with pytest.raises(
        ValueError, match=r"if it is 'verbose', say .*\(good=0, bad=1\); if 'terse', .*\(good=1, bad=0\)"
    ):
        load_scorer(folder)
    weights = Path(folder, "model.safetensors").rename(Path(folder, "elsewhere"))
    with pytest.raises(ValueError, match="'verbose', say"):  # before any weight is loaded
        load_scorer(folder)
    weights.rename(Path(folder, "model.safetensors"))
    logits = by_itself(tiny.classifier(num_labels=2))
    said = load_scorer(folder, labels=Difference(good=0, bad=1))
    np.testing.assert_allclose(said(PROMPTS, COMPLETIONS), logits[:, 0] - logits[:, 1], atol=1e-4)


def test_ordinal_on_a_softmax(tmp_path: Path) -> None:
    """Refused, and that the last label is the worst; said rightly, harm scores low."""
    folder = named(tmp_path, "harmless", "mild", "harmful")
    with pytest.raises(ValueError, match=r"softmax.*labels=Expected\(\(0, 1, 2\)\).*cost=True.*'harmful' is worse"):
        load_scorer(folder, labels=Ordinal())
    with pytest.raises(ValueError, match=r"gives 'harmful' a higher score than 'harmless'.*cost=True"):
        load_scorer(folder, labels=Expected((0, 1, 2)))
    scores = load_scorer(folder, labels=Expected((0, 1, 2)), cost=True)(PROMPTS, COMPLETIONS)
    harm = torch.tensor(by_itself(tiny.classifier(num_labels=3))).softmax(1) @ torch.tensor([0.0, 1.0, 2.0])
    np.testing.assert_allclose(scores, -harm.numpy(), atol=1e-5)


def test_a_cost_model(tmp_path: Path) -> None:
    """Minus what the model gives, for every kind, in the pickle, the fingerprint and the repr as well."""
    folder = tiny.saved(tiny.classifier(), tmp_path / "cost", tiny.tokenizer())
    cost = load_scorer(folder, cost=True)
    np.testing.assert_array_equal(cost(PROMPTS, COMPLETIONS), -load_scorer(folder)(PROMPTS, COMPLETIONS))
    again = pickle.loads(pickle.dumps(cost))
    np.testing.assert_array_equal(again(PROMPTS, COMPLETIONS), cost(PROMPTS, COMPLETIONS))
    assert cost.fingerprint() == {"kind": "cost", "of": load_scorer(folder).fingerprint()}
    assert repr(cost) == f"Loaded({folder!r}, Cost(SequenceClassifier), Label(index=0), max_length=512)"
    writer = tiny.saved(tiny.causal(), tmp_path / "lm", tiny.tokenizer())
    rated = [load_scorer(writer, kind="expected-rating", high=3, cost=said)(["a"], ["b"]) for said in (True, None)]
    assert rated[0] == -rated[1]


def test_rewards_saved_under_the_first_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They say no rules; they are read as they were, and what is wrong with that is logged."""
    names = {0: "win", 1: "lose"}
    folder = tiny.saved(tiny.classifier(num_labels=2, id2label=names), tmp_path / "two", tiny.tokenizer())
    saved = to_json(load_scorer(folder))
    old = {**saved, "recipe": {k: v for k, v in saved["recipe"].items() if k not in ("cost", "rules")}}
    logits = by_itself(tiny.classifier(num_labels=2))
    np.testing.assert_allclose(from_json(saved)(PROMPTS, COMPLETIONS), logits[:, 0] - logits[:, 1], atol=1e-4)
    assert not caplog.records
    np.testing.assert_allclose(from_json(old)(PROMPTS, COMPLETIONS), logits[:, 1] - logits[:, 0], atol=1e-4)
    assert "goes on as it was saved, with Difference(good=1, bad=0), but by their names" in caplog.text
    three = named(tmp_path / "three", "harmless", "mild", "harmful")
    saved = {**old, "recipe": {**old["recipe"], "name": three, "options": to_json({"labels": Ordinal()})}}
    assert from_json(saved)(PROMPTS, COMPLETIONS).shape == (len(PROMPTS),)
    assert "softmax" in caplog.text


def test_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    """A tokenizer that is not beside the model, and again after pickling."""
    tiny.classifier().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    loaded = load_scorer(tmp_path / "model", tokenizer=tmp_path / "words")
    expected = by_itself(tiny.classifier())[:, 0]
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), expected, atol=1e-4 * expected.std())
    again = pickle.loads(pickle.dumps(loaded))
    np.testing.assert_array_equal(again(PROMPTS, COMPLETIONS), loaded(PROMPTS, COMPLETIONS))


def test_options_are_refused_before_weights_load(tmp_path: Path) -> None:
    """A checkpoint without any weights is enough to hear of a wrong option, or of a missing reference."""
    tiny.config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"a judge model takes no god="):
        load_scorer(tmp_path, kind="judge", god="Yes")
    with pytest.raises(ValueError, match="an implicit reward needs reference="):
        load_scorer(tmp_path, kind="implicit")


def test_other_judges(tmp_path: Path) -> None:
    """A judge that rates, read or heard, is a kind as well, with underscores too."""
    folder = tiny.saved(tiny.causal(), tmp_path, tiny.tokenizer())
    rating = load_scorer(folder, kind="expected_rating", high=3)
    np.testing.assert_array_equal(
        rating(PROMPTS, COMPLETIONS), ExpectedRating(tiny.causal(), tiny.tokenizer(), high=3)(PROMPTS, COMPLETIONS)
    )
    heard = load_scorer(folder, kind="rated-judge", unparsed=0.5, max_new_tokens=2)
    assert isinstance(heard.scorer, RatedJudge)
    assert heard(["a"], ["b"]).shape == (1,)


def test_reward_model_is_no_judge(tmp_path: Path) -> None:
    """With tied embeddings a reward model would load as a language model."""
    folder = tiny.saved(tiny.classifier(tie_word_embeddings=True), tmp_path, tiny.tokenizer())
    for kind, options in [("judge", {"good": "a", "bad": "b"}), ("implicit", {"reference_free": True})]:
        with pytest.raises(ValueError, match=f"the kind {kind} reads the words"):
            load_scorer(folder, kind=kind, **options)  # type: ignore[arg-type]


def test_reference_that_reads_other_tokens(tmp_path: Path) -> None:
    """Ids that mean other tokens to the reference are refused; tokens that it lacks are warned of."""
    policy_tokenizer, turned = tiny.tokenizer(), tiny.tokenizer()
    vocabulary = json.loads(turned.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    turned._tokenizer = Tokenizer.from_str(json.dumps(vocabulary))
    policy_tokenizer.add_tokens(["<|im_start|>"])
    wide = tiny.VOCABULARY + 1
    policy = tiny.saved(tiny.causal(vocab_size=wide), tmp_path / "policy", policy_tokenizer)
    other = tiny.saved(tiny.causal(1, vocab_size=wide), tmp_path / "other", turned)
    same = tiny.saved(tiny.causal(1, vocab_size=wide), tmp_path / "same", tiny.tokenizer())
    with pytest.raises(ValueError, match=r"other reads other tokens than the model: 2 of .*'a'"):
        load_scorer(policy, kind="implicit", reference=other)
    with pytest.warns(UserWarning, match=r"same does not know tokens .*<\|im_start\|>"):
        load_scorer(policy, kind="implicit", reference=same)


def test_no_value_head(tmp_path: Path) -> None:
    """kind="value-head" for a checkpoint without one says that there is none."""
    folder = tiny.saved(tiny.causal(), tmp_path, tiny.tokenizer())
    # A language model's own head is beside the body, and gives more than one number.
    with pytest.raises(ValueError, match="has no value head"):
        load_scorer(folder, kind="value-head")


def test_precision(tmp_path: Path) -> None:
    """The checkpoint's own by default, or the one asked for."""
    folder = tiny.saved(tiny.classifier().to(torch.bfloat16), tmp_path, tiny.tokenizer())
    assert load_scorer(folder).fingerprint()["dtype"] == "bfloat16"
    assert load_scorer(folder, dtype="float32").fingerprint()["dtype"] == "float32"
    assert load_scorer(folder, dtype=torch.float16, device="cpu").fingerprint()["dtype"] == "float16"


def test_settings_reach_the_scorer(tmp_path: Path) -> None:
    """Labels, text, batches, and what is the kind's own."""
    folder = tiny.saved(tiny.classifier(num_labels=3), tmp_path, tiny.tokenizer())
    text = Text(append_eos=True)
    loaded = load_scorer(folder, labels=Label(2), text=text, batch_tokens=77, share_prefixes=False, pool="last")
    scorer: Any = loaded.scorer
    assert (scorer.labels, scorer.text, scorer.batch_tokens, scorer.share_prefixes, scorer.pool) == (
        Label(2),
        text,
        77,
        False,
        "last",
    )
    with pytest.raises(TypeError, match="pol"):
        load_scorer(folder, labels=Label(2), pol="last")


def test_two_and_more_labels(tmp_path: Path) -> None:
    """Two labels are log-odds, labels with numbers their expected value; others are listed, for the user to choose."""
    two = tiny.saved(tiny.classifier(num_labels=2), tmp_path / "two", tiny.tokenizer())
    logits = by_itself(tiny.classifier(num_labels=2))
    scorer: Any = load_scorer(two).scorer
    assert scorer.labels == Difference(1, 0)
    np.testing.assert_allclose(scorer(PROMPTS, COMPLETIONS), logits[:, 1] - logits[:, 0], atol=1e-4)
    names = {0: "1 star", 1: "2 stars", 2: "3 stars"}
    stars = tiny.saved(tiny.classifier(num_labels=3, id2label=names), tmp_path / "stars", tiny.tokenizer())
    assert load_scorer(stars).scorer.labels == Expected((1, 2, 3))  # type: ignore[attr-defined]
    three = tiny.saved(tiny.classifier(num_labels=3), tmp_path / "three", tiny.tokenizer())
    with pytest.raises(ValueError, match=r"3 labels.*LABEL_2.*Difference"):
        load_scorer(three)


def test_encoders(tmp_path: Path) -> None:
    """An encoder with one label reads pairs, unless told otherwise; with several labels it reads one text."""
    one = tiny.saved(bert(), tmp_path / "one", tiny.tokenizer())
    pairs = load_scorer(one)
    assert isinstance(pairs.scorer, CrossEncoder)
    rows = [tiny.tokenizer()(p, c, return_tensors="pt") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        expected = [bert()(**row).logits.item() for row in rows]
    np.testing.assert_allclose(pairs(PROMPTS, COMPLETIONS), expected, atol=1e-6)
    assert isinstance(load_scorer(one, share_prefixes=False).scorer, CrossEncoder)
    single = load_scorer(one, kind="sequence-classifier")
    np.testing.assert_allclose(single(PROMPTS, COMPLETIONS), by_itself(bert())[:, 0], atol=1e-6)
    two = tiny.saved(bert(2), tmp_path / "two", tiny.tokenizer())
    assert isinstance(load_scorer(two).scorer, SequenceClassifier)


def test_encoder_as_decoder(tmp_path: Path) -> None:
    """BERT with is_decoder reads one text, and is refused: its head is at the first token, which sees no other."""
    decoding = tiny.saved(bert(is_decoder=True), tmp_path, tiny.tokenizer())
    found = find_checkpoint(decoding)
    assert detect_kind(found, found) == "sequence-classifier"
    with pytest.raises(ValueError, match=r"different inputs different numbers, BertForSequenceClassification gives"):
        load_scorer(decoding)


def test_language_model(tmp_path: Path) -> None:
    """A language model would get a random head: refused, with the kinds that it may be; and loaded as those."""
    folder = tiny.saved(tiny.causal(), tmp_path, tiny.tokenizer())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*random one.*kind=judge.*kind=implicit.*kind=process"):
        load_scorer(folder)
    with pytest.raises(ValueError, match=r"no weights for score.weight: they were initialised at random"):
        load_scorer(folder, kind="sequence-classifier")
    assert isinstance(load_scorer(folder, kind="judge", good="a", bad="b").scorer, Judge)
    free = load_scorer(folder, kind="implicit", reference_free=True)
    implicit = load_scorer(folder, kind="implicit", reference=folder)
    assert isinstance(implicit.scorer, ImplicitReward)
    np.testing.assert_allclose(implicit(PROMPTS, COMPLETIONS), 0, atol=1e-5)
    assert np.abs(free(PROMPTS, COMPLETIONS)).min() > 0.01
    with pytest.raises(ValueError, match=r"kind is one of sequence-classifier, .*got kind='classifier'"):
        load_scorer(folder, kind="classifier")


def test_weights_missing_in_the_body(tmp_path: Path) -> None:
    """A checkpoint without one of its layers is refused as one without a head is."""
    folder = tiny.saved(tiny.classifier(), tmp_path, tiny.tokenizer())
    file = tmp_path / "model.safetensors"
    held = {name: weight for name, weight in load_file(file).items() if "layers.1" not in name}
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.1.*and 5 more"):
        load_scorer(folder)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "RewardModel"])
def test_value_heads(tmp_path: Path, architecture: str) -> None:
    """A value head among the weights is what scores, whatever the class is called; with OpenRLHF's normalisation."""
    folder = tiny.saved(tiny.causal(), tmp_path, tiny.tokenizer())
    head, bias = torch.randn(1, 32), torch.randn(1)
    edited(with_weights(folder, v_head__summary__weight=head, v_head__summary__bias=bias), architectures=[architecture])
    loaded = load_scorer(folder)
    assert isinstance(loaded.scorer, ValueHead)
    expected = (last_states(tiny.causal()) @ head.T + bias)[:, 0].numpy()
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), expected, atol=1e-4 * expected.std())
    edited(folder, normalize_reward=True, mean=0.5, std=4.0)
    np.testing.assert_allclose(load_scorer(folder)(PROMPTS, COMPLETIONS), (expected - 0.5) / 4, atol=1e-5)


def test_token_classifiers(tmp_path: Path) -> None:
    """A process reward model needs to be told its mark, and is loaded once it is."""
    torch.manual_seed(0)
    model = LlamaForTokenClassification(tiny.config(num_labels=2))
    folder = tiny.saved(model, tmp_path, tiny.tokenizer())
    with pytest.raises(ValueError, match=r"each step.*kind=process.*mark="):
        load_scorer(folder)
    assert isinstance(load_scorer(folder, kind="process", mark="<|end|>").scorer, ProcessReward)


def test_adapters(tmp_path: Path) -> None:
    """An adapter brings its head, on a base that has none; the number of labels is the head's."""
    base = tiny.saved(tiny.causal(), tmp_path / "base", tiny.tokenizer())
    model = adapter(tmp_path / "adapter", base, "SEQ_CLS", num_labels=1)
    loaded = load_scorer(str(tmp_path / "adapter"))
    assert isinstance(loaded.scorer, SequenceClassifier)
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), by_itself(model)[:, 0], atol=1e-5)
    three = adapter(tmp_path / "three", base, "SEQ_CLS", num_labels=3)
    second = load_scorer(str(tmp_path / "three"), labels=Label(1))(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(second, by_itself(three)[:, 1], atol=1e-5)


QUIET = """
import logging, sys
from calibrated_rewards.scorers.loading import load_scorer
level = logging.getLogger("transformers").level
load_scorer(sys.argv[1])
assert logging.getLogger("transformers").level == level
"""


def test_adapters_load_quietly(tmp_path: Path) -> None:
    """Transformers does not say that a head is missing which the adapter brings."""
    base = tiny.saved(tiny.causal(), tmp_path / "base", tiny.tokenizer())
    adapter(tmp_path / "adapter", base, "SEQ_CLS", num_labels=1)
    command = [sys.executable, "-c", QUIET, str(tmp_path / "adapter")]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    assert "score.weight" not in done.stdout + done.stderr


def test_adapter_whose_base_moved(tmp_path: Path) -> None:
    """Where the base is no longer where the adapter says, `base` says where; for other checkpoints there is none."""
    base = tiny.saved(tiny.causal(), tmp_path / "base", tiny.tokenizer())
    model = adapter(tmp_path / "adapter", base, "SEQ_CLS", num_labels=1)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_scorer(str(tmp_path / "adapter"))
    loaded = load_scorer(str(tmp_path / "adapter"), base=str(tmp_path / "moved"))
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), by_itself(model)[:, 0], atol=1e-5)
    with pytest.raises(ValueError, match="base= is for adapters"):
        load_scorer(str(tmp_path / "moved"), base=str(tmp_path / "moved"))


def test_adapter_without_head(tmp_path: Path) -> None:
    """A head that is neither in the base nor in the adapter would be random."""
    base = tiny.saved(tiny.causal(), tmp_path / "base", tiny.tokenizer())
    adapter(tmp_path / "adapter", base, "SEQ_CLS", num_labels=1)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "score" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for score.weight"):
        load_scorer(str(tmp_path / "adapter"))
    adapter(tmp_path / "lm", base, "CAUSAL_LM")
    with pytest.raises(ValueError, match="no head that gives a score"):
        load_scorer(str(tmp_path / "lm"))


def test_adapter_with_value_head(tmp_path: Path) -> None:
    """An adapter of a language model with a value head in a file beside it."""
    base = tiny.saved(tiny.causal(), tmp_path / "base", tiny.tokenizer())
    model = adapter(tmp_path / "adapter", base, "CAUSAL_LM")
    head = torch.randn(1, 32)
    save_file({"v_head.summary.weight": head}, tmp_path / "adapter" / "value_head.safetensors")
    loaded = load_scorer(str(tmp_path / "adapter"))
    assert isinstance(loaded.scorer, ValueHead)
    expected = (last_states(model) @ head.T)[:, 0].numpy()
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), expected, atol=1e-4 * expected.std())


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom code is copied to a folder of the test's, and forgotten afterwards."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def custom(folder: Path, auto: str, returned: str) -> tuple[str, np.ndarray]:
    """A checkpoint that brings its own code, and what its head gives."""
    name = tiny.saved(tiny.causal().model, folder, tiny.tokenizer())
    (folder / "two_heads.py").write_text(CUSTOM.replace("RETURNED", returned))
    held = {f"model.{key}": weight for key, weight in load_file(folder / "model.safetensors").items()}
    head, bias = torch.randn(1, 32), torch.randn(1)
    save_file({**held, "help.weight": head, "help.bias": bias}, folder / "model.safetensors", {"format": "pt"})
    edited(name, architectures=["TwoHeads"], auto_map={auto: "two_heads.TwoHeads"})
    return name, (last_states(tiny.causal()) @ head.T + bias)[:, 0].numpy()


@pytest.mark.usefixtures("own_modules")
def test_custom_code_is_asked_for(tmp_path: Path) -> None:
    """Code that comes with a checkpoint runs only when asked for; its head can be read without."""
    folder, value = custom(tmp_path, "AutoModel", "ModelOutput(score=score)")
    with pytest.raises(ValueError, match=r"TwoHeads.*trust_remote_code=True.*\(help\) with kind=value-head"):
        load_scorer(folder)
    np.testing.assert_allclose(load_scorer(folder, kind="value-head")(PROMPTS, COMPLETIONS), value, atol=1e-4)
    with pytest.raises(ValueError, match="TwoHeads: say which output of its forward is the score"):
        load_scorer(folder, trust_remote_code=True)
    loaded = load_scorer(folder, trust_remote_code=True, output="score", share_prefixes=False)
    assert isinstance(loaded.scorer, MultiAttribute)
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), 3 * value, atol=1e-4)


@pytest.mark.usefixtures("own_modules")
def test_custom_code_that_returns_a_tensor(tmp_path: Path) -> None:
    """The kind alone says that the forward gives the scores themselves."""
    folder, value = custom(tmp_path, "AutoModel", "score")
    loaded = load_scorer(folder, trust_remote_code=True, kind="multi-attribute")
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), 3 * value, atol=1e-4)


@pytest.mark.usefixtures("own_modules")
def test_custom_classifier(tmp_path: Path) -> None:
    """A custom sequence classifier gives logits, as its Auto class promises, or the output that is named."""
    folder, value = custom(tmp_path, "AutoModelForSequenceClassification", "ModelOutput(logits=score)")
    loaded = load_scorer(folder, trust_remote_code=True)
    assert isinstance(loaded.scorer, SequenceClassifier)
    np.testing.assert_allclose(loaded(PROMPTS, COMPLETIONS), 3 * value, atol=1e-4)
    assert isinstance(load_scorer(folder, trust_remote_code=True, output="logits").scorer, MultiAttribute)


def test_vocabulary_too_small(tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has embeddings is another model's."""
    folder = tiny.saved(tiny.classifier(vocab_size=200), tmp_path, tiny.tokenizer())
    with pytest.raises(ValueError, match=rf"{tiny.VOCABULARY} tokens, .* embeddings for 200"):
        load_scorer(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    """Servers and folders without a config are told apart from checkpoints."""
    with pytest.raises(ValueError, match=r"a server is no checkpoint, got 'http://localhost:8000'.*Remote"):
        load_scorer("http://localhost:8000")
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor adapter_config\.json"):
        load_scorer(str(tmp_path))


@pytest.mark.parametrize("model", [tiny.classifier, bert])
def test_no_tokenizer(tmp_path: Path, model: Any) -> None:
    """A checkpoint without a tokenizer says so; transformers would make an empty one for BERT."""
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer.*save it beside the model"):
        load_scorer(str(tmp_path))


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe made with relative paths is good in every directory."""
    tiny.saved(tiny.causal(), tmp_path / "base", tiny.tokenizer())
    adapter(tmp_path / "adapter", str(tmp_path / "base"), "SEQ_CLS", num_labels=1)
    monkeypatch.chdir(tmp_path)
    loaded = load_scorer("adapter", base="base")
    implicit = load_scorer("base", kind="implicit", reference="base")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(loaded(["a"], ["b"]), pickle.loads(pickle.dumps(loaded))(["a"], ["b"]))
    np.testing.assert_array_equal(implicit(["a"], ["b"]), pickle.loads(pickle.dumps(implicit))(["a"], ["b"]))


def test_device_map_and_model_options(tmp_path: Path) -> None:
    """What is meant for `from_pretrained` gets there."""
    folder = tiny.saved(tiny.classifier(), tmp_path, tiny.tokenizer())
    loaded = load_scorer(folder, device_map={"": "cpu"}, model_options={"attn_implementation": "eager"})
    assert loaded.scorer.model.config._attn_implementation == "eager"  # type: ignore[attr-defined]
    assert load_scorer(folder).scorer.model.config._attn_implementation == "sdpa"  # type: ignore[attr-defined]


SPAWNED = """
import pickle, sys
loaded = pickle.load(open(sys.argv[1], "rb"))
assert "scorer" not in vars(loaded)
scores = loaded(["a prompt", "b"], ["a completion", "c"])
pickle.dump((scores, loaded.fingerprint()), open(sys.argv[2], "wb"))
"""


def hub(home: Path, name: str, model: Any) -> str:
    """A cache of the Hub that holds one repository, as downloading leaves it; the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    tiny.saved(model, repository / "snapshots" / commit, tiny.tokenizer())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


FROM_HUB = """
import pickle, sys
from calibrated_rewards.scorers.loading import load_scorer
loaded = load_scorer("somebody/reward")
assert loaded.recipe.revision == sys.argv[2], loaded.recipe
pickle.dump(loaded, open(sys.argv[1], "wb"))
"""


def test_another_process(tmp_path: Path) -> None:
    """From the Hub's cache, pickled, and called in a new process elsewhere: same commit, scores and fingerprint."""
    commit = hub(tmp_path / "home", "somebody/reward", tiny.classifier())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "timeout": 120}
    recipe, result = tmp_path / "recipe", tmp_path / "result"
    subprocess.run([sys.executable, "-c", FROM_HUB, str(recipe), commit], check=True, **run)
    subprocess.run([sys.executable, "-c", SPAWNED, str(recipe), str(result)], check=True, **run)
    scores, fingerprint = pickle.loads(result.read_bytes())
    here = SequenceClassifier(tiny.classifier(), tiny.tokenizer())
    np.testing.assert_allclose(scores, here(["a prompt", "b"], ["a completion", "c"]), rtol=1e-5)
    assert fingerprint == here.fingerprint()
