"""Padding is found out, whatever it disturbs: scores are those of rows alone, in this call and in later ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from architectures import DECODERS, DISTURBED_BY_PADDING, ENCODERS, SEQUENCE_TO_SEQUENCE, Architecture, one_by_one
from memory import Memory
from tiny import EOS, PAD, VOCABULARY
from torch import Tensor, nn

from calibrated_rewards.models.batches import Budget, Padding, choose_lengths
from calibrated_rewards.models.own_forward import OwnForward
from calibrated_rewards.models.parts import body_of
from calibrated_rewards.models.shared_prefix import Decoder, ModuleHead, Row

LONG = {"max_position_embeddings": 514}


def rows_of(lengths: Any, *, seed: int = 0, eos: bool = False) -> list[list[int]]:
    """Rows of random tokens without special ones."""
    rng = np.random.default_rng(seed)
    return [rng.integers(8, VOCABULARY, n).tolist() + [EOS] * eos for n in lengths]


def lengths(n: int, low: int, high: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(low, high, n).tolist()


def reader(model: Any, *, tokens: int = 8192, **options: Any) -> OwnForward:
    return OwnForward(model, PAD, Budget(tokens), show_progress=False, **options)


def farthest(found: Tensor, model: Any, rows: list[list[int]]) -> float:
    """How far the farthest row is from the model's own forward on it alone, in standard deviations."""
    expected = torch.tensor(one_by_one(model, rows))
    assert found.shape == expected.shape
    return float(((found - expected).abs() / expected.std(0, correction=0)).max())


class Scores(nn.Module):
    """A reward model of custom code: states of a BERT, pooled by a rule of its own."""

    base_model_prefix = "bert"

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor], labels: int = 1) -> None:
        super().__init__()
        self.bert = ENCODERS["Bert"].classifier(**LONG).bert
        self.config, self.pool = self.bert.config, pool
        torch.manual_seed(0)
        self.head = nn.Linear(32, labels)
        nn.init.normal_(self.head.weight)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers asks."""
        return self.bert.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Logits, as transformers gives them."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.bert(input_ids, attention_mask=mask).last_hidden_state
        return type("Output", (dict,), {"logits": property(lambda self: self["logits"])})(
            logits=self.head(self.pool(states, mask))
        )


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """As it should be."""
    return ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).to(states.dtype)


def mean_of_all(states: Tensor, _: Tensor) -> Tensor:
    """The pooling that forgets the mask."""
    return states.mean(1)


@dataclass(frozen=True)
class Leaks:
    """The mean that forgets the mask, for some rows only: those with so little text or so much padding."""

    where: Callable[[Tensor, int], Tensor]

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """One mean or the other."""
        leaking = self.where(mask.sum(1), mask.shape[1])
        return torch.where(leaking[:, None], mean_of_all(states, mask), masked_mean(states, mask))


LEAKS = {
    "under an eighth of the longest": lambda length, longest: 8 * length < longest,
    "more than 50 pads": lambda length, longest: longest - length > 50,
    "fewer than 20 tokens": lambda length, longest: length < 20,
    "a batch of more than 150 tokens": lambda length, longest: (length < longest) & (longest > 150),
    "three lengths of four": lambda length, longest: length % 4 > 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_over_padding(dtype: torch.dtype) -> None:
    """Rows of 30 to 480 tokens have the scores of single rows; with the mask in the pooling they are padded."""
    rows = rows_of(lengths(*((16, 10, 100) if dtype == torch.float16 else (64, 30, 481))))
    model = Scores(mean_of_all).eval().to(dtype)
    read = reader(model)
    assert farthest(read(rows), model, rows) < (1e-4 if dtype == torch.float32 else 0.05)
    assert not read.padding.allowed

    sound = Scores(masked_mean).eval().to(dtype)
    read = reader(sound)
    assert farthest(read(rows), sound, rows) < (1e-4 if dtype == torch.float32 else 0.3)
    assert read.padding.allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAKS)
def test_leaks_of_some_rows(name: str, dtype: torch.dtype) -> None:
    """A model that reads the padding of some rows only is found out by the call that has such rows, many or few."""
    model = Scores(Leaks(LEAKS[name])).eval().to(dtype)
    near = 1e-4 if dtype == torch.float32 else 0.3
    for tokens in (8192, 512):
        rows = rows_of(lengths(24, 10, 241))
        assert farthest(reader(model, tokens=tokens)(rows), model, rows) < near
    read = reader(model)
    for some in ([125, 130, 135, 140], [100, 105, 107, 106], [150, 235], [21, 40, 60, 61], [10, 150], [16, 240]):
        rows = rows_of(some, seed=len(some))
        expected = torch.tensor(one_by_one(model, rows))
        assert float((read(rows) - expected).abs().max()) < near * 2


def test_labels_are_compared_one_by_one() -> None:
    """Large numbers of one label do not hide what padding does to another; one that is always 0 does no harm."""
    model = Scores(Leaks(LEAKS["under an eighth of the longest"]), labels=3).eval()
    with torch.no_grad():
        model.head.weight[0], model.head.bias[0] = 0, 1e4
        model.head.weight[1], model.head.bias[1] = 0, 0
    rows = rows_of([20, 100, 200, 400])
    read = reader(model)
    expected = torch.tensor(one_by_one(model, rows))

    assert torch.allclose(read(rows), expected, rtol=0, atol=1e-4)
    assert not read.padding.allowed


def test_a_constant_is_padded() -> None:
    """Scores without any spread agree where they are equal."""
    model = Scores(masked_mean).eval()
    nn.init.zeros_(model.head.weight)
    read = reader(model)
    rows = rows_of([20, 100, 200])

    assert farthest(read(rows), Scores(masked_mean).eval(), rows) > 0
    assert read.padding.allowed


@pytest.mark.parametrize("alone", [True, False])
def test_nan(alone: bool) -> None:
    """A row that is nan only in a batch is read alone; one that is nan by itself is no sign of padding."""

    def poisoned(states: Tensor, mask: Tensor) -> Tensor:
        few = mask.sum(1) < 30
        broken = few if alone else few & (mask.shape[1] > mask.sum(1))
        return masked_mean(states, mask).masked_fill(broken[:, None], torch.nan)

    model = Scores(poisoned).eval()
    read = reader(model)
    found = read(rows_of([20, 100, 200]))

    assert found.isnan()[:, 0].tolist() == [alone, False, False]
    assert read.padding.allowed == alone


def mobile_bert() -> Any:
    """MobileBERT looks at the tokens beside each, padding or not."""
    sizes = {"intra_bottleneck_size": 16, "embedding_size": 16, "num_feedforward_networks": 1}
    return Architecture("MobileBert", {**sizes, "intermediate_size": 32, **LONG}).classifier()


def test_mobile_bert() -> None:
    """Rows in a batch have the scores that they have alone."""
    model = mobile_bert()
    rows = rows_of(lengths(18, 5, 120))

    assert farthest(reader(model)(rows), model, rows) < 1e-4


@pytest.mark.parametrize(("dtype", "seed"), [(torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float16, 0)])
def test_funnel(dtype: torch.dtype, seed: int) -> None:
    """It pools by fours; its scores are those of rows alone to half a standard deviation, in float16 exactly."""
    model = DISTURBED_BY_PADDING["Funnel"].classifier(seed=seed).to(dtype)
    rows = rows_of(lengths(12, 30, 200, seed), seed=seed)
    read = reader(model)

    assert farthest(read(rows), model, rows) < (0.5 if dtype == torch.bfloat16 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ENCODERS, *SEQUENCE_TO_SEQUENCE])
def test_what_padding_does_not_disturb(name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Rounding by the shape of a batch is no reason not to pad, in a first call, and in later and longer ones."""
    several = {**ENCODERS, **SEQUENCE_TO_SEQUENCE}[name]
    positions = {} if name == "T5" else {"max_position_embeddings": 530}
    model = several.classifier(**positions).to(dtype)
    read = reader(model, separate=EOS if name in SEQUENCE_TO_SEQUENCE else None)
    for i, longest in enumerate((40, 80, 160)):
        read(rows_of(lengths(8, 1 + 5 * (3 - i), longest, i), eos=True, seed=i))
        assert read.padding.allowed, caplog.text


def test_decoders_are_compared_too() -> None:
    """Dynamic RoPE takes its angles from the longest row of a batch, and keeps them: each row has its own here."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    options = {**DECODERS["Llama"].options, "rope_parameters": rope, "max_position_embeddings": 32}
    model = Architecture("Llama", options).classifier()
    rows = rows_of([40, 60, 100, 300, 33, 200, 30, 10])
    fresh = [one_by_one(Architecture("Llama", options).classifier(), [row])[0] for row in rows]
    expected = torch.tensor(np.array(fresh))

    def read() -> Tensor:
        decoder = Decoder(model, body_of(model), ModuleHead(model.score), Budget(8192), show_progress=False)
        return torch.cat(decoder([Row(row, [len(row) - 1]) for row in rows], range(8)))

    for _ in range(2):
        assert float((read() - expected).abs().max() / expected.std()) < 1e-4


def test_rows_that_were_compared_are_not_again() -> None:
    """A call with neither shorter rows nor longer batches runs the model once for each batch; a record costs a row."""
    model = ENCODERS["Bert"].classifier(**LONG)
    read = reader(model)
    read(rows_of(lengths(64, 30, 481)))
    low, high = read.padding.ranges[0]
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(Memory(10**9, sizes))
    rows = rows_of([low, low + 5, 100, high])
    read(rows)
    assert sizes == [4 * high]
    sizes.clear()
    read(rows_of([low - 1, 100]))
    assert sizes == [low - 1, 200]


def test_ranges() -> None:
    """A wider range takes the place of those inside of it."""
    padding = Padding()
    for pair in [(10, 20), (12, 18), (15, 40), (9, 21), (8, 50)]:
        padding.add(*pair)

    assert padding.ranges == [(8, 50)]
    assert padding.covers(8, 50)
    assert padding.covers(9, 12)
    assert not padding.covers(7, 9)
    assert not padding.covers(9, 51)


def test_spread_lengths() -> None:
    """The shortest, never the longest, each once; all of them where there are few."""
    for seed in range(20):
        known = sorted(set(lengths(60, 1, 500, seed)))
        chosen = choose_lengths(known, 8)
        assert chosen[0] == known[0]
        assert len(set(chosen)) == len(chosen) == 8
        assert chosen[-1] < known[-1]
    assert choose_lengths([3, 9], 8) == [3, 9]
