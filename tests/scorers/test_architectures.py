"""Bodies that users bring: scores and probabilities are those of the model's own forward, row by row."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import ALL, CLASSIFIERS, NOT_CAUSAL, POSITIONS, WRITERS, one_by_one, small_model
from safetensors.torch import load_file, save_file
from tiny import BOS, EOS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from calibrated_rewards.models.parts import positions_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.hf import HfSampler, Task
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.policy import Draft
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.value_head import ValueHead

NEAR = 1e-4
PROMPTS = [prompt * 3 for prompt in tiny.texts(2, seed=1, longest=27) for _ in range(2)] + ["", ""]
COMPLETIONS = [*tiny.texts(4, seed=2), "a", "ab"]
# They pool by fours, or shift, so that a row of one or two tokens is an error of their own.
LONGER = {"canine": 4, "funnel": 5}


def test_there_are_ninety() -> None:
    """Classifiers that the tests name; none of those by model type is one of the others."""
    assert len(ALL) + len(set(CLASSIFIERS)) >= 90


def ids_of(model: Any) -> list[list[int]]:
    """The token ids of the texts: an encoder-decoder's end in EOS."""
    end = [EOS] if model.config.is_encoder_decoder else []
    rows = tiny.tokenizer()([p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])["input_ids"]
    return [row + end for row in rows]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_are_the_models_own(name: str) -> None:
    """Rows of two tokens to many, prompts shared or not, and then one as long as the model reads."""
    model = small_model(AutoModelForSequenceClassification, name)
    text = Text(append_eos=model.config.is_encoder_decoder)
    rows, untouched = ids_of(model), copy.deepcopy(model)
    scorer = SequenceClassifier(model, tiny.tokenizer(), text=text, show_progress=False)
    scorer.try_out()
    found = scorer.logits(PROMPTS, COMPLETIONS)
    length = positions_of(model) or POSITIONS
    long = SequenceClassifier(
        model, tiny.tokenizer(), text=Text(length, append_eos=text.append_eos), show_progress=False
    )
    with pytest.warns(UserWarning, match=f"max_length={length} "):
        longest = long.logits(["abcdefgh" * 40], [""])

    readable = [i for i, row in enumerate(rows) if len(row) >= LONGER.get(name, 1)]
    whole = tiny.tokenizer()(["abcdefgh" * 40])["input_ids"][0] + [EOS] * text.append_eos
    own = np.concatenate([one_by_one(copy.deepcopy(untouched), [rows[i]]) for i in readable])
    assert (np.abs(found[readable] - own) / own.std(0)).max() < NEAR
    assert np.isfinite(found).all()
    kept = [BOS, *whole[len(whole) - length + 1 :]]
    np.testing.assert_allclose(longest, one_by_one(untouched, [kept]), rtol=1e-4, atol=1e-4 * own.std())


def test_short_rows_are_read_as_padded_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Canine reads four tokens: shorter rows are padded to them, whatever came before, and that is said."""
    model = small_model(AutoModelForSequenceClassification, "canine")
    made = tiny.tokenizer(bos=False)
    with torch.no_grad():
        mask = torch.tensor([[1, 1, 0, 0]])
        own = float(model(input_ids=torch.tensor([[*made("ab")["input_ids"], 0, 0]]), attention_mask=mask).logits)
    for before in (["ab"], ["ab", "abcdefgh"], ["abc", "ab"]):
        scorer = SequenceClassifier(model, made, show_progress=False)
        scores = dict(zip(before, scorer([""] * len(before), before), strict=True))
        assert scores["ab"] == pytest.approx(own, abs=1e-4)

    assert "CanineForSequenceClassification does not read 2 tokens: inputs are padded to 4" in caplog.text


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "xmod",
            {"default_language": None},
            r"XmodForSequenceClassification does not read .* ValueError: Input language",
        ),
        ("nystromformer", {"num_landmarks": 8, "segment_means_seq_len": 64}, "does not read an input of 17 tokens"),
        ("mra", {}, "MraForSequenceClassification gives .* to two: its head is empty, or it lacks a kernel"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, changed: dict[str, Any], message: str) -> None:
    """Before the first text, with the library's own reason in a sentence."""
    model = small_model(AutoModelForSequenceClassification, name, **changed)
    if name == "xmod":
        model.config.default_language = None

    with pytest.raises(ValueError, match=message):
        SequenceClassifier(model, tiny.tokenizer(), show_progress=False).try_out()


def test_random_numbers_of_a_forward_are_its_own() -> None:
    """Reformer hashes at random: its scores are the same each time, and the generators around it stay as they were."""
    model = small_model(AutoModelForSequenceClassification, "reformer", hash_seed=None)
    scorer = SequenceClassifier(model, tiny.tokenizer(), show_progress=False)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = scorer(PROMPTS, COMPLETIONS)

    np.testing.assert_array_equal(scorer(PROMPTS, COMPLETIONS), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def writer(name: str) -> Any:
    """A causal language model of this type."""
    decoder = {"is_decoder": True} if name in ("bert", "megatron-bert", "rembert", "roc_bert") else {}
    return small_model(AutoModelForCausalLM, name, **decoder)


@pytest.mark.parametrize("name", WRITERS)
def test_log_probabilities_are_those_of_a_plain_forward(name: str) -> None:
    """Prompts of two lengths at once, shared: whatever cache the model has, or has not, or has wrong."""
    model = writer(name)
    untouched = copy.deepcopy(model)
    made = HfSampler(model, tiny.tokenizer(), Decoding(10), prompts_at_once=2, show_progress=False)
    made.try_out()
    rows = tiny.tokenizer()(["a prompt of some length", "short"])["input_ids"]
    tasks = [Task(0, 1), Task(0, 2), Task(1, 3)]
    with torch.inference_mode():
        drafts: list[Draft] = made._write(rows, tasks)
        for task, draft in zip(tasks, drafts, strict=True):
            read = torch.tensor([rows[task.prompt] + draft.ids])
            logits = copy.deepcopy(untouched)(input_ids=read, use_cache=False).logits[0, -len(draft.ids) - 1 : -1]
            own = logits.double().log_softmax(-1).gather(1, torch.tensor(draft.ids)[:, None]).sum()
            assert draft.logprob == pytest.approx(float(own), abs=1e-3)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_models_that_are_not_causal_are_refused(name: str) -> None:
    """Their probabilities of a token depend on what follows: what they wrote would be nobody's distribution."""
    model = small_model(AutoModelForCausalLM, name)

    with pytest.raises(
        ValueError, match=f"{type(model).__name__} are .* nats a token apart .* reads in both directions"
    ):
        HfSampler(model, tiny.tokenizer(), Decoding(5), show_progress=False).try_out()


@pytest.mark.parametrize("name", WRITERS)
def test_value_heads_read_the_last_state(name: str) -> None:
    """A head on the body's last hidden state, rows of many lengths together: as each row alone."""
    model = writer(name)
    torch.manual_seed(1)
    head = torch.nn.Linear(32, 1)
    found = ValueHead(copy.deepcopy(model), tiny.tokenizer(), head, show_progress=False)(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        own = []
        for row in ids_of(model):
            states = copy.deepcopy(model)(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            own.append(float(head(states[-1][0, -1])))

    np.testing.assert_allclose(found, own, atol=NEAR * np.std(own))


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_value_heads_of_decoders_whose_automodel_is_another(name: str, tmp_path: Path) -> None:
    """Saved by TRL with its v_head, and loaded: BERT's AutoModel has a pooler beside, BART's an encoder."""
    model = writer(name)
    folder = Path(tiny.saved(model, tmp_path, tiny.tokenizer()))
    torch.manual_seed(1)
    head = torch.nn.Linear(32, 1).requires_grad_(False)
    weights = {f"v_head.summary.{key}": weight for key, weight in head.state_dict().items()}
    file = folder / "model.safetensors"
    save_file({**load_file(file), **weights}, file, {"format": "pt"})
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([row]), output_hidden_states=True) for row in ids_of(model)]
        own = [float(head(each.hidden_states[-1][0, -1])) for each in states]

    np.testing.assert_allclose(load_scorer(folder)(PROMPTS, COMPLETIONS), own, atol=NEAR * np.std(own))


def test_checkpoints_that_cannot_be_used_are_refused_when_they_are_loaded(tmp_path: Path) -> None:
    """A reward model that needs more than token ids, and a policy that is not causal."""
    languages = small_model(AutoModelForSequenceClassification, "xmod")
    languages.config.default_language = None
    with pytest.raises(ValueError, match=r"XmodForSequenceClassification does not read .* Input language unknown"):
        load_scorer(tiny.saved(languages, tmp_path / "scorer", tiny.tokenizer()), kind="sequence-classifier")
    policy = tiny.saved(small_model(AutoModelForCausalLM, "prophetnet"), tmp_path / "policy", tiny.tokenizer())
    with pytest.raises(ValueError, match=r"ProphetNetForCausalLM are .* reads in both directions"):
        _ = load_sampler(policy, Decoding(5)).sampler  # type: ignore[attr-defined]
