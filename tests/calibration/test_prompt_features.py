"""Hidden states of prompts: transformers' own forward of each prompt alone is what they must equal."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import Architecture
from transformers import BartConfig, BartForSequenceClassification

from calibrated_rewards.calibration.prediction import fit
from calibrated_rewards.calibration.prediction.prompt_features import PromptFeatures
from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers import load_scorer, score
from calibrated_rewards.scorers.classifiers import CrossEncoder, SequenceClassifier
from calibrated_rewards.table.reference_table import ReferenceTable

TOKENIZER, PROMPTS = tiny.tokenizer(), tiny.texts(9)


def alone(body: Any, rows: list[list[int]]) -> list[np.ndarray]:
    """The oracle: all states of each row of tokens, no padding, no mask, no code of ours."""
    with torch.inference_mode():
        return [body(input_ids=torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]


def tokens(prompts: list[str]) -> list[list[int]]:
    return [TOKENIZER(prompt).input_ids for prompt in prompts]


def test_a_decoder_is_read_at_its_last_token(caplog: pytest.LogCaptureFixture) -> None:
    """In a batch of many lengths, in small batches, one by one and in another order."""
    model = tiny.classifier()
    scorer = SequenceClassifier(model, TOKENIZER, batch_tokens=60)
    expected = np.array([states[-1] for states in alone(model.model, tokens(PROMPTS))])
    found = PromptFeatures(scorer)(PROMPTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(PromptFeatures(scorer)(PROMPTS[::-1]), expected[::-1], atol=1e-5)
    np.testing.assert_allclose(np.vstack([PromptFeatures(scorer)([p]) for p in PROMPTS]), expected, atol=1e-5)
    assert PromptFeatures(scorer)([]).shape == (0, 32)
    # A wrong place would be noticed, and cost the padding.
    assert not any("not padding" in message for message in caplog.messages)


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert"])
def test_an_encoder_is_read_as_asked(name: str, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The state of its first token, of its last, or the mean of all, which is what it gets unasked."""
    model = Architecture(name).classifier()
    scorer = SequenceClassifier(model, TOKENIZER)
    states = alone(getattr(model, model.base_model_prefix), tokens(PROMPTS))
    expected = {"first": [s[0] for s in states], "last": [s[-1] for s in states], "mean": [s.mean(0) for s in states]}
    np.testing.assert_allclose(PromptFeatures(scorer, pool)(PROMPTS), expected[pool], atol=1e-4)
    np.testing.assert_allclose(PromptFeatures(scorer)(PROMPTS), expected["mean"], atol=1e-4)
    assert not any("not padding" in message for message in caplog.messages)


def test_an_encoder_decoder_is_its_encoder() -> None:
    """Its encoder sees all of the prompt: the mean of its states."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    torch.manual_seed(0)
    model = BartForSequenceClassification(BartConfig(vocab_size=tiny.VOCABULARY, **sizes, **heads, **ids)).eval()
    expected = [states.mean(0) for states in alone(model.model.encoder, tokens(PROMPTS))]
    np.testing.assert_allclose(PromptFeatures(SequenceClassifier(model, TOKENIZER))(PROMPTS), expected, atol=1e-4)


def test_a_chat_ends_where_the_answer_begins() -> None:
    """Messages are written by the template, with its generation prompt, and without the EOS of whole texts."""
    model, chat = tiny.classifier(), [{"role": "user", "content": "Hi"}]
    ids = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    scorer = SequenceClassifier(model, TOKENIZER, text=Text(append_eos=True))
    np.testing.assert_allclose(PromptFeatures(scorer)([chat])[0], alone(model.model, [ids])[0][-1], atol=1e-5)


def test_a_cross_encoder_reads_the_prompt_as_one_text() -> None:
    """Not as a pair; one user's message is its content."""
    model = Architecture("Bert").classifier()
    scorer = CrossEncoder(model, TOKENIZER)
    expected = [states.mean(0) for states in alone(model.bert, tokens(["Hi there"]))]
    for prompt in ("Hi there", [{"role": "user", "content": "Hi there"}]):
        np.testing.assert_allclose(PromptFeatures(scorer)([prompt]), expected, atol=1e-4)


def test_long_prompts_keep_their_end() -> None:
    """BOS and the last tokens, with a warning."""
    model = tiny.classifier()
    scorer = SequenceClassifier(model, TOKENIZER, text=Text(max_length=6))
    ids = TOKENIZER("abcdefghij").input_ids
    with pytest.warns(TruncationWarning, match="1 of 1 inputs are longer than max_length=6"):
        found = PromptFeatures(scorer)(["abcdefghij"])
    np.testing.assert_allclose(found[0], alone(model.model, [[ids[0], *ids[-5:]]])[0][-1], atol=1e-5)


def test_loaded_scorers(tmp_path: Path) -> None:
    """What `load_scorer` gives will do; it pickles; the fingerprint tells weights and pools apart."""
    features = [
        PromptFeatures(load_scorer(tiny.saved(tiny.classifier(seed), tmp_path / str(seed), TOKENIZER)))
        for seed in range(2)
    ]
    direct = PromptFeatures(SequenceClassifier(tiny.classifier(0), TOKENIZER))
    np.testing.assert_allclose(features[0](PROMPTS), direct(PROMPTS), atol=1e-6)
    again = pickle.loads(pickle.dumps(features[0]))
    np.testing.assert_array_equal(again(PROMPTS), features[0](PROMPTS))
    assert again.fingerprint() == features[0].fingerprint() != features[1].fingerprint()
    assert PromptFeatures(features[0].scorer, "mean").fingerprint() != features[0].fingerprint()


def test_the_model_is_left_as_it_was() -> None:
    """Dropout is off while it reads, and the training mode is what it was."""
    model = tiny.classifier(attention_dropout=0.5)
    quiet = PromptFeatures(SequenceClassifier(model, TOKENIZER))(PROMPTS)
    model.train()
    np.testing.assert_array_equal(PromptFeatures(SequenceClassifier(model, TOKENIZER))(PROMPTS), quiet)
    assert all(part.training for part in model.modules())


def test_what_has_no_states_is_refused() -> None:
    """A function has none; the error says what would do."""
    with pytest.raises(TypeError, match=r"reads a scorer that has a model, a tokenizer and a text, got .*<lambda>"):
        PromptFeatures(lambda prompts, completions: [0.0] * len(prompts))(["Hi"])


def test_states_predict_references() -> None:
    """A reward model's own states tell where the scores of a prompt lie: nearer than one place for all does."""
    scorer = SequenceClassifier(tiny.classifier(), TOKENIZER, show_progress=False)
    prompts, completions = [f"{a}{b}" * 3 for a in "abcdefgh" for b in "ijklmnop"], tiny.texts(8, 1, 5)
    pairs = [(prompt, completion) for prompt in prompts for completion in completions]
    scores = score(scorer, *zip(*pairs, strict=True)).reshape(64, 8)
    table = ReferenceTable.build(zip(prompts, scores, strict=True))
    errors = fit(table, prompts, PromptFeatures(scorer), network=False).errors
    assert errors.location_r2 > 0.5
    assert errors.steps[errors.chosen].u < 0.97 * errors.steps["pooled"].u
