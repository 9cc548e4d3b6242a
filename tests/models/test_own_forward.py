"""A model read through its own forward: any output, padded only where that does no harm, head in float32."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import DISTURBED_BY_PADDING, ENCODERS, SEQUENCE_TO_SEQUENCE, Architecture, one_by_one
from memory import Memory
from tiny import EOS, PAD, texts, tokenizer
from torch import Tensor, nn

from calibrated_rewards.models.batches import Budget
from calibrated_rewards.models.own_forward import OwnForward, Precise, pick_output, precise

ROWS = tokenizer()(texts(12, seed=5))["input_ids"]


def reader(model: Any, *, tokens: int = 4096, **options: Any) -> OwnForward:
    return OwnForward(model, pad_id=PAD, budget=Budget(tokens), show_progress=False, **options)


def sd_apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float(((found - expected).abs() / expected.std(0)).max())


def oracle(model: Any, rows: list[list[int]] = ROWS) -> Tensor:
    return torch.tensor(one_by_one(model, rows))


class Heads(nn.Module):
    """A reward model of custom code: two heads on a body, and outputs of all kinds."""

    base_model_prefix = "bert"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bert = ENCODERS["Bert"].classifier().bert
        self.config, self.kind = self.bert.config, kind
        torch.manual_seed(0)
        self.helpful, self.kind_head = nn.Linear(32, 1), nn.Linear(32, 2)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers asks."""
        return self.bert.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """The scores under a name, in a tuple, as an object's attribute, or alone."""
        pooled = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        helpful, kinds = self.helpful(pooled)[:, 0], self.kind_head(pooled)
        return {
            "named": {"kinds": kinds, "score": helpful},
            "tuple": (kinds, helpful),
            "attribute": Rewards(score=helpful),
            "alone": helpful,
        }[self.kind]


@dataclass
class Rewards:
    """What a custom model's forward may answer."""

    score: Tensor


@pytest.mark.parametrize(
    ("kind", "output", "size"),
    [("named", "score", 1), ("named", "kinds", 2), ("tuple", 1, 1), ("tuple", 0, 2), ("alone", None, 1)],
)
def test_outputs_of_all_kinds(kind: str, output: str | int | None, size: int) -> None:
    """A key, an index or the answer itself; one number or several for each row."""
    model = Heads(kind).eval()
    with torch.no_grad():
        pooled = [model.bert(torch.tensor([row])).pooler_output for row in ROWS]
        expected = torch.cat([(model.helpful if size == 1 else model.kind_head)(each) for each in pooled])

    assert sd_apart(reader(model, output=output)(ROWS), expected) < 1e-4


def test_outputs_that_are_not_there() -> None:
    """The error lists those that are."""
    with pytest.raises(ValueError, match="the model's outputs have no 'rewards', they are: kinds, score; say output="):
        reader(Heads("named"), output="rewards")(ROWS)
    with pytest.raises(ValueError, match="no 'score', they are: a tuple"):
        pick_output((torch.zeros(1),), "score")
    with pytest.raises(ValueError, match=r"returns the scores themselves.* no output 'logits'.*kind=multi-attribute"):
        reader(Heads("alone"))(ROWS)


def test_pairs() -> None:
    """Token types reach the model, padded like the ids."""
    made = tokenizer()
    pairs = made(texts(8, seed=6), texts(8, seed=7), return_token_type_ids=True)
    rows, types = pairs["input_ids"], pairs["token_type_ids"]
    assert {max(each) for each in types} == {1}
    model = ENCODERS["Bert"].classifier()
    with torch.no_grad():
        expected = torch.cat(
            [
                model(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([each])).logits
                for row, each in zip(rows, types, strict=True)
            ]
        )

    assert sd_apart(reader(model)(rows, types), expected) < 1e-4
    assert sd_apart(reader(model)(rows), expected) > 1e-2


def test_rows_with_unequal_ends() -> None:
    """Rows of one batch have EOS equally often, and all of them have it."""
    model = SEQUENCE_TO_SEQUENCE["Bart"].classifier()
    rows = [[*row[:4], *[EOS, 50] * (i % 3), *row[4:], EOS] for i, row in enumerate(ROWS)]

    assert sd_apart(reader(model, separate=EOS)(rows), oracle(model, rows)) < 1e-4
    with pytest.raises(ValueError, match="All examples must have the same number of <eos> tokens"):
        reader(model)(rows)
    with pytest.raises(ValueError, match="is read at its EOS token, got an input without id 2"):
        reader(model, separate=EOS)([*rows, [1, 50]])


def test_padding_is_checked_once(caplog: pytest.LogCaptureFixture) -> None:
    """Rows of several lengths are compared with themselves alone; such rows then never again."""
    model = ENCODERS["Roberta"].classifier()
    read = reader(model)
    read([ROWS[0]] * 3)
    assert (read.padding.allowed, len(read.padding.lengths)) == (True, 0)
    read(ROWS[:3])
    assert (read.padding.allowed, len(read.padding.lengths)) == (True, 3)
    read(ROWS)
    assert len(read.padding.lengths) > 3
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(Memory(10**9, sizes))
    read(ROWS)

    assert sizes == [12 * max(map(len, ROWS))]
    assert caplog.text == ""


@pytest.mark.parametrize("name", DISTURBED_BY_PADDING)
def test_what_padding_disturbs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of one length go together, no row is padded, and the scores are those of rows alone."""
    model = DISTURBED_BY_PADDING[name].classifier()
    read = reader(model)
    rows = [row[::step] for row in ROWS for step in (1, -1) if len(row) > 8]
    assert len({len(row) % 4 for row in rows}) > 2

    assert sd_apart(read(rows), oracle(model, rows)) < 1e-4
    assert sd_apart(read(rows), oracle(model, rows)) < 1e-4
    assert read.padding.allowed is False
    assert caplog.text.count(f"{type(model).__name__} gives a padded row") == 1


def test_one_by_one() -> None:
    """A model without a padding id that looks for the last token is given single rows."""
    model = Architecture("Llama").classifier(pad_token_id=None)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        reader(model)(ROWS)

    assert sd_apart(reader(model, one_by_one=True)(ROWS), oracle(model)) < 1e-5


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DebertaV3", "ModernBert"])
def test_heads_in_float32(name: str) -> None:
    """A bfloat16 model's heads answer as their float32 copies do, and are the model's own again afterwards."""
    model = ENCODERS[name].classifier().to(torch.bfloat16)
    read = reader(model, one_by_one=True)
    found = read(ROWS)
    before = oracle(model)

    # The same by hand: a model with the same 16-bit body, and float32 heads with the same values behind a cast.
    twin = ENCODERS[name].classifier().to(torch.bfloat16)
    body = getattr(twin, twin.base_model_prefix)
    for part in twin.children():
        if part is not body:
            part.float()
    first = next(part for part in twin.children() if part is not body and list(part.parameters()))
    first.register_forward_pre_hook(lambda _, args: tuple(x.float() for x in args))
    assert torch.allclose(found, oracle(twin), rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32
    assert len(set(found[:, 0].tolist())) == len(set(map(tuple, ROWS)))
    assert not torch.equal(found, found.bfloat16().float())
    assert torch.equal(oracle(model), before)
    assert torch.equal(before, before.bfloat16().float())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_the_heads_come_back_after_an_error() -> None:
    """Each part's forward is its own."""
    model = ENCODERS["Bert"].classifier().to(torch.bfloat16)
    with pytest.raises(ValueError, match="have no 'score'"):
        reader(model, output="score")(ROWS)

    assert not any("forward" in vars(part) for part in model.modules())


def test_a_forward_that_is_not_the_classes_own() -> None:
    """What accelerate put in a head's place, to move its input, is there again afterwards."""
    head = nn.Linear(3, 2)
    moved = head.forward = Precise(head.forward)
    with precise(head, nn.Linear(3, 2)):
        assert head.forward is not moved

    assert head.forward is moved


def test_inputs_are_widened() -> None:
    """Tensors of floats, by place and by name; the rest is left alone."""
    half, ids = torch.ones(1, 3, dtype=torch.bfloat16), torch.tensor([1])

    args, options = Precise(lambda *args, **options: (args, options))(half, ids, "a", x=half, n=1)
    assert (args[0].dtype, args[1].dtype, args[2]) == (torch.float32, torch.int64, "a")
    assert (options["x"].dtype, options["n"]) == (torch.float32, 1)


def test_out_of_memory_while_padding_is_checked() -> None:
    """The rows that are compared may be too many as well."""
    model = ENCODERS["Bert"].classifier()
    read = reader(model)
    model.get_input_embeddings().register_forward_pre_hook(Memory(120, []))

    assert sd_apart(read(ROWS), oracle(model)) < 1e-4
    assert read.padding.allowed
    assert read.budget.tokens <= 120


def test_ids_that_there_are_not() -> None:
    """They are refused before the model is asked."""
    with pytest.raises(ValueError, match="the tokenizer gives id 264, the reward model has 264 embeddings"):
        reader(ENCODERS["Bert"].classifier())([[264]])
