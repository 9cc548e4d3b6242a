"""Models with a forward of their own: small stand-ins for ArmoRM, Beaver and UltraRM, each asked row by row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

from calibrated_rewards.models.labels import Label, Weighted
from calibrated_rewards.scorers.classifiers import MultiAttribute, SequenceClassifier


@dataclass
class Attributes(ModelOutput):
    """What ArmoRM gives: attributes, and the score that its gates make of them."""

    rewards: Tensor | None = None
    score: Tensor | None = None
    each: Tensor | None = None


class Gated(LlamaPreTrainedModel):
    """Three attributes at the last token, mixed by gates and by a matrix that is a parameter, as ArmoRM's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression = nn.Linear(config.hidden_size, 3, bias=False)
        self.gating = nn.Linear(config.hidden_size, 3)
        self.mixed = nn.Parameter(torch.eye(3) + 0.1)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """All outputs."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = states[torch.arange(len(states)), attention_mask.sum(1) - 1]
        rewards = self.regression(last)
        score = (self.gating(last).softmax(1) * (rewards @ self.mixed)).sum(1)
        return Attributes(rewards=rewards, score=score, each=self.regression(states)[..., 0])


class Bare(Gated):
    """One whose forward returns the scores themselves, as UltraRM's."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The score."""
        return super().forward(input_ids, attention_mask).score


def gated(kind: Any = Gated, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = kind(tiny.config()).eval()
    with torch.no_grad():
        for part in (model.regression, model.gating):
            part.weight.normal_(std=1.0)
    return model.to(dtype)


def by_itself(model: Any, key: str | None, prompts: list[str], completions: list[str]) -> np.ndarray:
    """One output of the model for each unpadded row."""
    rows = [tiny.tokenizer()(p + c)["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    with torch.inference_mode():
        outputs = [model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)) for ids in rows]
    return np.array([(out if key is None else out[key])[0].float().numpy() for out in outputs])


PROMPTS, COMPLETIONS = tiny.texts(12, 0), tiny.texts(12, 1)


def test_score_by_key() -> None:
    """The output of that name, of a batch of many lengths."""
    expected = by_itself(gated(), "score", PROMPTS, COMPLETIONS)
    scores = MultiAttribute(gated(), tiny.tokenizer(), batch_tokens=200)(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores, expected, atol=1e-4 * expected.std())
    assert scores.dtype == np.float32


def test_score_by_index_and_by_nothing() -> None:
    """An index counts the outputs; None takes what the forward returns."""
    by_index = MultiAttribute(gated(), tiny.tokenizer(), output=1)(PROMPTS, COMPLETIONS)
    bare = MultiAttribute(gated(Bare), tiny.tokenizer(), output=None)(PROMPTS, COMPLETIONS)
    by_key = MultiAttribute(gated(), tiny.tokenizer())(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(by_index, by_key)
    np.testing.assert_array_equal(bare, by_key)


def test_attributes() -> None:
    """Several attributes by weights or one alone; without a choice, an error that names the output."""
    expected = by_itself(gated(), "rewards", PROMPTS, COMPLETIONS)
    weighted = MultiAttribute(gated(), tiny.tokenizer(), output="rewards", labels=Weighted((1, 0, -0.5)))
    np.testing.assert_allclose(weighted(PROMPTS, COMPLETIONS), expected @ [1, 0, -0.5], atol=1e-4)
    single = MultiAttribute(gated(), tiny.tokenizer(), output="rewards", labels=Label(1))
    np.testing.assert_allclose(single(PROMPTS, COMPLETIONS), expected[:, 1], atol=1e-4)
    with pytest.raises(ValueError, match=r"output 'rewards' has 3 numbers for each input.*Weighted"):
        MultiAttribute(gated(), tiny.tokenizer(), output="rewards")(PROMPTS, COMPLETIONS)


def test_wrong_output() -> None:
    """An output that is not there is named beside those that are; one per token is none per input."""
    with pytest.raises(ValueError, match="no 'logits', they are: rewards, score, each"):
        MultiAttribute(gated(), tiny.tokenizer(), output="logits")(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="'each' has a number for each token"):
        MultiAttribute(gated(), tiny.tokenizer(), output="each")(PROMPTS, COMPLETIONS)


def test_sixteen_bits() -> None:
    """Code that mixes heads with parameters of 16 bits runs in its own precision instead of failing."""
    model = gated(dtype=torch.bfloat16)
    expected = by_itself(model, "score", PROMPTS, COMPLETIONS)
    scores = MultiAttribute(model, tiny.tokenizer())(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores, expected, atol=0.1 * expected.std())


def test_sixteen_bits_with_heads_in_float32() -> None:
    """Where the code bears it, the head is float32: many scores, no ties."""
    model = gated(dtype=torch.bfloat16)
    prompts, completions = tiny.texts(60, 2), tiny.texts(60, 3)
    scores = MultiAttribute(model, tiny.tokenizer(), output=0, labels=Label(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "mixed", nn.Parameter(model.mixed.float()))
        assert len(np.unique(scores(prompts, completions))) == 60


def test_logits_of_a_classifier() -> None:
    """A common classifier read by its key gives what its own kind gives."""
    model = tiny.classifier()
    scores = MultiAttribute(model, tiny.tokenizer(), output="logits")(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores, SequenceClassifier(model, tiny.tokenizer())(PROMPTS, COMPLETIONS), atol=1e-4)


def test_empty_and_fingerprint() -> None:
    """No input gives no score; the fingerprint knows the output and the labels."""
    scorer = MultiAttribute(gated(), tiny.tokenizer())
    assert scorer([], []).shape == (0,)
    assert scorer.fingerprint() == MultiAttribute(gated(), tiny.tokenizer()).fingerprint()
    others = (
        MultiAttribute(gated(), tiny.tokenizer(), "rewards", Label(1)),
        MultiAttribute(gated(), tiny.tokenizer(), 1),
    )
    assert scorer.fingerprint() not in [other.fingerprint() for other in others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_training_is_read_as_it_is(dtype: torch.dtype) -> None:
    """Weights of now; keywords, as trainers call rewards; a text for a list is refused, and nan is named."""
    model = gated(dtype=dtype)
    scorer = MultiAttribute(model, tiny.tokenizer(), output="rewards", labels=Label(0))
    before = scorer(PROMPTS, COMPLETIONS)
    model.regression.weight.data *= -2
    np.testing.assert_allclose(scorer(prompts=PROMPTS, completions=COMPLETIONS), -2 * before, rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match="prompts are a list"):
        scorer("a", ["b"])
    model.regression.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="MultiAttribute gave nan"):
        scorer(PROMPTS, COMPLETIONS)


class FromPadding(Gated):
    """One that finds the end of a row by the padding id of its config, and takes one row where it has none."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The score at the last token that is no padding."""
        pad = -1 if self.config.pad_token_id is None else self.config.pad_token_id
        ends = (input_ids != pad).long() * torch.arange(input_ids.shape[1])
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return Attributes(score=self.regression(states[torch.arange(len(states)), ends.argmax(1)])[:, 0])


@pytest.mark.parametrize("pad", [None, -1, tiny.VOCABULARY + 5])
def test_a_padding_id_that_no_input_holds(pad: int | None) -> None:
    """Rows then go one by one, as where there is none."""
    model = gated(FromPadding)
    model.config.pad_token_id = pad
    scorer = MultiAttribute(model, tiny.tokenizer())
    assert scorer._reader.one_by_one
    np.testing.assert_allclose(scorer(PROMPTS, COMPLETIONS), by_itself(model, "score", PROMPTS, COMPLETIONS), atol=1e-5)


def test_an_index_of_a_bare_tensor_is_refused() -> None:
    """It would be the first row's numbers for all."""
    with pytest.raises(ValueError, match="output"):
        MultiAttribute(gated(Bare), tiny.tokenizer(), output=0)(["a"], ["b"])


class Full(Gated):
    """A forward that finds no memory, and counts its calls outside the model, whose attributes are put back."""

    calls: ClassVar[list[int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Nothing."""
        self.calls.append(len(input_ids))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def test_no_memory_is_no_matter_of_precision() -> None:
    """A model in 16 bits without memory says so at once; it is not read anew, and not read in 16 bits from then on."""
    model = gated(Full, torch.bfloat16)
    Full.calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        MultiAttribute(model, tiny.tokenizer())(["a"], ["b"])
    assert Full.calls == [1]
