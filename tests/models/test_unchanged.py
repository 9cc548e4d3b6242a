"""Scores do not depend on what was scored before: what a forward changes in its model is put back, or refused."""

import logging
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ENCODERS, SEQ2SEQ, Architecture
from tiny import BOS, EOS, PAD, VOCABULARY, classifier
from torch import Tensor, nn

from calibrated_rewards.models import unchanged as state
from calibrated_rewards.models.batches import Budget
from calibrated_rewards.models.own_forward import OwnForward
from calibrated_rewards.models.unchanged import StateKeeper, steady_draws

SPARSE = {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"}
# Up to 7 blocks attention is full.
TURN = 28


def big_bird() -> Any:
    return Architecture("BigBird", SPARSE).classifier()


def big_bird_pegasus() -> Any:
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return Architecture("BigBirdPegasus", {**SEQ2SEQ, **SPARSE, **sizes, **heads}).classifier()


def rows_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [[BOS, *torch.randint(8, VOCABULARY, (n - 2,), generator=generator).tolist(), EOS] for n in lengths]


def own(model: Callable[[], Any], row: list[int]) -> float:
    """What a fresh model's own forward gives for a row."""
    with torch.no_grad():
        return float(model()(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits[0, 0])


def reader(model: Any, **options: Any) -> OwnForward:
    return OwnForward(model, PAD, Budget(1024), show_progress=False, **options)


@pytest.mark.parametrize("model", [big_bird, big_bird_pegasus])
@pytest.mark.filterwarnings("ignore:.*attention_type")
def test_big_bird(model: Callable[[], Any]) -> None:
    """It reads short inputs with full attention, and long ones sparsely, in any order of calls and within one call."""
    rows = rows_of(60, 20, 44, 10, 96, TURN, TURN + 1, 64)
    expected = [own(model, row) for row in rows]
    full = model()
    with torch.no_grad():
        full(input_ids=torch.tensor([rows[1]]), attention_mask=torch.ones(1, 20))
        switched = float(full(input_ids=torch.tensor([rows[0]]), attention_mask=torch.ones(1, 60)).logits[0, 0])
    assert abs(switched - expected[0]) > 1e-2
    kept = model()
    read = reader(kept, separate=EOS if kept.config.is_encoder_decoder else None)
    for order in (range(8), reversed(range(8))):
        for i in order:
            assert float(read([rows[i]])[0, 0]) == pytest.approx(expected[i], abs=1e-4)
    assert read(rows)[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert read(rows[::-1])[:, 0].tolist() == pytest.approx(expected[::-1], abs=1e-4)
    parts = [part for part in kept.modules() if "attention_type" in vars(part)]
    assert {part.attention_type for part in parts} == {"block_sparse"}


class Changing(nn.Module):
    """A reward model whose forward changes something of itself, which its next answer depends on."""

    base_model_prefix = "bert"

    def __init__(self, change: Callable[["Changing"], float]) -> None:
        super().__init__()
        self.bert = ENCODERS["Bert"].classifier()
        self.config, self.change = self.bert.config, change
        self.calls, self.lengths, self.seen = 0, [], set()
        self.queue, self.memory, self.inner = deque([0.0], maxlen=2), {"calls": [0]}, SimpleNamespace(calls=0)
        self.tensor = torch.zeros(1)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("large", torch.zeros(600_000))
        self.scale = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers asks."""
        return self.bert.get_input_embeddings()

    def forward(self, **inputs: Tensor) -> Any:
        """The scores, moved by what was changed."""
        output = self.bert(**inputs)
        output.logits = output.logits + self.change(self)
        return output


def counts(model: Changing) -> float:
    model.calls += 1
    return model.calls


def lists(model: Changing) -> float:
    model.lengths.append(1)
    return len(model.lengths)


def sets(model: Changing) -> float:
    model.seen.add(len(model.seen))
    return len(model.seen)


def queues(model: Changing) -> float:
    model.queue.append(model.queue[-1] + 1)
    return sum(model.queue)


def remembers(model: Changing) -> float:
    model.memory["calls"][0] += 1
    model.memory[f"call {len(model.memory)}"] = 1
    return len(model.memory) + model.memory["calls"][0]


def inside(model: Changing) -> float:
    model.inner.calls += 1
    return model.inner.calls


def configures(model: Changing) -> float:
    model.config.calls = getattr(model.config, "calls", 0) + 1
    model.config.id2label[len(model.config.id2label)] = "new"
    return model.config.calls + len(model.config.id2label)


def buffers(model: Changing) -> float:
    model.mean += 1
    return float(model.mean)


def behind_the_version(model: Changing) -> float:
    model.mean.data.add_(1)
    return float(model.mean)


def registers(model: Changing) -> float:
    model.register_buffer("mean", model.mean + 1)
    model.register_buffer(f"new{len(model._buffers)}", torch.zeros(1))
    return float(model.mean) + len(model._buffers)


def tensors(model: Changing) -> float:
    model.tensor += 1
    return float(model.tensor)


def modules(model: Changing) -> float:
    model.add_module(f"new{len(model._modules)}", nn.Linear(1, 1))
    return len(model._modules)


def parameters(model: Changing) -> float:
    model.scale = nn.Parameter(model.scale + 1)
    return float(model.scale)


def trains(model: Changing) -> float:
    model.norm.train()
    model.norm(torch.tensor([[1.0], [3.0]]))
    return float(model.norm.running_mean)


def removes(model: Changing) -> float:
    known = hasattr(model, "calls")
    if known:
        del model.calls
    return float(known)


CHANGES = [
    counts, lists, sets, queues, remembers, inside, configures, buffers, behind_the_version, registers, tensors,
    modules, parameters, trains, removes,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_back(change: Callable[[Changing], float]) -> None:
    """Attributes, what they hold, settings, buffers, parts and running statistics: the same text has the same score."""
    row = rows_of(9)[0]
    model, other = Changing(change), Changing(change)
    expected = own(lambda: Changing(change), row)
    with torch.no_grad():
        moved = [float(other(input_ids=torch.tensor([row])).logits) for _ in range(3)]
    assert moved[0] == pytest.approx(expected, abs=1e-4)
    assert moved[2] != moved[0]
    read = reader(model)
    read(rows_of(5, 30, 12, 20))
    for _ in range(3):
        assert float(read([row])) == pytest.approx(expected, abs=1e-4)


def test_what_is_put_back_after_an_error() -> None:
    """A forward that fails leaves nothing behind either."""

    def fails(model: Changing) -> float:
        model.calls += 1
        raise ZeroDivisionError

    model = Changing(fails)
    with pytest.raises(ZeroDivisionError):
        reader(model)(rows_of(9))
    assert model.calls == 0


def test_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Which attributes were put back is logged, for somebody who looks for it."""
    with caplog.at_level(logging.INFO):
        reader(Changing(counts))(rows_of(9))
    assert "a forward changes Changing.calls: put back" in caplog.text


@pytest.mark.parametrize("name", ["scale", "large"])
def test_weights_that_change_each_time_are_refused(name: str) -> None:
    """No copy of weights is held, nor of large buffers."""

    def change(model: Changing) -> float:
        with torch.no_grad():
            getattr(model, name).add_(1)
        return float(getattr(model, name)[0])

    with pytest.raises(ValueError, match="a scorer needs a model whose forward leaves its weights alone, Changing"):
        reader(Changing(change))(rows_of(9))


def test_weights_that_are_prepared_once() -> None:
    """A model that rescales its weights at its first forward, as RWKV does, scores as it does by itself."""

    def change(model: Changing) -> float:
        if not model.calls:
            with torch.no_grad():
                model.scale += 1
            model.calls = 1
        return float(model.scale)

    model, row = Changing(change), rows_of(9)[0]
    read = reader(model)
    for _ in range(3):
        assert float(read([row])) == pytest.approx(own(lambda: Changing(change), row), abs=1e-4)
    assert model.scale.tolist() == [1]


def test_a_model_that_changes_nothing_is_not_touched() -> None:
    """All attributes, weights and buffers of a Llama are the very objects that they were, and no weight was written."""
    model = classifier()
    before = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in model.modules()]
    versions = [weight._version for weight in model.parameters()]
    with torch.inference_mode():
        StateKeeper().run(model, lambda: model(input_ids=torch.tensor(rows_of(9))))

    for part, attributes, weights, buffers in before:
        assert all(vars(part)[name] is value for name, value in attributes.items())
        assert all(part._parameters[name] is value for name, value in weights.items())
        assert all(part._buffers[name] is value for name, value in buffers.items())
    assert [weight._version for weight in model.parameters()] == versions


def test_the_state_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look up the parts of a model takes half of a small forward: later forwards compare, while all is equal."""
    looked_up: list[int] = []
    init = state.State.__init__
    monkeypatch.setattr(
        state.State, "__init__", lambda self, parts: (looked_up.append(len(parts)), init(self, parts))[1]
    )
    model = ENCODERS["Bert"].classifier()
    read = reader(model)
    for n in (5, 9, 30, 5):
        read(rows_of(n))
    assert looked_up == [len(list(model.modules()))]
    model.training_notes = "changed by its owner"
    read(rows_of(5))
    assert len(looked_up) == 2


@pytest.mark.parametrize("change", [counts, inside, buffers, behind_the_version, lists, configures])
def test_what_its_owner_changes_between_calls_stays(change: Callable[[Changing], float]) -> None:
    """Only what a forward changes is put back: not what is set, written or moved between two calls."""
    row = rows_of(9)[0]

    def later() -> Changing:
        model = Changing(change)
        for _ in range(3):
            change(model)
        return model

    model = Changing(change)
    read = reader(model)
    assert float(read([row])) == pytest.approx(own(lambda: Changing(change), row), abs=1e-4)
    for _ in range(3):
        change(model)
    for _ in range(2):
        assert float(read([row])) == pytest.approx(own(later, row), abs=1e-4)


def test_new_weights_between_calls() -> None:
    """A model that is trained on, or loaded into, between calls has its new scores."""
    model, other, row = ENCODERS["Bert"].classifier(), ENCODERS["Bert"].classifier(seed=5), rows_of(9)[0]
    read = reader(model)
    read([row])
    model.load_state_dict(other.state_dict())
    assert float(read([row])[0, 0]) == pytest.approx(own(lambda: other, row), abs=1e-4)


def test_what_cannot_be_compared() -> None:
    """A new tensor or array in an attribute is another one, whatever its equality raises."""

    def change(model: Changing) -> float:
        model.tensor = torch.cat([model.tensor, torch.ones(1)])
        model.memory = {"array": np.append(model.memory.get("array", np.zeros(2)), 1.0)}
        return float(model.tensor.sum()) + len(model.memory["array"])

    model, row = Changing(change), rows_of(9)[0]
    read = reader(model)
    for _ in range(3):
        assert float(read([row])) == pytest.approx(own(lambda: Changing(change), row), abs=1e-4)


def drawn() -> tuple[float, float]:
    """A number from torch's generator, and one from numpy's."""
    return float(torch.rand(())), float(np.random.rand())  # noqa: NPY002


def test_draws_are_the_same_each_time() -> None:
    """Whatever was drawn before, and whatever a forward seeds itself."""
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = [drawn() for _ in range(3)]
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    inside, outside = [], []
    for _ in range(3):
        outside.append(drawn())
        with steady_draws(torch.device("cpu")):
            inside.append(drawn())
            torch.manual_seed(7)
            np.random.seed(7)  # noqa: NPY002

    assert outside == expected
    assert len(set(inside)) == 1


def test_generators_are_put_back_after_an_error() -> None:
    """A forward that fails leaves them as they were, too."""
    before = torch.get_rng_state()
    try:
        with steady_draws(torch.device("cpu")):
            drawn()
            raise KeyError
    except KeyError:
        pass

    assert torch.equal(torch.get_rng_state(), before)
