"""Pairs read by an encoder: transformers' own pair tokenisation and forward, one by one, are what it must equal."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from calibrated_rewards.models.labels import Expected
from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers.classifiers import CrossEncoder, write_flat

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 120,
    "pad_token_id": tiny.PAD,
}


def spread(model: Any) -> None:
    """Weights that let every token and its type be seen in the scores: fresh ones give nearly the same to all."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)


def bert(labels: int = 1) -> Any:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=labels)).eval()
    spread(model)
    return model


def typed() -> Any:
    return tiny.tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def by_itself(model: Any, tokenizer: Any, prompt: str, response: str) -> np.ndarray:
    """The model's own forward of one pair, unpadded."""
    with torch.inference_mode():
        return model(**tokenizer(prompt, response, return_tensors="pt")).logits[0].numpy()


def test_pairs_equal_own_forward() -> None:
    """A batch of many lengths gives what the model gives for each pair alone, with its token types."""
    model, tokenizer, prompts, responses = bert(), typed(), tiny.texts(12, 0), tiny.texts(12, 1)
    scores = CrossEncoder(model, tokenizer, batch_tokens=200)(prompts, responses)
    expected = np.array([by_itself(model, tokenizer, *pair)[0] for pair in zip(prompts, responses, strict=True)])
    np.testing.assert_allclose(scores, expected, atol=1e-4 * expected.std())
    assert scores.dtype == np.float32
    untyped = CrossEncoder(model, tiny.tokenizer())(prompts, responses)
    assert np.abs(untyped - expected).max() > 0.01 * expected.std()


def test_roberta() -> None:
    """No token types, and positions counted by a padding id that is not the tokenizer's: as the model alone."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**{**SMALL, "pad_token_id": 3, "num_labels": 1})).eval()
    spread(model)
    prompts, responses = tiny.texts(8, 0), tiny.texts(8, 1)
    scores = CrossEncoder(model, tiny.tokenizer())(prompts, responses)
    pairs = zip(prompts, responses, strict=True)
    expected = np.array([by_itself(model, tiny.tokenizer(), *pair)[0] for pair in pairs])
    np.testing.assert_allclose(scores, expected, atol=1e-4 * expected.std())


def test_several_labels() -> None:
    """Of three labels the numbers are the model's, and make one score as they are told to."""
    model, tokenizer = bert(3), typed()
    scorer = CrossEncoder(model, tokenizer, labels=Expected((1, 2, 3)))
    logits = by_itself(model, tokenizer, "Why?", "Because.")
    np.testing.assert_allclose(scorer.logits(["Why?"], ["Because."])[0], logits, atol=1e-5)
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(scorer(["Why?"], ["Because."]), [weights @ [1, 2, 3]], rtol=1e-5)
    with pytest.raises(ValueError, match="3 labels"):
        CrossEncoder(model, tokenizer)(["Why?"], ["Because."])


def test_long_prompt_loses_its_beginning() -> None:
    """The response stays whole; of the prompt the last tokens stay, and a warning says so."""
    model, tokenizer = bert(), typed()
    scorer = CrossEncoder(model, tokenizer, text=Text(max_length=20))
    with pytest.warns(TruncationWarning, match="1 of 2 inputs are longer than max_length=20"):
        scores = scorer(["abcdefghijklmnopqrstuvwxyz", "Hi"], ["0123456789", "Ho"])
    # Two special tokens and ten of the response leave eight to the prompt.
    expected = [by_itself(model, tokenizer, "stuvwxyz", "0123456789")[0], by_itself(model, tokenizer, "Hi", "Ho")[0]]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_long_response_loses_its_beginning_last() -> None:
    """Only a response that is too long alone is cut, after the prompt is gone."""
    model, tokenizer = bert(), typed()
    with pytest.warns(TruncationWarning):
        scores = CrossEncoder(model, tokenizer, text=Text(max_length=8))(["abc"], ["0123456789"])
    cut = {
        "input_ids": torch.tensor([[tiny.BOS, 7, *tokenizer("456789", add_special_tokens=False)["input_ids"]]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]),
    }
    with torch.inference_mode():
        np.testing.assert_allclose(scores, model(**cut).logits[0].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="on_long"):
        CrossEncoder(model, tokenizer, text=Text(max_length=8, on_long="raise"))(["abc"], ["0123456789"])
    with pytest.warns(TruncationWarning), pytest.raises(ValueError, match="leaves no room for text beside 2 special"):
        CrossEncoder(model, tokenizer, text=Text(max_length=2))(["abc"], ["0123456789"])


def test_limit_is_what_the_model_has_positions_for() -> None:
    """Without a max_length, inputs are cut to the model's positions, and do not crash it."""
    with pytest.warns(TruncationWarning, match="max_length=120"):
        CrossEncoder(bert(), typed())(["a" * 300], ["b"])


def test_messages_are_flattened() -> None:
    """One message is its content, several are lines with their roles; both as prompt and as completion."""
    scorer = CrossEncoder(bert(), typed())
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "So?"},
    ]
    chats = scorer([chat, chat[:1]], [[{"role": "assistant", "content": "Yes"}], "Yes"])
    np.testing.assert_array_equal(chats, scorer(["user: Hi\nassistant: Ho\nuser: So?", "Hi"], ["Yes", "Yes"]))
    assert write_flat([]) == ""
    with pytest.raises(TypeError, match="text alone"):
        write_flat([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}])


def test_strip() -> None:
    """What sampling left at the end of a completion is taken off."""
    model = bert()
    stripped = CrossEncoder(model, typed(), text=Text(strip=("<|end|>",)))(["a"], ["b<|end|>"])
    np.testing.assert_array_equal(stripped, CrossEncoder(model, typed())(["a"], ["b"]))


def test_text_has_no_template() -> None:
    """Settings that a pair has no use for are refused, not ignored."""
    with pytest.raises(ValueError, match="takes max_length, on_long and strip"):
        CrossEncoder(bert(), typed(), text=Text(append_eos=True))


def test_empty_fingerprint_and_pickle() -> None:
    """No input gives no score; the fingerprint tells models and settings apart."""
    scorer = CrossEncoder(bert(), typed())
    assert scorer([], []).shape == (0,)
    assert scorer.fingerprint() == CrossEncoder(bert(), typed()).fingerprint()
    assert scorer.fingerprint() != CrossEncoder(bert(), typed(), text=Text(max_length=9)).fingerprint()
    assert scorer.fingerprint() != CrossEncoder(bert(2), typed()).fingerprint()


def test_a_model_in_training_is_read_as_it_is() -> None:
    """Weights of now; keywords, as trainers call rewards; a text for a list is refused, and nan is named."""
    model, tokenizer = bert().to(torch.bfloat16), typed()
    scorer = CrossEncoder(model, tokenizer)
    before = scorer(["a", "b"], ["c", "d"])
    model.classifier.weight.data *= -2
    model.classifier.bias.data *= -2
    np.testing.assert_allclose(scorer(prompts=["a", "b"], completions=["c", "d"]), -2 * before, rtol=1e-3)
    with pytest.raises(TypeError, match="prompts are a list"):
        scorer("a", ["b"])
    model.classifier.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="CrossEncoder gave nan for completion 'c' of prompt 'a'"):
        scorer(["a", "b"], ["c", "d"])


@pytest.mark.parametrize("pad", [-1, tiny.VOCABULARY + 5])
def test_a_padding_id_that_is_no_token(pad: int) -> None:
    """The tokenizer's takes its place."""
    model = bert()
    expected = CrossEncoder(model, typed())(["a", "b"], ["c", "much longer"])
    model.config.pad_token_id = pad
    np.testing.assert_allclose(CrossEncoder(model, typed())(["a", "b"], ["c", "much longer"]), expected, rtol=1e-5)
